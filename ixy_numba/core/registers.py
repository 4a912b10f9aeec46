"""Device registers as data, and checked, traceable access to them. Set-up code only: kernels touch memory directly."""

import time
from enum import Enum

from .errors import DeviceGoneError, IxyError, RegisterTimeout, UsageError

ALL_ONES = 0xFFFFFFFF


class Mode(Enum):
    """What an access does, in the datasheet's words."""

    RW = "read/write"
    RO = "read-only"
    WO = "write-only"
    RC = "clear on read"
    W1C = "write 1 to clear"
    RS = "set on read"  # semaphores


class Field(int):
    """The mask of a register field, as an integer; `of(v)` places a value, `get(word)` takes it out."""

    def __new__(cls, low, width):
        self = super().__new__(cls, ((1 << width) - 1) << low)
        self.low = low
        return self

    def of(self, value):
        if value << self.low & ~self or value < 0:
            raise UsageError(f"{value} does not fit the field with mask {int(self):#010x}")
        return value << self.low

    def get(self, word):
        return (word & self) >> self.low


def bit(number):
    return Field(number, 1)


def bits(high, low):
    return Field(low, high - low + 1)


class Register:
    """One 32-bit register, or `count` of them `stride` bytes apart (`RXDCTL[3]`), with its fields as attributes."""

    def __init__(self, offset, stride, count, mode, at, fields, name="?"):
        self.offset, self.stride, self.count, self.mode, self.at = offset, stride, count, mode, at
        self.fields, self.name = fields, name
        self.__dict__.update(fields)

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise UsageError(f"{self.name}[{index}]: expected an index from 0 to {self.count - 1}")
        offset = self.offset + index * self.stride
        return Register(offset, 0, 1, self.mode, self.at, self.fields, f"{self.name}[{index}]")

    def each(self):
        """The register itself, or every element of an array of them."""
        return [self] if self.count == 1 else [self[k] for k in range(self.count)]

    def show(self, value):
        """The value in words: `0x02000000 (ENABLE)`."""
        parts = []
        for name, mask in self.fields.items():
            part = mask.get(value)
            if part:
                parts.append(name if mask >> mask.low == 1 else f"{name}={part:#x}")
        return f"{value:#010x}" + (f" ({' '.join(parts)})" if parts else "")

    def __repr__(self):
        return f"<{self.name} at {self.offset:#x}, {self.mode.value}, {self.at}>"


def reg(offset, *, at, mode=Mode.RW, stride=4, count=1, **fields):
    """A register for a table: byte `offset` in the BAR, `at` = the datasheet's section, fields by `bit` and `bits`."""
    return Register(offset, stride, count, mode, at, fields)


def table(namespace):
    """Name every register in a module's namespace after its variable and return them as {name: Register}."""
    found = {name: value for name, value in namespace.items() if isinstance(value, Register)}
    for name, register in found.items():
        register.name = name
    return found


def lint(registers, bar_size):
    """What is wrong with a table: overlaps, misalignment, anything outside the BAR or a register. [] is a clean one."""
    faults, seen = [], {}
    for register in registers.values():
        for one in register.each():
            if one.offset % 4 or not 0 <= one.offset <= bar_size - 4:
                faults.append(f"{one.name} at {one.offset:#x} is unaligned or outside the BAR of {bar_size:#x} bytes")
            if one.offset in seen:
                faults.append(f"{one.name} and {seen[one.offset]} are both at {one.offset:#x}")
            seen[one.offset] = one.name
        taken = 0
        for name, mask in register.fields.items():
            if taken & mask:
                faults.append(f"{register.name}.{name} overlaps another field")
            if mask > ALL_ONES:
                faults.append(f"{register.name}.{name} has a bit beyond 31")
            taken |= mask
    return faults


class Registers:
    """Access to one device's registers.

    `read32(offset) -> int` and `write32(offset, value)` come from the bus. `trace`, if given, is called as
    `trace("R" or "W", register, value)` for every access, in order. `never_ones` is a register that cannot read all
    ones: where it does, the device is gone, and any read that comes back so is a DeviceGoneError.
    """

    def __init__(self, device, read32, write32, trace=None, never_ones=None):
        self.device, self._read32, self._write32, self.trace = device, read32, write32, trace
        self._never_ones = never_ones

    def read(self, register):
        _single(register)
        if register.mode is Mode.WO:
            raise UsageError(f"{self.device}: {register.name} is write-only")
        value = self._read32(register.offset)
        if self.trace:
            self.trace("R", register, value)
        if value == ALL_ONES and self._never_ones and self._read32(self._never_ones.offset) == ALL_ONES:
            raise DeviceGoneError(f"{self.device}: {register.name} and {self._never_ones.name} read all ones, the "
                                  "device is gone or its memory space is off")
        return value

    def write(self, register, value):
        _single(register)
        if register.mode in (Mode.RO, Mode.RC):
            raise UsageError(f"{self.device}: {register.name} is {register.mode.value}")
        if not 0 <= value <= ALL_ONES:
            raise UsageError(f"{self.device}: {register.name} takes 32 bits, got {value:#x}")
        if self.trace:
            self.trace("W", register, value)
        self._write32(register.offset, int(value))

    def set(self, register, mask):
        self.write(register, self.read(register) | mask)

    def clear(self, register, mask):
        self.write(register, self.read(register) & ~mask & ALL_ONES)

    def wait(self, register, mask, expected=None, *, timeout_s=1.0, hint=""):
        """Poll until `register & mask == expected` (default: all of `mask` set) and return the value read.

        RegisterTimeout after `timeout_s` seconds, or at once when the device answers all ones (it is gone).
        """
        expected = mask if expected is None else expected
        deadline = time.monotonic() + timeout_s
        while True:
            late = time.monotonic() >= deadline  # looked at before the read: a slow thread gets one more look
            value = self.read(register)
            if value & mask == expected and value != ALL_ONES:
                return value
            if value == ALL_ONES:
                hint = "all bits read 1, the device is gone or its memory space is off"
            if late or value == ALL_ONES:
                raise RegisterTimeout(
                    f"{self.device}: {register.name} is {register.show(value)}, expected {expected:#x} under mask "
                    f"{int(mask):#x} within {timeout_s} s{'; ' + hint if hint else ''}")
            time.sleep(0.0005)

    def dump(self, registers):
        """Lines `NAME[k]  offset  value (fields)` of all registers whose reading changes nothing."""
        lines = []
        for register in registers.values():
            if register.mode in (Mode.RC, Mode.WO, Mode.RS):
                continue
            for one in register.each():
                value = self.read(one)
                if value or register.count == 1:
                    lines.append(f"{one.name:<14} {one.offset:#07x}  {one.show(value)}")
        return lines


def _single(register):
    if register.count != 1:
        raise IxyError(f"{register.name} is {register.count} registers: name one, {register.name}[0]")
