/* DPDK's virtio-user front-end in a loop of its own, timed as ours is in front_end.py, which explains the words.
   Arguments are those of DPDK's environment; each line of input is "receive 0.25" (or transmit, macswap; seconds). */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_ethdev.h>
#include <rte_ether.h>
#include <rte_mbuf.h>

enum { BURST = 32, RING = 256, FRAME = 64, INTERRUPTED = 16384 };

static struct rte_mempool *pool;
static struct rte_mbuf *packets[BURST];
static unsigned first, filled; /* packets[first..filled) wait to be sent */
static uint8_t frame[FRAME];
static uint64_t moved;

static unsigned receive(void)
{
    unsigned n = rte_eth_rx_burst(0, 0, packets, BURST);
    if (n)
        rte_pktmbuf_free_bulk(packets, n);
    moved += n;
    return n;
}

static unsigned send_filled(void)
{
    unsigned n = rte_eth_tx_burst(0, 0, packets + first, filled - first);
    first += n;
    moved += n;
    return n;
}

static unsigned transmit(void)
{
    unsigned made = 0;
    if (first == filled && !rte_pktmbuf_alloc_bulk(pool, packets, BURST)) {
        for (; made < BURST; made++) {
            memcpy(rte_pktmbuf_mtod(packets[made], void *), frame, FRAME);
            packets[made]->data_len = packets[made]->pkt_len = FRAME;
        }
        first = 0;
        filled = BURST;
    }
    return send_filled() + made;
}

static unsigned macswap(void)
{
    unsigned n = 0;
    if (first == filled) {
        n = rte_eth_rx_burst(0, 0, packets, BURST);
        for (unsigned k = 0; k < n; k++) {
            struct rte_ether_hdr *header = rte_pktmbuf_mtod(packets[k], struct rte_ether_hdr *);
            struct rte_ether_addr address = header->dst_addr;
            header->dst_addr = header->src_addr;
            header->src_addr = address;
        }
        first = 0;
        filled = n;
    }
    return first == filled ? 0 : send_filled() + n;
}

static uint64_t waited(void)
{
    uint64_t ns = 0;
    FILE *file = fopen("/proc/thread-self/schedstat", "r");
    if (!file || fscanf(file, "%*u %" SCNu64, &ns) != 1)
        ns = 0;
    if (file)
        fclose(file);
    return ns;
}

static void window(unsigned (*pass)(void), double seconds)
{
    uint64_t cycles = 0, packets_timed = 0, passes = 0, then = waited(), start = rte_rdtsc(), now = start;
    uint64_t end = start + seconds * rte_get_tsc_hz();
    moved = 0;
    while (now < end) {
        uint64_t moved_before = moved, before = now;
        unsigned n = pass();
        now = rte_rdtsc();
        if (n && now - before < INTERRUPTED) {
            cycles += now - before;
            packets_timed += moved - moved_before;
            passes++;
        }
    }
    printf("%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", cycles, packets_timed, passes,
           moved, now - start, waited() - then);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    struct rte_eth_conf conf = {0};
    char line[64], mode[16];
    double seconds;
    if (rte_eal_init(argc, argv) < 0)
        return 1;
    pool = rte_pktmbuf_pool_create("packets", 8191, 250, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY);
    if (!pool || rte_eth_dev_configure(0, 1, 1, &conf) || rte_eth_rx_queue_setup(0, 0, RING, 0, NULL, pool)
        || rte_eth_tx_queue_setup(0, 0, RING, 0, NULL) || rte_eth_dev_start(0))
        return 1;
    memset(frame, 0x5a, sizeof frame);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) && sscanf(line, "%15s %lf", mode, &seconds) == 2)
        window(mode[0] == 'r' ? receive : mode[0] == 't' ? transmit : macswap, seconds);
    rte_eth_dev_stop(0);
    rte_eth_dev_close(0);
    rte_eal_cleanup();
    return 0;
}
