/* Switches callgrind's counting on and off around what is to be counted. Outside valgrind these are no-ops. */
#include <stdint.h>
#include <valgrind/callgrind.h>

void probe_toggle(uint64_t unused, uint64_t unused_too, uint64_t nor_this)
{
    (void)unused, (void)unused_too, (void)nor_this;
    CALLGRIND_TOGGLE_COLLECT;
}

void probe_begin(void)
{
    CALLGRIND_START_INSTRUMENTATION;
}

void probe_dump(const char *name)
{
    CALLGRIND_DUMP_STATS_AT(name);
}
