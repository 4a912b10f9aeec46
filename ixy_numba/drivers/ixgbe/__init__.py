"""Intel 82599, X540, X550 and X552: 10 GbE."""

import numpy as np

from ...core.errors import IxyError
from ...core.memory import DmaMemory, new_record, record
from ...core.pool import ADDRESS_SHIFT
from ...core.registers import Registers
from ...device import Device, Statistics
from . import descriptors, kernels, setup
from . import regs as r

VENDOR = 0x8086
IDS = {
    0x10F7: "82599 KX4", 0x10F8: "82599 combined backplane", 0x10F9: "82599 CX4", 0x10FB: "82599 SFP+",
    0x10FC: "82599 XAUI", 0x1507: "82599 SFP+ EM", 0x1514: "82599 KX4 mezzanine", 0x1517: "82599 KR",
    0x151C: "82599 T3 LOM", 0x1529: "82599 SFP+ FCoE", 0x152A: "82599 backplane FCoE", 0x154A: "82599 quad SFP+",
    0x154D: "82599 SFP+ SF2", 0x154F: "82599 LS", 0x1557: "82599EN SFP+", 0x1558: "82599 QSFP+",
    0x1528: "X540-T", 0x1560: "X540-T1", 0x1563: "X550-T", 0x15D1: "X550-T1",
    0x15AA: "X552 KX4", 0x15AB: "X552 KR", 0x15AC: "X552 SFP+", 0x15AD: "X552 10GBASE-T", 0x15AE: "X552 1GBASE-T",
    0x15B0: "X552 XFI",
}
# Known, and refused by name: their registers differ.
REFUSED = {0x10ED: "82599 virtual function", 0x1515: "X540 virtual function", 0x1565: "X550 virtual function",
           0x15A8: "X552 virtual function", 0x10B6: "82598", 0x10C6: "82598 AF", 0x10C7: "82598 AF single",
           0x10DB: "82598 SFP", 0x15C4: "X553 SFP+", 0x15E5: "X553 1GBASE-T"}


class Ixgbe(Device):
    """One port of the 82599 family. See `device.Device` for what it offers."""

    driver = "ixgbe"
    MAX_QUEUES = r.QUEUES
    UNREPORTED = int(kernels.BLOCK) - 1
    RING_SIZES = tuple(1 << k for k in range(6, 13))
    RX_DESCRIPTORS = setup.ADVANCED

    def _set_up(self):
        self.rx, self.tx, self._memory = [], [], None
        self.regs = Registers(self.name, self.bus.read32, self.bus.write32, self.trace, never_ones=r.STATUS)
        if self.bus.bar0 is None or len(self.bus.bar0) < r.BAR_SIZE:
            size = 0 if self.bus.bar0 is None else len(self.bus.bar0)
            raise IxyError(f"{self.name}: BAR 0 has {size:#x} bytes of registers, expected at least {r.BAR_SIZE:#x}; "
                           "is it an 82599?")
        rx_rings, tx_rings = self._take_rings()
        regs = self.regs
        setup.disable_interrupts(regs)
        setup.reset(regs)
        setup.wait_for_eeprom(regs)
        setup.wait_for_dma(regs)
        setup.init_link(regs)
        setup.clear_counters(regs)
        setup.set_promiscuous(regs, self.promiscuous)  # before the first frame: a filter would drop it
        setup.init_receive(regs, [(iova, self.ring_size) for _, iova in rx_rings], self.RX_DESCRIPTORS)
        setup.init_transmit(regs, [(iova, self.ring_size) for _, iova in tx_rings])
        if self.events:
            setup.init_interrupts(regs, self.queues)
        for k in range(self.queues):
            self.rx.append(self._receive_queue(k, rx_rings[k][0]))
            self.tx.append(self._transmit_queue(k, tx_rings[k][0]))
        for k in range(self.queues):
            setup.start_transmit_queue(regs, k)
            setup.start_receive_queue(regs, k, self.ring_size)

    def _take_rings(self):
        """Memory for the rings: a (record, device address) per receive queue, and per transmit queue."""
        rings = 16 * self.ring_size * 2 * self.queues
        self._memory = DmaMemory(rings, self.bus.memory_needs, self.bus.numa_node)
        pages = self.bus.map_dma(self._memory)
        return tuple([self._take_ring(self._memory, pages, descriptors.ring(kind, self.ring_size))
                      for _ in range(self.queues)] for kind in (descriptors.RX, descriptors.TX))

    def _registers_of(self, block, k, dtype):
        start = block + k * r.QUEUE_STRIDE
        return record(self.bus.bar0[start : start + dtype.itemsize], dtype)

    def _receive_queue(self, k, ring):
        """The queue's records, with a buffer of its pool in every descriptor."""
        pool, state = self.pools[k], new_record(kernels.rx_state(self.ring_size))
        buffers = pool.reserve(self.ring_size)
        state.held = buffers
        ring.desc["addr"] = pool.view.table.word[buffers] >> ADDRESS_SHIFT
        regs = self._registers_of(r.RX_QUEUE, k, kernels.RX_REGISTERS)
        return kernels.RxQueue(ring, state, regs, pool.view, self._mask_of(k, state))

    def _mask_of(self, k, state):
        """Where the vector of queue `k` is unmasked, by writing `state.vector`."""
        state.vector = 1 << k % 32
        return record(self.bus.doorbell(r.EIMS_EX[k // 32].offset, k), kernels.MASK)

    def _transmit_queue(self, k, ring):
        state = new_record(kernels.tx_state(self.ring_size))
        regs = self._registers_of(r.TX_QUEUE, k, kernels.TX_REGISTERS)
        return kernels.TxQueue(ring, state, regs, self.pools[k].view)

    def _unsent(self):
        return any(self.regs.read(r.TDH[k]) != self.regs.read(r.TDT[k]) for k in range(len(self.tx)))

    def _quiesce(self):
        return setup.quiesce(self.regs, self.queues, self.queues)

    def _release(self):
        held = [np.zeros(0, np.uint32)] * self.queues
        for k, (rxq, txq) in enumerate(zip(self.rx, self.tx, strict=True)):
            clean, tail = int(txq.state.clean), int(txq.state.tail)
            unsent = np.arange(clean, tail + self.ring_size * (tail < clean)) % self.ring_size
            held[k] = np.concatenate([rxq.state.held, txq.state.held[unsent]])
        if self._memory is not None:
            self.bus.unmap_dma(self._memory)
            self._memory.close()
        return held

    @property
    def link_mbit(self):
        return setup.link_mbit(self.regs)

    @property
    def mac(self):
        low, high = self.regs.read(r.RAL[0]), self.regs.read(r.RAH[0])
        return low.to_bytes(4, "little") + r.RAH.ADDR.get(high).to_bytes(2, "little")

    def _set_mac(self, address):
        self.regs.write(r.RAL[0], int.from_bytes(address[:4], "little"))
        self.regs.write(r.RAH[0], int.from_bytes(address[4:], "little") | r.RAH.AV)

    def _set_promiscuous(self, on):
        setup.set_promiscuous(self.regs, on)

    def _read_counters(self):
        def read(*registers):
            return sum(self.regs.read(one) for register in registers for one in register.each())

        tx_packets = read(r.GPTC)
        return Statistics(  # received: the queues' counters, since GPRC counts what found no descriptor as well
            rx_packets=read(r.QPRC), rx_bytes=read(r.QBRC_L) + (read(r.QBRC_H) << 32),
            tx_packets=tx_packets, tx_bytes=read(r.GOTCL) + (read(r.GOTCH) << 32) - 4 * tx_packets,  # CRC
            rx_errors=read(r.CRCERRS, r.ILLERRC, r.ERRBC, r.RLEC, r.RUC, r.RFC, r.ROC, r.RJC),
            rx_dropped=read(r.MPC, r.QPRDC), tx_dropped=0)
