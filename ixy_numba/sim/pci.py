"""The simulated 82599 as a PCI function: configuration space, regions, function-level reset, bus mastering."""

import struct

from ..drivers.ixgbe import regs as r

CONFIG_SIZE, VECTORS = 4096, 64
BAR2_SIZE, BAR4_SIZE = 32, 0x4000
PENDING_BITS = 0x2000  # offset in BAR 4; the MSI-X table is at its start
COMMAND, STATUS = 0x04, 0x06
PM, MSI, MSIX, PCIE = 0x40, 0x50, 0x70, 0xA0  # section 9.3: the capabilities, in this order
DEVICE_CONTROL = PCIE + 8
BUS_MASTER, INTX_DISABLE, INTERRUPT_STATUS, FUNCTION_RESET = 1 << 2, 1 << 10, 1 << 3, 1 << 15
PREFETCHABLE_64, IO = 0xC, 0x1  # types of BARs

# What configuration space holds at first: (offset, struct format, values)
_CONTENTS = (
    (0x00, "<HHHH", (0x8086, 0, 0, 0x0010)),  # vendor, device (filled in), command, status: has capabilities
    (0x08, "<BBBB", (0x01, 0x00, 0x00, 0x02)),  # revision, class: Ethernet
    (0x10, "<IIIIII", (PREFETCHABLE_64, 0, IO, 0, PREFETCHABLE_64, 0)),
    (0x2C, "<HH", (0x8086, 0x0003)),  # subsystem
    (0x34, "<B", (PM,)), (0x3C, "<BB", (0xFF, 1)),  # first capability; interrupt line, pin INTA
    (PM, "<BBHH", (0x01, MSI, 0x4823, 0x2008)),
    (MSI, "<BBH", (0x05, MSIX, 0x0180)),  # one vector, 64-bit address, maskable
    (MSIX, "<BBHII", (0x11, PCIE, VECTORS - 1, 4, PENDING_BITS | 4)),
    (PCIE, "<BBHIHHIHH", (0x10, 0, 0x0002, 0x10008CC2, 0x2810, 0, 0x00000082, 0, 0x0082)),  # with reset; x8, 5 GT/s
    (PCIE + 0x24, "<I", (0x1F,)),  # completion timeout ranges
    (0x100, "<I", (0x0001 | 1 << 16 | 0x140 << 20,)),  # advanced error reporting
    (0x140, "<III", (0x0003 | 1 << 16, 0xFF000001, 0x001B21FF)),  # serial number
)
# The bits that a write changes; all others keep their value
_WRITABLE = (
    (COMMAND, "<H", (0x0547,)), (0x0C, "<B", (0xFF,)), (0x3C, "<B", (0xFF,)),
    (0x10, "<IIIIII", (~(r.BAR_SIZE - 1) & 0xFFFFFFFF, 0xFFFFFFFF, ~(BAR2_SIZE - 1) & 0xFFFFFFFF, 0,
                       ~(BAR4_SIZE - 1) & 0xFFFFFFFF, 0xFFFFFFFF)),
    (PM + 4, "<H", (0x1F03,)), (MSI + 2, "<HIIII", (0x0001, 0xFFFFFFFC, 0xFFFFFFFF, 0xFFFF, 0x1)),
    (MSIX + 2, "<H", (0xC000,)), (DEVICE_CONTROL, "<H", (0x78FF,)), (PCIE + 0x10, "<H", (0x01FB,)),
    (PCIE + 0x28, "<H", (0x001F,)), (0x108, "<I", (0xFFFFFFFF,)), (0x10C, "<I", (0xFFFFFFFF,)),
)


class PciFunction:
    """`model` behind PCI: `read` and `write` of its configuration space, BARs 0, 2 and 4. Resets as a function does."""

    def __init__(self, model, device):
        self.model, self._device = model, device
        self.config, self._writable = bytearray(CONFIG_SIZE), bytearray(CONFIG_SIZE)
        _fill(self._writable, _WRITABLE)
        self._table, self._io_address = bytearray(BAR4_SIZE), 0
        self.reset()

    def reset(self):
        """Function-level reset: configuration and registers as after power-up; DMA and messages are off."""
        self.config[:] = bytes(CONFIG_SIZE)
        _fill(self.config, _CONTENTS)
        struct.pack_into("<H", self.config, 2, self._device)
        self._table[:] = bytes(BAR4_SIZE)
        self._io_address = 0
        with self.model.held():
            self.model.set_mastering(False)
            self.model.reset()

    @property
    def mastering(self):
        return bool(self._command & BUS_MASTER)

    @property
    def pin_enabled(self):
        return not self._command & INTX_DISABLE

    @property
    def _command(self):
        return int.from_bytes(self.config[COMMAND : COMMAND + 2], "little")

    def read_config(self, offset, count):
        pin = INTERRUPT_STATUS if self.model.interrupts.pin else 0  # whether or not INTX_DISABLE holds it back
        self.config[STATUS] = self.config[STATUS] & ~INTERRUPT_STATUS | pin
        return bytes(self.config[offset : offset + count])

    def write_config(self, offset, data):
        for k, byte in enumerate(data, offset):
            self.config[k] = self.config[k] & ~self._writable[k] | byte & self._writable[k]
        control = DEVICE_CONTROL + 1
        if offset <= control < offset + len(data) and data[control - offset] << 8 & FUNCTION_RESET:
            self.reset()
        with self.model.held():
            self.model.set_mastering(self.mastering)
            self.model.interrupts.drive(self.model.interrupts.pin)  # INTX_DISABLE may have held it back so far

    def read_bar0(self, offset, count):
        """Any bytes, out of whole registers: reading a part of one has all the effects of reading it."""
        first, end = offset & ~3, offset + count + 3 & ~3
        data = b"".join(self.model.read(k).to_bytes(4, "little") for k in range(first, end, 4))
        return data[offset - first : offset - first + count]

    def write_bar0(self, offset, data):
        """Whole registers; what the hardware does with parts of one is undefined, here they are ignored."""
        for k in range(-offset % 4, len(data) - 3, 4):
            self.model.write(offset + k, int.from_bytes(data[k : k + 4], "little"))

    def read_bar2(self, offset, count):
        """IOADDR and IODATA: a window onto one register at a time."""
        registers = bytearray(BAR2_SIZE)
        registers[:4] = self._io_address.to_bytes(4, "little")
        if offset < 8 and offset + count > 4 and self._io_address + 4 <= r.BAR_SIZE and self._io_address % 4 == 0:
            registers[4:8] = self.model.read(self._io_address).to_bytes(4, "little")
        return bytes(registers[offset : offset + count])

    def write_bar2(self, offset, data):
        if len(data) != 4:
            return
        value = int.from_bytes(data, "little")
        if offset == 0:
            self._io_address = value
        elif offset == 4 and self._io_address + 4 <= r.BAR_SIZE and self._io_address % 4 == 0:
            self.model.write(self._io_address, value)

    def read_bar4(self, offset, count):
        return bytes(self._table[offset : offset + count])

    def write_bar4(self, offset, data):
        self._table[offset : offset + len(data)] = data


def _fill(target, entries):
    for offset, layout, values in entries:
        struct.pack_into(layout, target, offset, *values)
