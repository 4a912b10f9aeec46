"""How a driver reaches a device: BAR 0, registers, DMA mapping. One file a transport; `Bus` is the seam."""

from abc import ABC, abstractmethod

from ..core.errors import IxyError, UsageError
from ..core.memory import HUGE


class Bus(ABC):
    """One device on one transport. `name` is the device's spec, for messages."""

    name = "?"
    vendor, device = 0, 0  # PCI ids
    simulated = False
    finite = False  # whether what it receives comes to an end (a capture, a number of generated frames)
    memory_needs = HUGE  # of core.memory: ANY, PINNED or HUGE
    numa_node = None  # the one it is next to
    shares_memory = False  # whether the device is another process, which maps our memory
    bar0 = None  # BAR 0 as a uint8 array, for the queues' doorbells in kernels

    def read32(self, offset):
        """The 32-bit register at byte `offset` of BAR 0, where the device has one."""
        raise UsageError(f"{self.name} has no registers")

    def write32(self, offset, value):
        """Write the 32-bit register at byte `offset` of BAR 0."""
        raise UsageError(f"{self.name} has no registers")

    def doorbell(self, offset, writer):
        """Where kernels store to the 32-bit register at byte `offset` of BAR 0: uint8, shape (4,).

        `writer`: who does, where several threads store to one register.
        """
        return self.bar0[offset : offset + 4]

    @abstractmethod
    def map_dma(self, memory):
        """Let the device reach `memory` (a DmaMemory) and return where it sees each page: uint64, shape (pages,)."""

    @abstractmethod
    def unmap_dma(self, memory):
        """Take that back."""

    def give_back(self):
        """After `close`: undo what opening did to others (a kernel driver), since nothing came of it."""

    def stop_dma(self):
        """Let the device reach no memory any more, whether or not the driver could make it quiet."""

    @abstractmethod
    def close(self):
        """Let go of the device. The driver has made it quiet before."""

    def enable_interrupts(self, vectors):
        """An eventfd for each of `vectors` interrupt vectors. They are the bus's, until `disable_interrupts`."""
        raise IxyError(f"{self.name}: no interrupts this way; on PCI, bind the device to vfio-pci")

    def disable_interrupts(self):
        """None any more, and their eventfds are closed."""

    def start(self):
        """Called once the driver has set the device up."""

    @property
    def finished(self):
        """True once a finite input has ended and all of it went through. Hardware never finishes."""
        return False

    def check(self):
        """Raise IxyError if the transport failed since (a peer gone, a disk full)."""

    def summary(self):
        """More about a run, as a dict for the apps' JSON; empty for hardware."""
        return {}


def parse_options(spec, text):
    """`a=1,b=2` as a dict; UsageError for anything else."""
    options = {}
    for part in text.split(",") if text else []:
        key, equals, value = part.partition("=")
        if not key or not equals or not value:
            raise UsageError(f"{spec}: {part!r}: expected KEY=VALUE, separated by commas")
        if key in options:
            raise UsageError(f"{spec}: {key} is given twice")
        options[key] = value
    return options
