"""Our own driver as a contestant: the fused pass with a handler, the same in place, and a loop over the batch verbs."""

from typing import NamedTuple

import numpy as np

from ixy_numba import DROP, device, free_batch, handler, kernel, packet, rx_batch, tx_batch
from ixy_numba.core.jit import CHECKED
from ixy_numba.core.pool import INDEX_MASK
from ixy_numba.datapath import Lane, forward_round, new_control
from ixy_numba.fwd import touch_and_forward
from ixy_numba.in_place import in_place_round

from .nic import PORT, RING, address, phase

device.SCHEMES["bench"] = "bench.bus"
FORMS = ("fused", "batch", "in_place")


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


class InPlace(NamedTuple):
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


@phase.implement(InPlace)
@kernel
def _in_place(driver, batch, passes):
    driver.lane.control.batch_size = batch
    for _ in range(passes):
        in_place_round(driver.rxqs, driver.txqs, driver.lane)


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
    """Two open devices and what the harness needs to know about them; `form` is one of FORMS."""

    def __init__(self, form, handler="touch", spec="bench"):
        self.name, self.handler = form if CHECKED else f"{form}_fast", handler
        self.devices = device.open_devices([spec, spec], ring_size=RING, in_place=form == "in_place")
        rxqs, txqs = (tuple(d.rx[0] for d in self.devices), tuple(d.tx[0] for d in self.devices))
        if form == "batch":
            self.driver = Verbs(rxqs, txqs, self.devices[0].pools[0].batch())
        else:
            kind = Fused if form == "fused" else InPlace
            self.driver = kind(rxqs, txqs, Lane(HANDLERS[handler], None, new_control(2, 32)))
        self.ports = np.zeros(2, PORT)
        for k, (port, rxq, txq) in enumerate(zip(self.ports, rxqs, txqs, strict=True)):
            port["rx_tail"], port["tx_tail"] = address(rxq.regs, "RDT"), address(txq.regs, "TDT")
            if form == "in_place":
                here, there = rxq.line, rxqs[1 - k].line
                port["rx_ring"], port["tx_ring"] = address(here), address(there)
                port["head"], port["legacy"] = address(there, "head"), 1
            else:
                port["rx_ring"], port["tx_ring"] = address(rxq.ring), address(txq.ring)
        if form == "in_place":
            states, self.buffers = [rxq.state for rxq in rxqs], 2 * RING
        else:
            states = [queue.state for queue in rxqs + txqs] + [self.devices[0].pool.table]
            self.buffers = self.devices[0].pools[0].usable
        self.private = [(address(state), state.dtype.itemsize, 64) for state in states]

    def audit(self):
        """How many buffers are accounted for exactly once: free, waiting for a packet, or being sent.

        In place: those whose address is still in their own descriptor; that is all of them, always.
        """
        if isinstance(self.driver, InPlace):
            return sum(int((rxq.line.desc["addr"] == [address(buffer) for buffer in rxq.line.buffer[:RING]]).sum())
                       for rxq in self.driver.rxqs)
        table = self.devices[0].pool.table
        found = [table.free[: int(table.top)]]
        for rxq, txq in zip(self.driver.rxqs, self.driver.txqs, strict=True):
            sending = (int(txq.state.clean) + np.arange((int(txq.state.tail) - int(txq.state.clean)) % RING)) % RING
            found += [rxq.state.held & INDEX_MASK, txq.state.held[sending]]
        return len(np.unique(np.concatenate(found)))
