"""A PCI card through sysfs, as root and without an IOMMU: BARs are files, DMA goes to physical addresses."""

import contextlib
import fcntl
import mmap
import os

import numpy as np

from ..core.errors import DmaError, IxyError
from ..core.memory import HUGE
from .pci import FileBar, MappedBar, PciBus

# /proc/self/pagemap: a word of 64 bits a page (Documentation/admin-guide/mm/pagemap.rst)
PRESENT, FRAME = np.uint64(1 << 63), np.uint64((1 << 55) - 1)


class SysfsBus(PciBus):
    """A card that no kernel driver holds, or that is taken from it with `unbind`."""

    memory_needs = HUGE

    def __init__(self, function, unbind=False):
        self._unbind, self._taken_from = unbind, None
        try:
            super().__init__(function)
        except BaseException:
            self.give_back()
            raise

    def _open(self):
        self._check_use()
        if self.function.translated:
            raise IxyError(f"{self.name}: it is behind an IOMMU, which lets no physical address through; bind it to "
                           "vfio-pci")
        config = self._file("config")
        try:
            fcntl.flock(config, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError:
            raise IxyError(f"{self.name}: another process drives this device; stop that first") from None
        self._config = config, 0
        driver = self.function.driver
        if driver:
            self._write("driver/unbind", self.name)
            self._taken_from = driver
        self.stop_dma()  # of a process that was killed
        if (self.function.path / "reset").exists():
            with contextlib.suppress(IxyError):  # the driver resets the device as well
                self._write("reset", "1")
        self._enable()

    def give_back(self):
        """To the driver that it was taken from."""
        if self._taken_from:
            with contextlib.suppress(OSError):  # the driver is not there any more, or does not want it
                (self.function.root / "sys/bus/pci/drivers" / self._taken_from / "bind").write_text(self.name)

    def _check_use(self):
        driver, use = self.function.driver, self.function.use
        if use:
            raise IxyError(f"{self.name}: in use by the kernel ({driver}): {use}; set it down first, or choose another")
        if driver and not self._unbind:
            raise IxyError(f"{self.name}: it belongs to the kernel's driver {driver}; let go of it with --unbind "
                           "(unbind=True), or bind it to vfio-pci")

    def _file(self, name):
        try:
            descriptor = os.open(self.function.path / name, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            raise IxyError(f"{self.name}: no access to {self.function.path / name}; run as root, or bind the device to "
                           "vfio-pci and use it without") from None
        except OSError as error:
            raise IxyError(f"{self.name}: {self.function.path / name}: {error.strerror}") from None
        self._undo.callback(os.close, descriptor)
        return descriptor

    def _write(self, name, text):
        try:
            (self.function.path / name).write_text(text)
        except OSError as error:
            raise IxyError(f"{self.name}: {self.function.path / name}: {error.strerror}") from None

    def _open_bar(self, index):
        size, ports = self.function.bars.get(index, (0, False))
        if not size:
            return None
        descriptor = self._file(f"resource{index}")
        try:
            return (FileBar if ports else MappedBar)(self.name, descriptor, 0, size)
        except OSError as error:
            raise IxyError(f"{self.name}: BAR {index} of {size:#x} bytes cannot be mapped: {error.strerror}; is the "
                           "kernel locked down (secure boot)? then use vfio-pci") from None

    def map_dma(self, memory):
        """The device reaches all memory; see `Bus.map_dma`."""
        return physical_addresses(memory.array, memory.page_size, self.function.root / "proc/self/pagemap")

    def unmap_dma(self, memory):
        pass


def physical_addresses(array, page_size, pagemap="/proc/self/pagemap"):
    """Where each page of `array` (uint8, page-aligned) lies in the machine: uint64, shape (pages,). DmaError if hidden.

    Pages next to each other are in general not so in the machine; a huge page is contiguous in itself.
    """
    first = array.ctypes.data
    with open(pagemap, "rb", buffering=0) as file:
        words = [os.pread(file.fileno(), 8, (first + start) // mmap.PAGESIZE * 8)
                 for start in range(0, len(array), page_size)]
    entries = np.frombuffer(b"".join(words), "<u8")
    if len(entries) != len(words) or not (entries & PRESENT).all():
        raise DmaError("DMA memory: a page is not in the machine's memory; set up huge pages")
    frames = entries & FRAME
    if not frames.all():
        raise DmaError("DMA memory: the kernel hides physical addresses; run as root (CAP_SYS_ADMIN), or bind the "
                       "device to vfio-pci")
    return frames * np.uint64(mmap.PAGESIZE)
