"""The simulated 82599's interrupts as eventfds of this process, which the engine writes without the interpreter."""

import os

from ..core.jit import kernel
from ..core.libc import signal_event
from ..core.mmio import load_acquire, store_release
from ..core.raw import load32
from ..drivers.ixgbe import regs as r
from . import regs as m
from .state import ONE, ZERO, U

GPIE, EIAC, EIAM, EIAM_LOW, EIAM_HIGH, EITR, EITR_UPPER = (U(register.offset) for register in (
    r.GPIE, r.EIAC, m.EIAM, r.EIAM_EX[0], r.EIAM_EX[1], r.EITR[0], r.EITR_UPPER[0]))
MULTIPLE_MSIX, EIAME = U(r.GPIE.MULTIPLE_MSIX), U(r.GPIE.EIAME)
RTXQ, BEYOND, HALF, UPPER = U(0xFFFF), U((1 << 64) - (1 << 16)), U(32), U(r.EITR.count)
INTERVAL, INTERVAL_LOW = U(r.EITR.INTERVAL), U(r.EITR.INTERVAL.low)


class Events:
    """The port that a model's interrupts leave by: `files[k]` is the eventfd of vector k."""

    def __init__(self, vectors):
        self.files = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(vectors)]

    def message(self, vector):
        if vector < len(self.files):
            signal_event(self.files[vector])

    def level(self, on):
        """There is no pin."""

    def close(self):
        for descriptor in self.files:
            os.close(descriptor)


@kernel
def raise_events(device, now):
    """What `Interrupts.deliver` does for the causes of queues, where vectors are eventfds; kernels' unmasking first."""
    if load32(device.bar + GPIE) & MULTIPLE_MSIX == ZERO:
        return
    device.sent &= device.causes & device.mask  # before anything new: what was cleared or masked is sent again
    for k in range(device.direct):
        bits = U(load_acquire(device.unmask, k))
        if bits != ZERO:
            store_release(device.unmask, k, 0)
            device.mask |= bits << HALF if k >= HALF else bits
    device.causes |= device.happened
    device.happened = ZERO
    waiting = device.causes & device.mask & ~device.sent
    if waiting == ZERO:
        return
    for k in range(device.direct):
        if waiting >> k & ONE and now >= device.next[k]:
            fire(device, k, now)


@kernel
def fire(device, vector, now):
    """Send a vector's message: its cause is cleared as EIAC says, it is masked as EIAM says, and EITR holds it back."""
    registers, bit = device.bar, ONE << vector
    device.sent |= bit
    device.causes &= ~(bit & (load32(registers + EIAC) & RTXQ | BEYOND))
    if load32(registers + GPIE) & EIAME:
        device.mask &= ~(bit & (load32(registers + EIAM) & RTXQ | load32(registers + EIAM_LOW)
                                | load32(registers + EIAM_HIGH) << HALF))
    moderation = registers + (EITR + vector * U(4) if vector < UPPER else EITR_UPPER + (vector - UPPER) * U(4))
    interval = (load32(moderation) & INTERVAL) >> INTERVAL_LOW
    device.next[vector] = now + interval * device.moderation
    signal_event(device.event[vector])
