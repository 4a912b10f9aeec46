"""A virtio network card on a PCI bus of this process: registers that answer as the specification says, both kinds.

Its data path is `virtio_peer.Side`. Registers are spelled out again, by offset.
"""

import ctypes
import os
import struct
import threading

import numpy as np
from virtio_peer import ANY_LAYOUT, MAC, MRG_RXBUF, STATUS, VERSION_1, Side

from ixy_numba.bus.pci import Bar, PciBus
from ixy_numba.core.memory import ANY
from ixy_numba.core.pool import U

CTRL_VQ, CTRL_RX, CTRL_MAC_ADDR, ACCESS_PLATFORM = 1 << 17, 1 << 18, 1 << 23, 1 << 33
CONTROL = CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR
ADDRESS = bytes.fromhex("525400123456")
COMMON, NOTIFY, ISR, DEVICE = 1, 2, 3, 4
MULTIPLIER = 4

# offset: (width, name)
LEGACY = {0: (4, "offered"), 4: (4, "accepted"), 8: (4, "page"), 12: (2, "size"), 14: (2, "select"), 16: (2, "kick"),
          18: (1, "status"), 19: (1, "isr"), 22: (2, "vector")}
MODERN = {0: (4, "offered_half"), 4: (4, "offered"), 8: (4, "accepted_half"), 12: (4, "accepted"), 18: (2, "queues"),
          20: (1, "status"), 21: (1, "generation"), 22: (2, "select"), 24: (2, "size"), 26: (2, "vector"),
          28: (2, "enable"), 30: (2, "notify_off"),
          **{32 + 4 * k: (4, ("desc", "avail", "used")[k // 2] + "_high" * (k % 2)) for k in range(6)}}


class Answered(Bar):
    """A BAR whose registers the card answers: `table` at 0, its configuration from byte `config` on."""

    def __init__(self, card, table, config, size):
        super().__init__("card", size)
        self.card, self.table, self.config = card, table, config
        # What kernels store or write goes past the card, as a doorbell does
        self.descriptor, self.start = os.memfd_create("card"), 0
        os.ftruncate(self.descriptor, size)

    def _read(self, offset, width):
        if self.card.gone:
            return (1 << 8 * width) - 1
        if offset >= self.config and (width == 1 or offset not in self.table):  # vectors' registers may be there
            assert width == 1
            return self.card.config_byte(offset - self.config)
        assert self.table[offset][0] == width
        return self.card.get(self.table[offset][1])

    def _write(self, offset, width, value):
        assert self.table[offset][0] == width and 0 <= value < 1 << 8 * width
        self.card.put(self.table[offset][1], value)


class Doorbells(Bar):
    """A BAR in memory."""

    def __init__(self, size):
        super().__init__("card", size)
        self.array = np.zeros(size, np.uint8)

    def _read(self, offset, width): ...

    def _write(self, offset, width, value): ...


class Card(PciBus, Side):
    """`legacy` or modern. What goes wrong is an attribute that a test sets; `log` has what was written, in order."""

    vendor, memory_needs, numa_node, msix_enabled = 0x1AF4, ANY, None, False

    def __init__(self, legacy=False, offered=None, pairs=1, sizes=256):
        Side.__init__(self)
        self.name, self.legacy, self.pairs, self.sizes = "card", legacy, pairs, sizes
        self.device = 0x1000 if legacy else 0x1041
        self.offered = offered or MAC | STATUS | MRG_RXBUF | CONTROL | (
            ANY_LAYOUT if legacy else VERSION_1 | ACCESS_PLATFORM)
        self.accepted, self.status, self.select, self.log, self.registers = 0, 0xF, 0, [], {}
        self.gone = self.stuck = self.refuses_features = self.restless = self.no_vectors = False
        self.generation = 0
        self.commands, self.answer, self._stop = [], 0, threading.Event()
        self.capability_list = [(COMMON, 4, 0x100, 0x100), (NOTIFY, 2, 0x40, 0x100), (ISR, 4, 0x300, 4),
                                (DEVICE, 4, 0x400, 0x40), (COMMON, 7, 0, 0x100), (COMMON, 5, 0, 0x100)]
        config = 20 if legacy else 0x400
        table = LEGACY if legacy else {0x100 + offset: entry for offset, entry in MODERN.items()}
        registers = Answered(self, table, config, 0x40 if legacy else 0x1000)
        self._bars = {0 if legacy else 4: registers, 2: Doorbells(0x200)}
        self._thread = None

    # The bus

    def _open(self): ...

    def _open_bar(self, index): ...

    def bar(self, index):
        return self._bars[index]

    def capabilities(self, kind):
        assert kind == 9
        return [] if self.legacy else [0x40 + 20 * k for k in range(len(self.capability_list))]

    def read_config(self, offset, width):
        k, field = divmod(offset - 0x40, 20)
        kind, bar, start, length = self.capability_list[k]
        return {3: kind, 4: bar, 8: start, 12: length, 16: MULTIPLIER}[field]

    def map_dma(self, memory):
        self.region(memory.iova, memory.size, memory.virtual_address)
        return memory.iova + np.arange(memory.size // memory.page_size, dtype=np.uint64) * U(memory.page_size)

    def unmap_dma(self, memory): ...

    def stop_dma(self): ...

    def check(self):
        raise AssertionError("the driver asks the card itself")

    def close(self):
        self._stop.set()
        if self._thread:
            self._thread.join()
        for bar in self._bars.values():
            if isinstance(bar, Answered):
                os.close(bar.descriptor)

    # The card

    def config_byte(self, offset):
        if self.msix_enabled and self.legacy:
            offset -= 4  # behind the vectors' registers
        content = ADDRESS + struct.pack("<HH", 1, self.pairs)
        self.generation += self.restless
        return content[offset]

    def get(self, name):
        if name == "offered":
            half = self.registers.get("offered_half", 0)
            return self.offered >> 32 * half & 0xFFFFFFFF
        if name == "size":
            count = 2 * self.pairs + bool(self.offered & CTRL_VQ)
            return self.registers.get(("size", self.select), self.sizes) if self.select < count else 0
        if name == "notify_off":
            return self.select
        if name == "vector":
            return 0xFFFF if self.no_vectors else self.registers[name, self.select]
        return {"status": self.status, "generation": self.generation & 0xFF}[name]

    def put(self, name, value):
        self.log.append((name, value))
        if name == "status":
            if value == 0:
                self.accepted = 0
                self.queues.clear()
            refused = 8 if self.refuses_features else 0
            self.status = self.status if self.stuck else value & ~refused
        elif name == "accepted":
            half = self.registers.get("accepted_half", 0)
            self.accepted |= value << 32 * half
        elif name == "select":
            self.select = value
        elif name == "page":
            size, desc = self.sizes, value << 12
            avail = desc + 16 * size
            self._enable(desc, avail, -(-(avail + 6 + 2 * size) // 4096) * 4096, size)
        elif name == "enable":
            at = [self.registers[name, self.select] | self.registers[name + "_high", self.select] << 32
                  for name in ("desc", "avail", "used")]
            self._enable(*at, self.get("size"))
        elif name in ("offered_half", "accepted_half"):
            self.registers[name] = value
        else:
            self.registers[name, self.select] = value

    def _enable(self, desc, avail, used, size):
        header = 12 if self.accepted & (VERSION_1 | MRG_RXBUF) else 10
        self.set(self.select, desc=self.local(desc), avail=self.local(avail), used=self.local(used), slots=size,
                 header=header, mergeable=bool(self.accepted & MRG_RXBUF))
        control = 2 * (self.pairs if self.accepted & 1 << 22 else 1)
        if self.select == control and not self._thread:
            self._thread = threading.Thread(target=self._serve_control, args=(control,), daemon=True)
            self._thread.start()

    def _serve_control(self, number):
        while not self._stop.wait(0.0005):
            if self.answer is None or number not in self.queues or not self.status & 4:
                continue
            taken, = self.take(number, 1)
            if taken == 0xFFFFFFFF:
                continue
            parts = []
            for _ in range(3):
                at = int(self.queues[number].desc) + 16 * taken
                address, length, flags, taken = struct.unpack("<QIHH", ctypes.string_at(at, 16))
                parts.append((self.bytes(address, length), flags))
            assert [flags for _, flags in parts] == [1, 1, 2]
            head, data, answer = (part for part, _ in parts)
            self.commands.append((tuple(head.tolist()), data.tobytes()))
            answer[0] = self.answer
            self.use(0, 1, number)

    def kicks(self, number):
        """Whether queue `number` was notified since the last look."""
        if self.legacy:
            bar = self._bars[0]
            word = int.from_bytes(os.pread(bar.descriptor, 2, 16), "little")
            os.pwrite(bar.descriptor, b"\xff\xff", 16)
            return word == number
        register = self._bars[2].array[0x40 + MULTIPLIER * number :][:2].view("<u2")
        word, register[0] = int(register[0]), 0xFFFF
        return word == number

    def bytes_of_flags(self, number):
        """The used ring's flags of a queue, where the device says that it needs no notification."""
        return np.frombuffer((ctypes.c_uint16 * 1).from_address(int(self.queues[number].used)), np.uint16)
