"""Wall-clock time for kernels, from the cycle counter."""

import time

import numpy as np

from .jit import kernel
from .memory import new_record
from .mmio import cycles, fence_acquire, fence_release, load_acquire, store_release

U = np.uint64
ONE, LOW32, SHIFT32 = U(1), U(0xFFFFFFFF), U(32)

CLOCK = np.dtype([  # two states, so that no reader ever waits for the writer: `turn & 1` says which one holds
    ("turn", "u8"),
    ("cycles", "u8", 2),  # counter when the state was made
    ("ns", "u8", 2),  # wall clock then, since 1970
    ("multiplier", "u8", 2),  # nanoseconds a cycle, times 2**32
])


@kernel
def now_ns(clock):
    """Wall-clock time in nanoseconds since 1970 (uint64); `clock` is a `Clock`'s `.record`."""
    while True:
        turn = load_acquire(clock, "turn")
        state = turn & ONE
        since, ns, multiplier = clock.cycles[state], clock.ns[state], clock.multiplier[state]
        now = cycles()  # before the check: a thread that sleeps here must not stretch an old state over a new one
        fence_acquire()
        if load_acquire(clock, "turn") == turn:  # else the state may have been overwritten while we read it
            return ns + _scaled(now, since, multiplier)


@kernel(inline=True)
def _scaled(now, since, multiplier):
    """(now - since) * multiplier >> 32 without the 128-bit product; 0 if this core's counter is a little behind."""
    elapsed = now - since if now > since else U(0)
    high, low = elapsed >> SHIFT32, elapsed & LOW32
    fast, slow = multiplier >> SHIFT32, multiplier & LOW32
    return (high * fast << SHIFT32) + high * slow + low * fast + (low * slow >> SHIFT32)


@kernel
def _set_state(clock, since, ns, multiplier):
    fence_release()  # whoever sees this state change must see that the turn has passed on from it
    turn = clock.turn + ONE
    state = turn & ONE
    clock.cycles[state], clock.ns[state], clock.multiplier[state] = since, ns, multiplier
    store_release(clock, "turn", turn)


@kernel
def _set_multiplier(clock, multiplier):
    """Go on from where the clock is now, at another rate."""
    state, now = clock.turn & ONE, cycles()
    ns = clock.ns[state] + _scaled(now, clock.cycles[state], clock.multiplier[state])
    _set_state(clock, now, ns, multiplier)


@kernel
def _cycles():
    return cycles()


class Clock:
    """Wall-clock time for kernels: `now_ns(clock.record)`. Making one takes 15 ms, to measure the counter's rate.

    `update()` keeps it on the system's clock. It makes small differences up by running at most 0.1 % faster or slower
    for the next second, so that time never goes back; after a difference over 10 ms (the clock was set, the machine
    slept) it jumps. Without updates it drifts by some microseconds a second; nothing overflows.
    """

    STEP_NS, SLEW, INTERVAL_NS = 10_000_000, 1e-3, 1_000_000_000

    def __init__(self):
        self.record = new_record(CLOCK)
        since, start, _ = _read_clocks()
        time.sleep(0.015)
        self._cycles, self._monotonic, wall = _read_clocks()
        self._rate = (self._monotonic - start) / (self._cycles - since)
        _set_state(self.record, U(self._cycles), U(wall), _fixed(self._rate))

    def update(self):
        """Compare with the system's clock and correct, once a second at most. From one thread at a time."""
        now, monotonic, wall = _read_clocks()
        elapsed = monotonic - self._monotonic
        if elapsed < self.INTERVAL_NS:
            return
        if now > self._cycles:  # a counter may restart while the machine sleeps
            self._rate = elapsed / (now - self._cycles)
        self._cycles, self._monotonic = now, monotonic
        error = wall - self._at(now)
        if abs(error) > self.STEP_NS:
            _set_state(self.record, U(now), U(wall), _fixed(self._rate))
        else:  # be right after another such interval
            slew = min(max(error / elapsed, -self.SLEW), self.SLEW)
            _set_multiplier(self.record, _fixed(self._rate * (1 + slew)))

    def _at(self, now):
        """What the record makes of a counter value."""
        state = int(self.record.turn) & 1
        since, ns, multiplier = (int(self.record[field][state]) for field in ("cycles", "ns", "multiplier"))
        return ns + (max(now - since, 0) * multiplier >> 32)


def _fixed(rate):
    return U(round(rate * 2**32))


def _read_clocks():
    """(cycles, monotonic ns, wall-clock ns) of the same moment: of ten readings the one that was least disturbed."""
    readings = []
    for _ in range(10):
        before, monotonic, wall, after = int(_cycles()), time.monotonic_ns(), time.time_ns(), int(_cycles())
        readings.append((after - before, (before + after) // 2, monotonic, wall))
    return min(readings)[1:]
