"""A bus that plugs our own driver into the benchmark's NIC: registers in plain memory, addresses as they are."""

import numpy as np

from ixy_numba import sim
from ixy_numba.bus import Bus
from ixy_numba.core.memory import ANY, DmaMemory
from ixy_numba.drivers.ixgbe import IDS, VENDOR
from ixy_numba.drivers.ixgbe import regs as r


class BenchBus(Bus):
    """Says yes to the driver's set-up, and lets the queues' tails be written."""

    vendor, device = VENDOR, min(IDS)
    simulated, memory_needs = True, ANY
    READY = {r.EEC.offset: r.EEC.AUTO_RD, r.RDRXCTL.offset: r.RDRXCTL.DMAIDONE,
             r.LINKS.offset: r.LINKS.UP | r.LINKS.SPEED.of(3)}

    def __init__(self, name):
        self.name = name
        self.bar0 = DmaMemory(r.BAR_SIZE).array
        self._registers = self.bar0.view(np.uint32)

    def read32(self, offset):
        return int(self._registers[offset // 4]) | self.READY.get(offset, 0)

    def write32(self, offset, value):
        if offset == r.CTRL.offset:
            value &= ~(r.CTRL.RST | r.CTRL.LRST)
        self._registers[offset // 4] = value

    def map_dma(self, memory):
        return memory.virtual_address + np.arange(0, memory.size, memory.page_size, dtype=np.uint64)

    def unmap_dma(self, memory):
        pass

    def close(self):
        pass


def open_bus(spec, rest):
    """`bench`, or with the options of `sim`: a simulated 82599 that moves only when it is visited."""
    return sim.open_bus(spec, rest, manual=True) if rest else BenchBus(spec)
