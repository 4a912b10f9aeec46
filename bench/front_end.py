"""Our virtio front-end in a loop of its own, as a worker of the vhost table: what c/virtio_user.c is for DPDK's.

Of the passes that moved packets, both count cycles, packets (`timed`) and passes, without those that an interrupt or
another process fell into; and, of all passes, packets and time.
"""

import atexit
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ixy_numba import DROP, alloc_batch, free_batch, handler, kernel, open_device, packet, rx_batch, tx_batch
from ixy_numba.core.memory import new_record
from ixy_numba.core.mmio import cycles
from ixy_numba.core.packet import resize
from ixy_numba.datapath import Lane, forward_round, new_control, verb

from .common import pin, tsc_ghz
from .nic import ONE, ZERO, U

BURST, FRAME, INTERRUPTED = U(32), U(64), U(16384)  # as in c/virtio_user.c
RING = 256
FOUND = np.dtype([("cycles", "u8"), ("timed", "u8"), ("passes", "u8"), ("packets", "u8"), ("elapsed", "u8")])
PENDING = np.dtype([("first", "u8"), ("filled", "u8")])  # batch.packet[first:filled] waits to be sent


@handler
def discard(packet):
    return DROP


@handler
def mac_swap(packet):
    """Send a packet back where it came from, its MAC addresses exchanged."""
    if len(packet) < 14:
        return DROP
    high, low = packet.be32(0), packet.be16(4)
    packet.set_be32(0, packet.be32(6))
    packet.set_be16(4, packet.be16(10))
    packet.set_be32(6, high)
    packet.set_be16(10, low)
    return packet.port


class Fused(NamedTuple):
    rxqs: tuple
    txqs: tuple
    lane: Lane


class Receive(NamedTuple):
    rxq: tuple
    batch: np.record


class Transmit(NamedTuple):
    txq: tuple
    batch: np.record
    pending: np.record


class Swap(NamedTuple):
    rxq: tuple
    txq: tuple
    batch: np.record
    pending: np.record


@verb
def one_pass(driver, found):
    """Move up to a burst: what was moved to its end is added to found.packets; returns 0 if there was nothing to do."""


@one_pass.implement(Fused)
@kernel
def _fused(driver, found):
    moved = forward_round(driver.rxqs, driver.txqs, driver.lane, 0)
    found.packets += moved
    return moved


@one_pass.implement(Receive)
@kernel
def _receive(driver, found):
    n = rx_batch(driver.rxq, driver.batch, BURST)
    free_batch(driver.rxq.pool, driver.batch, ZERO, n)
    found.packets += n
    return n


@one_pass.implement(Transmit)
@kernel
def _transmit(driver, found):
    pending, batch, pool, made = driver.pending, driver.batch, driver.txq.pool, ZERO
    if pending.first == pending.filled:
        made = alloc_batch(pool, batch, BURST)
        for k in range(made):
            batch.packet[k] = resize(batch.packet[k], FRAME)
            _write(packet(pool, batch.packet[k]))
        pending.first, pending.filled = ZERO, made
    return _send(driver, found) + made


@kernel(inline=True)
def _write(view):
    for k in range(0, 64, 8):
        view.set_be64(k, U(0x5A5A5A5A5A5A5A5A))


@one_pass.implement(Swap)
@kernel
def _swap(driver, found):
    pending, batch, n = driver.pending, driver.batch, ZERO
    if pending.first == pending.filled:
        n = rx_batch(driver.rxq, batch, BURST)
        for k in range(n):
            _exchange(packet(driver.rxq.pool, batch.packet[k]))
        pending.first, pending.filled = ZERO, n
    if pending.first == pending.filled:
        return ZERO
    return _send(driver, found) + n


@kernel(inline=True)
def _exchange(view):
    high, low = view.be32(0), view.be16(4)
    view.set_be32(0, view.be32(6))
    view.set_be16(4, view.be16(10))
    view.set_be32(6, high)
    view.set_be16(10, low)


@kernel(inline=True)
def _send(driver, found):
    pending = driver.pending
    first = tx_batch(driver.txq, driver.batch, pending.first, pending.filled)
    sent = first - pending.first
    pending.first = first
    found.packets += sent
    return sent


@kernel
def window(driver, length, found):
    """Passes for `length` cycles, counted and timed."""
    start = now = cycles()
    while now - start < length:
        packets, moved = found.packets, one_pass(driver, found)
        before, now = now, cycles()
        if moved != ZERO and now - before < INTERRUPTED:
            found.cycles += now - before
            found.timed += found.packets - packets
            found.passes += ONE
    found.elapsed = now - start


def drivers(device):
    """{(what it does, how): driver for `window`}; to transmit, there are only the verbs."""
    rxq, txq, batch = device.rx[0], device.tx[0], device.pools[0].batch()

    def fused(function):
        return Fused((rxq,), (txq,), Lane(function, None, new_control(1, int(BURST))))

    return {("receive", "handler"): fused(discard), ("receive", "verbs"): Receive(rxq, batch),
            ("transmit", "verbs"): Transmit(txq, batch, new_record(PENDING)),
            ("macswap", "handler"): fused(mac_swap), ("macswap", "verbs"): Swap(rxq, txq, batch, new_record(PENDING))}


@functools.cache
def front_end(spec):
    """The drivers of a device that is open from now on, compiled; and the clock's rate in GHz."""
    pin()
    device = open_device(spec, ring_size=RING)
    atexit.register(device.close)
    made = drivers(device)
    for driver in made.values():
        window(driver, ZERO, new_record(FOUND))
    return made, tsc_ghz()


def waited_s():
    """How long this thread has been ready and had no processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def worker(spec, work, form, seconds):
    """One window of the device `spec`: what was counted."""
    made, ghz = front_end(spec)
    found, since = new_record(FOUND), waited_s()
    window(made[work, form], U(int(seconds * ghz * 1e9)), found)
    return {**{name: int(found[name]) for name in FOUND.names}, "waited_s": waited_s() - since}
