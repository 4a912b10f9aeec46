"""Virtio devices on the PCI bus (virtio 1.1: 4.1): modern ones, and legacy ones as they were before version 1."""

import time
from abc import abstractmethod

from ...bus.pci import PCI_CAP_ID_VNDR
from ...bus.virtio import Notifier, VirtioTransport
from ...core.errors import DeviceGoneError, IxyError
from . import regs as r

RESET_TIMEOUT_S, CONFIG_TRIES = 1.0, 100
PAGE_SHIFT = 12  # legacy: the queue's address in pages of 4096 bytes, 4.1.5.1.3.1


class Window:
    """Registers in a part of a BAR; a register is its (offset, width) in the window."""

    def __init__(self, bar, start=0):
        self.bar, self.start = bar, start

    def read(self, register):
        offset, width = register
        return self.bar.read(self.start + offset, width)

    def write(self, register, value):
        offset, width = register
        if width == 8:  # 4.1.3.1: as two of 4 bytes
            self.write((offset, 4), value & 0xFFFFFFFF)
            self.write((offset + 4, 4), value >> 32)
        else:
            self.bar.write(self.start + offset, width, value)


class PciTransport(VirtioTransport):
    """What both kinds share. Opening resets the device and says that there is a driver (3.1.1)."""

    has_control_queue = True
    registers: Window
    STATUS: tuple

    def __init__(self, bus):
        self.bus, self._notifiers = bus, {}
        self._locate()
        self._reset()
        self._add_status(r.ACKNOWLEDGE)
        self._add_status(r.DRIVER)

    @abstractmethod
    def _locate(self):
        """Find the registers."""

    def _status(self):
        """The device's status. Raises where the device is gone, or says that it has met an error."""
        status = self.registers.read(self.STATUS)
        if status == 0xFF:
            raise DeviceGoneError(f"{self.bus.name}: the device is gone: its status reads all ones; was it removed?")
        if status & r.NEEDS_RESET:
            raise IxyError(f"{self.bus.name}: the device has met an error and stands still (status {status:#x}); was "
                           "it given an address that it cannot reach? dmesg may tell more")
        return status

    def _add_status(self, bit):
        self.registers.write(self.STATUS, self._status() | bit)

    def _reset(self):
        self.registers.write(self.STATUS, 0)
        deadline = time.monotonic() + RESET_TIMEOUT_S
        while status := self.registers.read(self.STATUS):  # 4.1.4.3.2: wait until it reads 0
            if status == 0xFF:
                self._status()
            if time.monotonic() >= deadline:
                raise IxyError(f"{self.bus.name}: status still {status:#x} {RESET_TIMEOUT_S:g} s after a reset")
            time.sleep(0.0005)

    @property
    def connected(self):
        return True

    @property
    def max_queue_pairs(self):
        if not self.offered_features() & r.MQ:
            return 1
        return int.from_bytes(self.read_config(r.CONFIG_MAX_PAIRS, 2), "little")

    def _set_vector(self, register, number, vector):
        """Lead the selected queue to an interrupt vector, 4.1.5.1.2; without one it stays at none."""
        if vector is not None:
            self.registers.write(register, vector)
            if self.registers.read(register) != vector:
                raise IxyError(f"{self.bus.name}: the device has no interrupt vector {vector} for queue {number}; do "
                               "without interrupts")

    def start(self):
        self._add_status(r.DRIVER_OK)
        for notifier in self._notifiers.values():  # there may be buffers already
            notifier.notify()

    def stop(self):
        try:
            self._reset()
        except IxyError as error:
            return [error]
        return []

    def check(self):
        status = self._status()
        if not status & r.DRIVER_OK:
            raise DeviceGoneError(f"{self.bus.name}: the device is gone, or somebody has reset it: its status reads "
                                  f"{status:#x}")


class Modern(PciTransport):
    """4.1.4: registers where vendor capabilities say, queues where the driver wants them."""

    STATUS = r.DEVICE_STATUS

    def _locate(self):
        found = dict(reversed(list(virtio_capabilities(self.bus))))  # of two of a kind the first one counts, 4.1.4.1
        missing = [name for name, kind in r.CAPABILITIES.items() if kind not in found]
        if missing:
            raise IxyError(f"{self.bus.name}: a virtio device without the capabilities {', '.join(missing)}; is it one "
                           "of version 1?")
        self.registers = self._window(found[r.COMMON], r.COMMON_SIZE)
        self._config = self._window(found[r.DEVICE], 0)
        self._notify, self._notify_length = self._window(found[r.NOTIFY], 2), found[r.NOTIFY].length
        self._multiplier = self.bus.read_config(found[r.NOTIFY].at + 16, 4)

    def _window(self, capability, needed):
        bar = self.bus.bar(capability.bar)
        if capability.length < needed or capability.start + capability.length > bar.size:
            raise IxyError(f"{self.bus.name}: BAR {capability.bar} has {bar.size:#x} bytes, registers of "
                           f"{capability.length:#x} at {capability.start:#x} do not fit or are too few")
        return Window(bar, capability.start)

    def offered_features(self):
        words = []
        for half in range(2):
            self.registers.write(r.DEVICE_FEATURE_SELECT, half)
            words.append(self.registers.read(r.DEVICE_FEATURE))
        return words[0] | words[1] << 32

    def accept_features(self, features):
        features |= self.offered_features() & r.ACCESS_PLATFORM  # addresses are what the bus gave, IOMMU or not
        for half in range(2):
            self.registers.write(r.DRIVER_FEATURE_SELECT, half)
            self.registers.write(r.DRIVER_FEATURE, features >> 32 * half & 0xFFFFFFFF)
        self._add_status(r.FEATURES_OK)
        if not self._status() & r.FEATURES_OK:
            raise IxyError(f"{self.bus.name}: the device refuses the features {features:#x}")

    def read_config(self, offset, size):
        for _ in range(CONFIG_TRIES):  # 2.4.1: again, if it changed meanwhile
            before = self.registers.read(r.CONFIG_GENERATION)
            data = bytes(self._config.read((offset + k, 1)) for k in range(size))
            if self.registers.read(r.CONFIG_GENERATION) == before:
                return data
        raise IxyError(f"{self.bus.name}: the device's configuration does not come to rest")

    def queue_size(self, number, wanted):
        self.registers.write(r.QUEUE_SELECT, number)
        size = self.registers.read(r.QUEUE_SIZE)
        if not size:
            raise IxyError(f"{self.bus.name}: the device has no queue {number}")
        return min(wanted, size)

    def set_queue(self, number, addresses, vector=None):
        write = self.registers.write
        write(r.QUEUE_SELECT, number)
        write(r.QUEUE_SIZE, addresses.size)
        write(r.QUEUE_DESC, addresses.desc)
        write(r.QUEUE_DRIVER, addresses.avail)
        write(r.QUEUE_DEVICE, addresses.used)
        self._set_vector(r.QUEUE_VECTOR, number, vector)
        at = self.registers.read(r.QUEUE_NOTIFY_OFF) * self._multiplier
        if at + 2 > self._notify_length:
            raise IxyError(f"{self.bus.name}: queue {number} is notified at {at:#x}, outside of the registers for that")
        write(r.QUEUE_ENABLE, 1)
        self._notifiers[number] = _notifier(self._notify.bar, self._notify.start + at, number)
        return self._notifiers[number]


class Legacy(PciTransport):
    """4.1.4.8: registers in BAR 0, of I/O ports; queues of the device's size, in the layout of 2.6.2."""

    STATUS = r.LEGACY_STATUS

    def _locate(self):
        self.registers = Window(self.bus.bar(0))
        if self.registers.bar.size < r.LEGACY_SIZE:
            raise IxyError(f"{self.bus.name}: BAR 0 has {self.registers.bar.size:#x} bytes, expected at least "
                           f"{r.LEGACY_SIZE:#x}; is it a virtio network device?")

    def offered_features(self):
        return self.registers.read(r.LEGACY_DEVICE_FEATURES)

    def accept_features(self, features):
        self.registers.write(r.LEGACY_DRIVER_FEATURES, features)

    def read_config(self, offset, size):
        start = r.LEGACY_SIZE + 4 * self.bus.msix_enabled  # behind the vectors' registers, if there are any
        return bytes(self.registers.read((start + offset + k, 1)) for k in range(size))

    def queue_size(self, number, wanted):
        self.registers.write(r.LEGACY_QUEUE_SELECT, number)
        size = self.registers.read(r.LEGACY_QUEUE_SIZE)
        if not size:
            raise IxyError(f"{self.bus.name}: the device has no queue {number}")
        return size

    def set_queue(self, number, addresses, vector=None):
        if addresses.desc >> PAGE_SHIFT > 0xFFFFFFFF or addresses.desc & (1 << PAGE_SHIFT) - 1:
            raise IxyError(f"{self.bus.name}: a queue at {addresses.desc:#x}: expected a page below 16 TiB")
        self.registers.write(r.LEGACY_QUEUE_SELECT, number)
        self.registers.write(r.LEGACY_QUEUE_PAGE, addresses.desc >> PAGE_SHIFT)
        self._set_vector(r.LEGACY_QUEUE_VECTOR, number, vector)
        self._notifiers[number] = _notifier(self.registers.bar, r.LEGACY_QUEUE_NOTIFY, number)
        return self._notifiers[number]


class Capability:
    """A virtio capability (4.1.4): the part of BAR `bar` that it describes. `at` is its own place."""

    def __init__(self, bus, at):
        self.at, self.bar = at, bus.read_config(at + 4, 1)
        self.start, self.length = bus.read_config(at + 8, 4), bus.read_config(at + 12, 4)


def virtio_capabilities(bus):
    """(kind, Capability) of all that point into a BAR that exists in principle."""
    for at in bus.capabilities(PCI_CAP_ID_VNDR):
        kind, capability = bus.read_config(at + 3, 1), Capability(bus, at)
        if capability.bar < 6:
            yield kind, capability


def _notifier(bar, offset, number):
    """A write of the queue's number, 2 bytes, to a register."""
    if bar.array is not None:
        return Notifier(word=number, width=2, register=bar.array[offset : offset + 2])
    return Notifier(bar.descriptor, number, 2, bar.start + offset)


def transport(bus):
    """The transport of the virtio device on the PCI bus `bus`: modern where the device can be."""
    modern = any(kind == r.COMMON for kind, _ in virtio_capabilities(bus))
    return (Modern if modern or bus.device != r.TRANSITIONAL else Legacy)(bus)
