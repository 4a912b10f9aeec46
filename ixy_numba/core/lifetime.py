"""The end of a queue's life: kernels refuse a queue whose device is closed, and closing waits for those still inside.

Every queue's state has the two WORDS. Python sets `closed`; a kernel has `busy` set while it works on the queue. The
memory itself stays mapped for as long as anybody holds a view of it (`core.memory`), so a kernel that is late reads
zeros; the words are there to say so, and to keep buffers from being counted while they move.
"""

import time

from numba.extending import overload

from .errors import ClosedError, IxyError
from .jit import OPTIONS, PROTECTED, kernel
from .mmio import fence, load_acquire, store_release
from .pool import ONE, ZERO

WORDS = [("closed", "u8"), ("busy", "u8")]
LIFETIMES = "memory_use_after_free" in PROTECTED
CLOSED = "the device of this queue is closed; open it again"
_DRAIN_S = 0.002  # far longer than a store takes to leave a processor's buffer
_UNROLLED = {"forceinline": True, **OPTIONS}


@kernel(inline=True)
def enter(state):
    """Begin a batch on the queue of `state`; every `enter` has its `leave`. ClosedError if the device is closed."""
    if LIFETIMES:
        store_release(state, "busy", ONE)
        if load_acquire(state, "closed") != ZERO:
            store_release(state, "busy", ZERO)
            raise ClosedError(CLOSED)


@kernel(inline=True)
def leave(state):
    """The batch is done."""
    if LIFETIMES:
        store_release(state, "busy", ZERO)


# The same for a loop over tuples of queues, which are of different types: unrolled when it is compiled.


def occupy(queues, busy):
    """Say that a loop works on all of `queues` (ONE), or no longer does (ZERO)."""
    for queue in queues:
        queue.state.busy = busy
    fence()


@overload(occupy, jit_options=_UNROLLED)
def _occupy(queues, busy):
    if not LIFETIMES or not len(queues):
        return lambda queues, busy: fence()

    def unrolled(queues, busy):
        store_release(queues[0].state, "busy", busy)
        occupy(queues[1:], busy)

    return unrolled


def any_closed(queues):
    """Whether the device of one of `queues` is closed: 0 if not."""
    return sum(queue.state.closed for queue in queues)


@overload(any_closed, jit_options=_UNROLLED)
def _any_closed(queues):
    if not LIFETIMES or not len(queues):
        return lambda queues: ZERO
    return lambda queues: load_acquire(queues[0].state, "closed") | any_closed(queues[1:])


def close_queues(states, timeout_s):
    """Let no kernel enter the queues of `states` any more, and wait until none is inside. IxyError after `timeout_s`.

    A kernel stores `busy` before it loads `closed`, without the fence that this would need: instead, time passes here
    between the store of `closed` and the first look at `busy`.
    """
    for state in states:
        state.closed = 1
    time.sleep(_DRAIN_S)
    deadline = time.monotonic() + timeout_s
    while any(state.busy for state in states):
        if time.monotonic() > deadline:
            raise IxyError(f"a kernel still works on it after {timeout_s} s; nothing was unmapped, end that kernel and "
                           "close the device again")
        time.sleep(0.0005)
