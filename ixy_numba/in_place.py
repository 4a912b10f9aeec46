"""The loop that sends packets from the buffers that they were received into: no pool, nothing moves.

Between exactly two ports, for handlers that forward to the other port, drop or edit. The ring that one port receives
into is the ring that the other one sends from: what was received is turned into what is to be sent where it lies, and
is received into again once it is sent. Same handlers, same `Lane` as `datapath.forward_loop`.
"""

import numpy as np

from .core.dispatch import verb
from .core.errors import ClosedError
from .core.jit import kernel
from .core.lifetime import CLOSED, any_closed, occupy
from .core.mmio import cycles, likely, load_acquire
from .core.pool import ONE, ZERO
from .datapath import (
    DROP,
    EMPTY,
    PREFETCH,
    _decide,
    _note_failure,
    rx_broken,
    rx_next,
    rx_prefetch,
    rx_start,
)
from .waiting import rest


@verb
def rx_view(rxq, position, length, arrival):
    """The `length` bytes received at `position`, as a Packet of port `arrival`."""


@verb
def resend(rxq, position, length):
    """Make the descriptor at `position` send `length` bytes of its buffer, none for 0; returns the next position."""


@verb
def hand_over(rxq, txq, n):
    """Let the device of `txq` send the `n` packets since the last call."""


@verb
def recycle(rxq, txq):
    """Let the device of `rxq` receive into what the device of `txq` has sent."""


@kernel
def in_place_loop(rxqs, txqs, lane):
    """Forward between the two queues each of `rxqs` and `txqs`, until told to stop.

    Ends when control.stop is set or control.budget packets are forwarded; nothing is left half-done then. Run it in a
    thread of its own: it holds no GIL and sees no Ctrl-C. ClosedError if one of the devices is closed, or was before.
    """
    control = lane.control
    now, idle, closed = cycles(), ZERO, ZERO
    occupy(rxqs, ONE)
    while load_acquire(control, "stop") == ZERO and control.forwarded < control.budget:
        closed = any_closed(rxqs)
        if closed != ZERO:
            break
        moved = in_place_round(rxqs, txqs, lane)
        before, now = now, cycles()
        control.passes += ONE
        if moved != ZERO:
            control.busy_cycles += now - before
            idle = ZERO
        else:
            idle = rest(rxqs, control, idle, control.forwarded + control.dropped)
    occupy(rxqs, ZERO)
    if closed != ZERO:
        raise ClosedError(CLOSED)


@kernel(inline=True)
def in_place_round(rxqs, txqs, lane):
    """One pass each way; returns how many packets moved."""
    return in_place_pass(rxqs[0], txqs[1], lane, 0) + in_place_pass(rxqs[1], txqs[0], lane, 1)


@kernel(inline=True)
def in_place_pass(rxq, txq, lane, arrival):
    """Up to a batch of packets of one receive queue, each to the other port or nowhere; returns how many.

    A full output needs no care: what is not sent is not received into, so it is the input that comes to rest.
    """
    control = lane.control
    recycle(rxq, txq)  # even if nothing arrives: once all descriptors wait to be sent, nothing can
    limit = min(control.batch_size, control.budget - control.forwarded)
    other, dropped = np.int64(1 - arrival), control.dropped
    i, n = rx_start(rxq), ZERO
    while n < limit:
        length = rx_next(rxq, i)
        if likely(length != EMPTY):
            rx_prefetch(rxq, i + PREFETCH)
            verdict = _decide(lane, rx_view(rxq, i, length, arrival))
            if not likely(verdict == other):
                if verdict != DROP:
                    _note_failure(control, rx_view(rxq, i, length, arrival))
                length = ZERO
                control.dropped += ONE
        elif rx_broken(rxq, i):
            rxq.state.errors += ONE
            length = ZERO
            control.dropped += ONE
        else:
            break
        i = resend(rxq, i, length)
        n += ONE
    if n != ZERO:
        hand_over(rxq, txq, n)
        control.forwarded += n - (control.dropped - dropped)
    return n
