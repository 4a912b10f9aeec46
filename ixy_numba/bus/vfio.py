"""A PCI card through VFIO: behind the IOMMU, without root, with interrupts. Names as in <linux/vfio.h>."""

import contextlib
import errno
import fcntl
import os
import struct
import threading

import numpy as np

from ..core.errors import DmaError, IxyError
from ..core.memory import PINNED
from .pci import FileBar, MappedBar, PciBus


def _request(number):
    return ord(";") << 8 | 100 + number  # _IO(VFIO_TYPE, VFIO_BASE + number)


VFIO_GET_API_VERSION, VFIO_CHECK_EXTENSION, VFIO_SET_IOMMU = map(_request, (0, 1, 2))
VFIO_GROUP_GET_STATUS, VFIO_GROUP_SET_CONTAINER, VFIO_GROUP_GET_DEVICE_FD = map(_request, (3, 4, 6))
VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_REGION_INFO, VFIO_DEVICE_GET_IRQ_INFO = map(_request, (7, 8, 9))
VFIO_DEVICE_SET_IRQS, VFIO_DEVICE_RESET = map(_request, (10, 11))
VFIO_IOMMU_GET_INFO, VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA = map(_request, (12, 13, 14))

VFIO_API_VERSION, VFIO_TYPE1v2_IOMMU, VFIO_GROUP_FLAGS_VIABLE, VFIO_DEVICE_FLAGS_RESET = 0, 3, 1, 1
VFIO_REGION_INFO_FLAG_MMAP, VFIO_PCI_CONFIG_REGION_INDEX = 4, 7
VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX = 1, 2
VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER = 1, 4, 32
VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE = 1, 2
VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 2, 1

FEWER_INTERRUPTS = "use fewer queues, or do without interrupts"


def ask(descriptor, request, layout, *values):
    """A request whose structure is its own size (`argsz`) and then `values`; returns them as the kernel left them.

    OSError also if it comes to more than 0: VFIO_DEVICE_SET_IRQS so says how many vectors there are, and sets none up.
    """
    layout = f"=I{layout}"
    buffer = bytearray(struct.pack(layout, struct.calcsize(layout), *values))
    available = fcntl.ioctl(descriptor, request, buffer, True)
    if available:
        raise OSError(errno.ENOSPC, f"there are only {available}")
    return struct.unpack(layout, buffer)[1:]


class Container:
    """One address space behind the IOMMU, for all devices of this process that can share it.

    So memory that two devices share is mapped once and lies at one address for both. A group of devices that the IOMMU
    cannot tell apart is opened once and counted.
    """

    _all, _lock = [], threading.RLock()

    def __init__(self, descriptor):
        self.descriptor, self._groups, self._mapped = descriptor, {}, {}

    @classmethod
    def of(cls, function):
        """(container, group's file descriptor) of a function; `release` gives both back."""
        number = function.iommu_group
        with cls._lock:
            for container in cls._all:
                if number in container._groups:
                    container._groups[number][1] += 1
                    return container, container._groups[number][0]
            group = _open_group(function)
            try:
                container = cls._join(function, group)
            except BaseException:
                os.close(group)
                raise
            container._groups[number] = [group, 1]
            return container, group

    @classmethod
    def _join(cls, function, group):
        for container in cls._all:
            with contextlib.suppress(OSError):  # another kind of IOMMU: not in this address space
                fcntl.ioctl(group, VFIO_GROUP_SET_CONTAINER, struct.pack("i", container.descriptor))
                return container
        container = cls(_open_node(function, "vfio"))
        try:
            version = fcntl.ioctl(container.descriptor, VFIO_GET_API_VERSION)
            if version != VFIO_API_VERSION or not fcntl.ioctl(
                    container.descriptor, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU):
                raise IxyError(f"{function.address}: this kernel's VFIO (version {version}) has no IOMMU of type 1 v2")
            try:
                fcntl.ioctl(group, VFIO_GROUP_SET_CONTAINER, struct.pack("i", container.descriptor))
                fcntl.ioctl(container.descriptor, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU)
            except OSError as error:
                raise IxyError(f"{function.address}: the IOMMU cannot be had: {error.strerror}; dmesg may say why "
                               "(no interrupt remapping?)") from None
        except BaseException:
            os.close(container.descriptor)
            raise
        cls._all.append(container)
        return container

    def release(self, number):
        with self._lock:
            group = self._groups[number]
            group[1] -= 1
            if not group[1]:
                os.close(group[0])
                del self._groups[number]
            if not self._groups:
                os.close(self.descriptor)
                self._all.remove(self)

    def map(self, memory):
        """Let the devices reach `memory` at its `iova`."""
        with self._lock:
            if memory.iova not in self._mapped:
                self._check_range(memory)
                try:
                    ask(self.descriptor, VFIO_IOMMU_MAP_DMA, "IQQQ", VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
                        memory.virtual_address, memory.iova, memory.size)
                except OSError as error:
                    raise DmaError(f"DMA memory: {memory.size} bytes cannot be mapped: {error.strerror}" + (
                        "; raise the limit of locked memory (ulimit -l)" * (error.errno == errno.ENOMEM))) from None
            self._mapped[memory.iova] = self._mapped.get(memory.iova, 0) + 1

    def unmap(self, memory):
        with self._lock:
            if memory.iova not in self._mapped:  # mapping it had failed
                return
            self._mapped[memory.iova] -= 1
            if not self._mapped[memory.iova]:
                del self._mapped[memory.iova]
                ask(self.descriptor, VFIO_IOMMU_UNMAP_DMA, "IQQ", 0, memory.iova, memory.size)

    def _check_range(self, memory):
        ranges = self.iova_ranges()
        if ranges and not any(first <= memory.iova and memory.iova + memory.size - 1 <= last for first, last in ranges):
            raise DmaError(f"DMA memory: the IOMMU does not reach {memory.iova:#x}, only "
                           f"{', '.join(f'{first:#x} to {last:#x}' for first, last in ranges)}")

    def iova_ranges(self):
        """[(first, last)] of the device addresses that may be mapped; empty where the kernel does not tell."""
        info = bytearray(4096)  # the structure and behind it its capabilities, each with the offset of the next
        struct.pack_into("=I", info, 0, len(info))
        fcntl.ioctl(self.descriptor, VFIO_IOMMU_GET_INFO, info, True)
        _, flags, _, at = struct.unpack_from("=IIQI", info)
        while flags & VFIO_IOMMU_INFO_CAPS and at:
            kind, _, following = struct.unpack_from("=HHI", info, at)
            if kind == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                count, = struct.unpack_from("=I", info, at + 8)
                return [struct.unpack_from("=QQ", info, at + 16 + 16 * k) for k in range(count)]
            at = following
        return []


def _open_node(function, name):
    path = function.root / "dev/vfio" / name
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        why = "is not there; load the module vfio-pci"
    except PermissionError:
        why = f"may not be opened; as root: chown {os.geteuid()} {path}"
    except OSError as error:
        why = "is used by another process; stop that first" if error.errno == errno.EBUSY else error.strerror
    raise IxyError(f"{function.address}: {path} {why}")


def _open_group(function):
    number = function.iommu_group
    if number is None or (function.root / "dev/vfio" / f"noiommu-{number}").exists():
        raise IxyError(f"{function.address}: it is bound to vfio-pci, but there is no IOMMU; turn it on "
                       "(intel_iommu=on, and in the firmware), or unbind it from vfio-pci and run as root")
    group = _open_node(function, number)
    if not ask(group, VFIO_GROUP_GET_STATUS, "I", 0)[0] & VFIO_GROUP_FLAGS_VIABLE:
        os.close(group)
        members = (function.root / "sys/kernel/iommu_groups" / number / "devices").glob("*")
        others = ", ".join(sorted(path.name for path in members if path.name != function.address))
        raise IxyError(f"{function.address}: its IOMMU group {number} is not viable: the kernel drives others of it; "
                       f"bind these to vfio-pci as well, or unbind them: {others}")
    return group


class VfioBus(PciBus):
    """A card that is bound to vfio-pci."""

    memory_needs = PINNED

    def _open(self):
        self._events = []
        group = self.function.iommu_group
        self.container, group_descriptor = Container.of(self.function)
        self._undo.callback(self.container.release, group)
        try:
            name = bytearray(self.name.encode() + b"\0")
            self._device = fcntl.ioctl(group_descriptor, VFIO_GROUP_GET_DEVICE_FD, name, True)
        except OSError as error:
            raise IxyError(f"{self.name}: the device cannot be had: {error.strerror}; dmesg may say why") from None
        self._undo.callback(os.close, self._device)
        flags, *_ = ask(self._device, VFIO_DEVICE_GET_INFO, "IIII", 0, 0, 0, 0)
        if flags & VFIO_DEVICE_FLAGS_RESET:
            with contextlib.suppress(OSError):  # it was done when the device was opened; the driver resets it as well
                fcntl.ioctl(self._device, VFIO_DEVICE_RESET)
        self._config = self._device, self._region(VFIO_PCI_CONFIG_REGION_INDEX)[2]
        self._enable()
        self._undo.callback(self.disable_interrupts)

    def _region(self, index):
        """(flags, size, offset in the device's file) of a region."""
        flags, _, _, size, start = ask(self._device, VFIO_DEVICE_GET_REGION_INFO, "IIIQQ", 0, index, 0, 0, 0)
        return flags, size, start

    def _open_bar(self, index):
        flags, size, start = self._region(index)
        if not size:
            return None
        if flags & VFIO_REGION_INFO_FLAG_MMAP:
            with contextlib.suppress(OSError):  # only parts may be mapped
                return MappedBar(self.name, self._device, start, size)
        return FileBar(self.name, self._device, start, size)

    def map_dma(self, memory):
        self.container.map(memory)
        return np.arange(memory.iova, memory.iova + memory.size, memory.page_size, dtype=np.uint64)

    def unmap_dma(self, memory):
        self.container.unmap(memory)

    # Interrupts

    def enable_interrupts(self, vectors):
        available = {kind: ask(self._device, VFIO_DEVICE_GET_IRQ_INFO, "III", 0, kind, 0)[2]
                     for kind in (VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX)}
        if vectors > max(available.values()):
            raise IxyError(f"{self.name}: {vectors} interrupts: expected at most {max(available.values())}; "
                           f"{FEWER_INTERRUPTS}")
        self.disable_interrupts()
        self._irq = next(kind for kind, count in available.items() if count >= vectors)
        self._events = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(vectors)]
        try:
            self._set_interrupts(self._events)
        except OSError as error:
            raise IxyError(f"{self.name}: {vectors} interrupts cannot be set up: {error.strerror}; "
                           f"{FEWER_INTERRUPTS}") from None
        return self._events

    def disable_interrupts(self):
        if self._events:
            with contextlib.suppress(OSError):  # the device is gone
                self._set_interrupts([])
            for event in self._events:
                os.close(event)
            self._events = []

    def _set_interrupts(self, events):
        """The vectors raise `events`; none at all switches them off."""
        flags = VFIO_IRQ_SET_ACTION_TRIGGER | (VFIO_IRQ_SET_DATA_EVENTFD if events else VFIO_IRQ_SET_DATA_NONE)
        ask(self._device, VFIO_DEVICE_SET_IRQS, f"IIII{len(events)}i", flags, self._irq, 0, len(events), *events)
