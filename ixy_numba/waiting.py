"""What a loop does while nothing arrives: it spins, lets others have its processor, or sleeps until an interrupt."""

import os

from numba.extending import overload

from .core.dispatch import verb
from .core.jit import OPTIONS, kernel
from .core.libc import POLLFD, POLLIN, poll, read_into, yield_processor
from .core.memory import address_of
from .core.mmio import pause
from .core.pool import ONE, ZERO, U

MAX_PORTS = 16
SPINS = U(2000)  # passes without a packet before other threads get the processor
SILENCE = U(256)  # with interrupts, before a sleep is considered: about what a sleep costs
BUSY = U(64)  # with so many packets between two silences, on average, sleeping is not worth it
KEPT, DECAY = U(3), U(2)  # a silence's weight in the average is 1/4
TIMEOUT_MS = 100

# What `rest` needs, among the fields of a loop's control record. With `timeout_ms` 0 it never sleeps.
WAIT = [
    ("timeout_ms", "u8"),  # longest sleep
    ("average", "u8"), ("seen", "u8"),  # packets between two silences; all told, at the last one
    ("sleeps", "u8"),
    ("files", "u8"), ("file", POLLFD, (MAX_PORTS + 1,)),  # what ends a sleep: the first one is the thread's `wake`
    ("file_address", "u8"),
    ("events", "u8"), ("events_address", "u8"),  # where an eventfd is read to
]


@verb
def rx_arm(rxq):
    """Let the next packet of `rxq` raise its device's interrupt; returns whether the loop must not sleep.

    It must not where something has arrived already, or where the ring cannot receive before something else is done.
    """


@verb
def rx_disarm(rxq):
    """No interrupts any more: the loop polls again."""


def prepare(control, events, timeout_ms=TIMEOUT_MS):
    """Let a loop with this control record sleep until one of the eventfds `events` is written, and no longer than that.

    Returns another eventfd that ends a sleep: the `wake` of the loop's KernelThread.
    """
    wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    files = [wake, *events]
    control.files = len(files)
    control.file["fd"][: len(files)], control.file["events"] = files, POLLIN
    base, fields = address_of(control), control.dtype.fields
    control.file_address, control.events_address = base + fields["file"][1], base + fields["events"][1]
    control.timeout_ms = timeout_ms
    return wake


@kernel
def rest(rxqs, control, idle, handled):
    """After a pass over `rxqs` in which nothing moved, the `idle`th in a row or so: wait; returns the next `idle`.

    `handled` counts the packets so far.
    """
    if idle < (SPINS if control.timeout_ms == ZERO else SILENCE):
        pause()
        return idle + ONE
    if control.timeout_ms == ZERO:
        yield_processor()  # there may be more loops than processors
        return idle
    if _quiet(control, handled):
        awake = arm(rxqs)
        if not awake:
            _sleep(control)
        disarm(rxqs)
        if not awake:
            return idle  # after a time-out one pass is enough before the next sleep
    yield_processor()
    return ZERO


@kernel
def _quiet(control, handled):
    """Whether, by a moving average, so few packets come between two silences that sleeping is worth it."""
    control.average = (control.average * KEPT + (handled - control.seen)) >> DECAY
    control.seen = handled
    return control.average < BUSY


@kernel
def _sleep(control):
    control.sleeps += ONE
    poll(control.file_address, control.files, control.timeout_ms)
    for k in range(ONE, control.files):
        if control.file[k].revents != 0:
            read_into(control.file[k].fd, control.events_address, U(8))


# Over a tuple of queues, which are of different types: unrolled when it is compiled.

_UNROLLED = {"forceinline": True, **OPTIONS}


def arm(rxqs):
    """`rx_arm` for all of them: whether one says that the loop must not sleep."""
    return any([rx_arm(rxq) for rxq in rxqs])


@overload(arm, jit_options=_UNROLLED)
def _arm(rxqs):
    if len(rxqs) == 1:
        return lambda rxqs: rx_arm(rxqs[0])
    return lambda rxqs: rx_arm(rxqs[0]) | arm(rxqs[1:])


def disarm(rxqs):
    for rxq in rxqs:
        rx_disarm(rxq)


@overload(disarm, jit_options=_UNROLLED)
def _disarm(rxqs):
    if len(rxqs) == 1:
        return lambda rxqs: rx_disarm(rxqs[0])

    def unrolled(rxqs):
        rx_disarm(rxqs[0])
        disarm(rxqs[1:])

    return unrolled
