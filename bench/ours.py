"""Our own driver as a contestant: the fused pass with a handler, and a loop over the batch verbs as users write it."""

from typing import NamedTuple

import numpy as np

from ixy_numba import DROP, device, free_batch, handler, kernel, packet, rx_batch, tx_batch
from ixy_numba.core.jit import CHECKED
from ixy_numba.core.pool import INDEX_MASK
from ixy_numba.datapath import Lane, forward_round, new_control
from ixy_numba.fwd import touch_and_forward

from .nic import PORT, RING, address, phase

device.SCHEMES["bench"] = "bench.bus"
FORMS = ("fused", "batch")


@handler
def mac_swap(packet):
    """Send a packet back with its MAC addresses exchanged, to the other port."""
    if len(packet) < 14:
        return DROP
    high, low = packet.be32(0), packet.be16(4)
    packet.set_be32(0, packet.be32(6))
    packet.set_be16(4, packet.be16(10))
    packet.set_be32(6, high)
    packet.set_be16(10, low)
    return 1 - packet.port


@handler
def udp_filter(packet):
    """Drop unfragmented IPv4 UDP to port 9 (discard), let all else pass."""
    if (len(packet) >= 42 and packet.be16(12) == 0x0800 and packet[14] == 0x45 and packet[23] == 17
            and packet.be16(20) & 0x3FFF == 0 and packet.be16(36) == 9):
        return DROP
    return 1 - packet.port


HANDLERS = {"touch": touch_and_forward, "mac_swap": mac_swap, "udp_filter": udp_filter}


class Fused(NamedTuple):
    rxqs: tuple
    txqs: tuple
    lane: Lane


class Verbs(NamedTuple):
    rxqs: tuple
    txqs: tuple
    batch: np.record


@phase.implement(Fused)
@kernel
def _fused(driver, batch, passes):
    driver.lane.control.batch_size = batch
    for _ in range(passes):
        forward_round(driver.rxqs, driver.txqs, driver.lane, 0)


@kernel
def forward_batch(rxq, txq, batch, limit):
    n = rx_batch(rxq, batch, limit)
    for k in range(n):
        view = packet(rxq.pool, batch.packet[k])
        view[1] = (view[1] + 1) & 0xFF
    free_batch(rxq.pool, batch, tx_batch(txq, batch, 0, n), n)


@phase.implement(Verbs)
@kernel
def _verbs(driver, batch, passes):
    for _ in range(passes):
        forward_batch(driver.rxqs[0], driver.txqs[1], driver.batch, batch)
        forward_batch(driver.rxqs[1], driver.txqs[0], driver.batch, batch)


class Ours:
    """Two open devices and what the harness needs to know about them; `form` is "fused" or "batch"."""

    def __init__(self, form, handler="touch", spec="bench"):
        self.name, self.handler = form if CHECKED else f"{form}_fast", handler
        self.devices = device.open_devices([spec, spec], ring_size=RING)
        rxqs, txqs = (tuple(d.rx[0] for d in self.devices), tuple(d.tx[0] for d in self.devices))
        if form == "fused":
            self.driver = Fused(rxqs, txqs, Lane(HANDLERS[handler], None, new_control(2, 32)))
        else:
            self.driver = Verbs(rxqs, txqs, self.devices[0].pools[0].batch())
        self.ports = np.zeros(2, PORT)
        for port, rxq, txq in zip(self.ports, rxqs, txqs, strict=True):
            port["rx_ring"], port["rx_tail"] = address(rxq.ring), address(rxq.regs, "RDT")
            port["tx_ring"], port["tx_tail"] = address(txq.ring), address(txq.regs, "TDT")
        states = [queue.state for queue in rxqs + txqs] + [self.devices[0].pool.table]
        self.private = [(address(state), state.dtype.itemsize, 64) for state in states]
        self.buffers = self.devices[0].pools[0].usable

    def audit(self):
        """How many buffers are accounted for exactly once: free, waiting for a packet, or being sent."""
        table = self.devices[0].pool.table
        found = [table.free[: int(table.top)]]
        for rxq, txq in zip(self.driver.rxqs, self.driver.txqs, strict=True):
            sending = (int(txq.state.clean) + np.arange((int(txq.state.tail) - int(txq.state.clean)) % RING)) % RING
            found += [rxq.state.held & INDEX_MASK, txq.state.held[sending]]
        return len(np.unique(np.concatenate(found)))
