"""PCI network cards: what sysfs tells of one, and what its two transports share: configuration space, BARs, checks."""

import contextlib
import os
from abc import ABC, abstractmethod
from pathlib import Path

from ..core.errors import ClosedError, DeviceGoneError, IxyError, UsageError
from ..core.memory import detach, map_file
from . import Bus

# Names as in <linux/pci_regs.h>
PCI_VENDOR_ID, PCI_COMMAND, PCI_STATUS, PCI_CAPABILITY_LIST = 0x00, 0x04, 0x06, 0x34
PCI_COMMAND_IO, PCI_COMMAND_MEMORY, PCI_COMMAND_MASTER, PCI_COMMAND_INTX_DISABLE = 0x1, 0x2, 0x4, 0x400
PCI_STATUS_CAP_LIST, PCI_MSIX_FLAGS_ENABLE = 0x10, 0x8000
PCI_CAP_ID_MSI, PCI_CAP_ID_VNDR, PCI_CAP_ID_MSIX = 0x05, 0x09, 0x11

ETHERNET = 0x0200  # class and subclass
IORESOURCE_IO = 0x100  # <linux/ioport.h>: a BAR of ports
IFF_UP = 0x1
BARS = 6


class Function:
    """A PCI function as sysfs shows it. Looking changes nothing. `root` is where /sys, /proc and /dev are found."""

    def __init__(self, address, root="/"):
        self.root = Path(root)
        self.address = (address if address.count(":") == 2 else f"0000:{address}").lower()
        self.path = self.root / "sys/bus/pci/devices" / self.address
        if not self.path.exists():
            here = ", ".join(map(str, network_functions(root))) or "none"
            raise UsageError(f"{self.address}: there is no PCI device at this address; network cards here: {here}")

    def __str__(self):
        return f"{self.address} ({self.vendor:04x}:{self.device:04x}, {self.driver or 'no driver'})"

    def _number(self, name):
        return int((self.path / name).read_text(), 16)

    @property
    def vendor(self):
        return self._number("vendor")

    @property
    def device(self):
        return self._number("device")

    @property
    def pci_class(self):
        """Class and subclass, 16 bits."""
        return self._number("class") >> 8

    @property
    def driver(self):
        """The name of the kernel driver that it is bound to, or None."""
        return _link_name(self.path / "driver")

    @property
    def iommu_group(self):
        """The number of its group as a string, or None where no IOMMU is in use."""
        return _link_name(self.path / "iommu_group")

    @property
    def translated(self):
        """Whether an IOMMU lets no physical address of it through."""
        return self.iommu_group is not None and (self.path / "iommu_group/type").read_text().strip() != "identity"

    @property
    def numa_node(self):
        """The NUMA node that it is next to, or None where that means nothing."""
        try:
            node = int((self.path / "numa_node").read_text())
        except OSError:
            return None
        return node if node >= 0 else None

    @property
    def bars(self):
        """{index: (size in bytes, whether it is of I/O ports)}."""
        found = {}
        for index, line in enumerate((self.path / "resource").read_text().splitlines()[:BARS]):
            start, end, flags = (int(word, 16) for word in line.split())
            if flags:
                found[index] = end - start + 1, bool(flags & IORESOURCE_IO)
        return found

    @property
    def interfaces(self):
        """The names of its network interfaces in this network namespace."""
        return sorted(name for folder in self._net() for name in os.listdir(folder))

    def _net(self):
        return [*self.path.glob("net"), *self.path.glob("virtio*/net")]

    @property
    def use(self):
        """Why the kernel needs it now, in words, or None."""
        default = default_interfaces(self.root)
        for name in self.interfaces:
            if int((self.root / "sys/class/net" / name / "flags").read_text(), 16) & IFF_UP:
                return f"its interface {name} is up{' and holds the default route' * (name in default)}"
        if any(not os.listdir(folder) for folder in self._net()):
            return "its interface is in another network namespace"
        return None


def _link_name(path):
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None


def network_functions(root="/"):
    """Every Ethernet function of the machine, by address."""
    addresses = sorted(path.name for path in (Path(root) / "sys/bus/pci/devices").glob("*"))
    return [function for address in addresses if (function := Function(address, root)).pci_class == ETHERNET]


def default_interfaces(root="/"):
    """The interfaces that a default route goes through."""
    found = set()
    with contextlib.suppress(OSError):
        for line in (Path(root) / "proc/net/route").read_text().splitlines()[1:]:
            name, destination, *_, mask = line.split()[:8]
            if int(destination, 16) == int(mask, 16) == 0:
                found.add(name)
    with contextlib.suppress(OSError):
        for line in (Path(root) / "proc/net/ipv6_route").read_text().splitlines():
            destination, prefix, *_, name = line.split()
            if int(destination, 16) == int(prefix, 16) == 0:
                found.add(name)
    return found - {"lo"}


class Bar(ABC):
    """A BAR of `size` bytes. `array` is uint8, shape (size,), over registers in memory; None for what is not mapped."""

    array = None

    def __init__(self, name, size):
        self.name, self.size, self.closed = name, size, False

    def read(self, offset, width):
        """The register of `width` bytes (1, 2 or 4) at `offset`, a multiple of it."""
        self._check(offset, width)
        return self._read(offset, width)

    def write(self, offset, width, value):
        self._check(offset, width)
        self._write(offset, width, value)

    def _check(self, offset, width):
        if self.closed:
            raise ClosedError(f"{self.name} is closed; open it again")
        if width not in (1, 2, 4) or offset % width or not 0 <= offset <= self.size - width:
            raise IxyError(f"{self.name}: {width} bytes at {offset:#x} of a BAR of {self.size:#x}: expected 1, 2 or 4 "
                           "bytes, aligned and inside")

    @abstractmethod
    def _read(self, offset, width): ...

    @abstractmethod
    def _write(self, offset, width, value): ...

    def close(self):
        self.closed = True


class MappedBar(Bar):
    """A BAR of memory, mapped. After `close` arrays of it that are still held are plain memory."""

    def __init__(self, name, descriptor, start, size):
        super().__init__(name, size)
        self.array = map_file(descriptor, start, size)
        # Each access must be a single one of its width: many registers clear on read. CPython copies an element of a
        # memoryview by a copy of constant size, which is one instruction; NumPy says nothing about how it copies.
        self._words = {width: memoryview(self.array).cast(code) for width, code in ((1, "B"), (2, "H"), (4, "I"))}

    def _read(self, offset, width):
        return self._words[width][offset // width]

    def _write(self, offset, width, value):
        self._words[width][offset // width] = value

    def close(self):
        super().close()
        detach(self.array)
        self.array, self._words = None, {}


class FileBar(Bar):
    """A BAR behind a file, byte 0 at `start` of `descriptor`: I/O ports, or memory that cannot be mapped."""

    def __init__(self, name, descriptor, start, size):
        super().__init__(name, size)
        self.descriptor, self.start = descriptor, start

    def _read(self, offset, width):
        with _answers(self.name):
            return int.from_bytes(os.pread(self.descriptor, width, self.start + offset), "little")

    def _write(self, offset, width, value):
        with _answers(self.name):
            os.pwrite(self.descriptor, value.to_bytes(width, "little"), self.start + offset)


@contextlib.contextmanager
def _answers(name):
    """Where the kernel refuses an access, it has removed the device."""
    try:
        yield
    except OSError as error:
        raise DeviceGoneError(f"{name}: the device is gone ({error.strerror}); was it removed?") from None


class PciBus(Bus):
    """A network card on the PCI bus. `bar(index)`, `read_config` and `capabilities` are what other buses do not have.

    A subclass opens the device in `_open` and puts what undoes each step on `_undo`.
    """

    _taken = set()  # the addresses that this process has open

    def __init__(self, function):
        self.function, self.name = function, function.address
        self.vendor, self.device, self.numa_node = function.vendor, function.device, function.numa_node
        if function.pci_class != ETHERNET:
            raise UsageError(f"{self.name}: this is no network card: its class is {function.pci_class:#06x}, "
                             f"expected {ETHERNET:#06x}")
        if self.name in self._taken:
            raise UsageError(f"{self.name}: this program has opened this device already; name another")
        self._bars, self._config = {}, None  # (file descriptor, where the configuration space begins in it)
        with contextlib.ExitStack() as self._undo:
            self._taken.add(self.name)
            self._undo.callback(self._taken.discard, self.name)
            self._open()
            self._undo.callback(self._close_bars)
            self._undo = self._undo.pop_all()

    @abstractmethod
    def _open(self):
        """Take the device, reset it where that is possible and set `_config`; an IxyError undoes what was done."""

    @abstractmethod
    def _open_bar(self, index):
        """BAR `index` as a MappedBar or a FileBar; None if there is none."""

    # Configuration space

    def read_config(self, offset, width):
        """`width` bytes at `offset` of the configuration space, as an integer. DeviceGoneError if it is."""
        descriptor, start = self._check_open()._config
        with _answers(self.name):
            return int.from_bytes(os.pread(descriptor, width, start + offset), "little")

    def write_config(self, offset, width, value):
        descriptor, start = self._check_open()._config
        with _answers(self.name):
            os.pwrite(descriptor, value.to_bytes(width, "little"), start + offset)

    def _check_open(self):
        if self._config is None:
            raise ClosedError(f"{self.name} is closed; open it again")
        return self

    def capabilities(self, kind):
        """The offsets in configuration space of all capabilities of a `kind` (PCI_CAP_ID_…), in the list's order."""
        if not self.read_config(PCI_STATUS, 2) & PCI_STATUS_CAP_LIST:
            return []
        found, seen, at = [], set(), self.read_config(PCI_CAPABILITY_LIST, 1) & ~3
        while at and at not in seen:  # a broken device's list may be a ring
            seen.add(at)
            if self.read_config(at, 1) == kind:
                found.append(at)
            at = self.read_config(at + 1, 1) & ~3
        return found

    @property
    def msix_enabled(self):
        return any(self.read_config(at + 2, 2) & PCI_MSIX_FLAGS_ENABLE for at in self.capabilities(PCI_CAP_ID_MSIX))

    def _command(self, on, off=0):
        self.write_config(PCI_COMMAND, 2, self.read_config(PCI_COMMAND, 2) & ~off | on)

    def _enable(self):
        """Registers and DMA on. The legacy interrupt is off: nobody here would silence it, and it may be shared."""
        self.check()
        self._command(PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE)
        self._undo.callback(self.stop_dma)

    def stop_dma(self):
        with contextlib.suppress(IxyError):  # a device that is gone does no DMA
            self._command(0, off=PCI_COMMAND_MASTER)

    # BARs

    def bar(self, index):
        """BAR `index`: `size` in bytes, `read(offset, width)`, `write(offset, width, value)`, `array` (None for ports).

        IxyError if the device has none.
        """
        if index not in self._check_open()._bars:
            opened = self._open_bar(index)
            if opened is None:
                raise IxyError(f"{self.name}: BAR {index} is not there; does the firmware give the card its resources?")
            self._bars[index] = opened
        return self._bars[index]

    @property
    def bar0(self):
        return self.bar(0).array

    def read32(self, offset):
        return self.bar(0).read(offset, 4)

    def write32(self, offset, value):
        self.bar(0).write(offset, 4, value)

    def _close_bars(self):
        for bar in self._bars.values():
            bar.close()

    # The rest of the seam

    def check(self):
        if self.read_config(PCI_VENDOR_ID, 2) == 0xFFFF:
            raise DeviceGoneError(f"{self.name}: the device is gone (its configuration space reads all ones); was it "
                                  "removed, or its slot powered off?")

    def close(self):
        self._undo.close()
        self._config = None


def open_bus(address, unbind=False, root="/"):
    """The bus for the card at `address`: VFIO if it is bound to vfio-pci, sysfs otherwise.

    With `unbind` it is taken from its kernel driver, unless an interface of it is up.
    UsageError if there is no network card at the address, IxyError if it cannot be had.
    """
    from .sysfs import SysfsBus  # both build on this module
    from .vfio import VfioBus

    function = Function(address, root)
    return VfioBus(function) if function.driver == "vfio-pci" else SysfsBus(function, unbind)
