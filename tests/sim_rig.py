"""A simulated 82599 set up by hand: registers, rings and buffers in mapped memory, stepped explicitly. No driver."""

import numpy as np

from ixy_numba.core.memory import DmaMemory
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.sim import open_bus

DD, EOP, RXE = 1, 2, 1 << 29
TX_EOP, TX_IFCS, TX_RS, TX_DEXT, TX_DATA, TX_CONTEXT = 1 << 24, 1 << 25, 1 << 27, 1 << 29, 3 << 20, 2 << 20
TX_WHOLE = TX_EOP | TX_IFCS | TX_DEXT | TX_DATA
ENABLE = 1 << 25
MAC = bytes.fromhex("020000000001")
PEER = bytes.fromhex("020000000002")
BUFFER = 2048


def frame(length=60, target=MAC, kind=b"\x88\xb5", fill=None):
    """An Ethernet frame of `length` bytes whose payload counts up (or is `fill`)."""
    payload = bytes(k % 251 for k in range(length)) if fill is None else bytes([fill]) * length
    return (target + PEER + kind + payload)[:length]


class Rig:
    """`sim:{text}` in manual mode with `queues` receive and transmit rings of `n` descriptors, all enabled.

    Receive buffer k of queue q is `self.buffer(q, k)`; transmit data is laid down by `send`.
    """

    def __init__(self, text="", n=64, queues=1, buffer_kib=2, enable=True, fctrl=0x700, mac=True):
        if mac and "mac=" not in text:
            text += f"{',' if text else ''}mac={MAC.hex(':')}"
        self.bus = open_bus(f"sim:{text}", text, manual=True)
        self.model, self.n, self.queues = self.bus.model, n, queues
        self.rings = DmaMemory(2 * queues * n * 16)
        self.rx_data = DmaMemory(queues * n * BUFFER)
        self.tx_data = DmaMemory(1 << 20)
        self.free_tx = 0
        self.tails, self.tx_tail = [0] * queues, [0] * queues
        for memory in (self.rings, self.rx_data, self.tx_data):
            self.bus.map_dma(memory)
        descriptors = self.rings.array[: 2 * queues * n * 16].view("<u8").reshape(2, queues, n, 2)
        self.rx, self.tx = descriptors
        self.write(r.FCTRL, fctrl)
        self.write(r.RXCTRL, 1)
        self.write(r.DMATXCTL, 1)
        for q in range(queues):
            self.write(r.SRRCTL[q], buffer_kib | 1 << 25)
            self.ring(q, r.RDBAL, r.RDBAH, r.RDLEN, 0)
            self.ring(q, r.TDBAL, r.TDBAH, r.TDLEN, queues)
            for k in range(n):
                self.rx[q, k] = self.rx_data.iova + (q * n + k) * BUFFER, 0
            if enable:
                self.write(r.RXDCTL[q], ENABLE)
                self.write(r.TXDCTL[q], ENABLE)
                self.give(q, n - 1)

    def ring(self, q, low, high, length, first):
        iova = self.rings.iova + (first + q) * self.n * 16
        self.write(low[q], iova & 0xFFFFFFFF)
        self.write(high[q], iova >> 32)
        self.write(length[q], self.n * 16)

    def read(self, register):
        return self.bus.read32(register.offset)

    def write(self, register, value):
        self.bus.write32(register.offset, int(value))

    def step(self, frames=64, elapsed_us=0):
        return self.bus.step(frames, elapsed_us)

    def run(self, frames=64):
        """Step until nothing moves any more."""
        for _ in range(1000):
            if not self.step(frames):
                return
        raise AssertionError("the device does not come to rest")

    # receive

    def give(self, q, count):
        """Hand `count` more descriptors to the device."""
        for k in range(count):
            index = (self.tails[q] + k) % self.n
            self.rx[q, index] = self.rx_data.iova + (q * self.n + index) * BUFFER, 0
        self.tails[q] = (self.tails[q] + count) % self.n
        self.write(r.RDT[q], self.tails[q])

    def buffer(self, q, k):
        start = (q * self.n + k % self.n) * BUFFER
        return self.rx_data.array[start : start + BUFFER]

    def status(self, q, k):
        """(status and error bits, length) of a receive descriptor."""
        word = int(self.rx[q, k % self.n, 1])
        return word & 0xFFFFFFFF, word >> 32 & 0xFFFF

    def received(self, q=0, first=0):
        """The whole frames in the ring from descriptor `first` on, as bytes."""
        frames, parts = [], []
        for k in range(first, first + self.n - 1):  # one descriptor is never the device's
            status, length = self.status(q, k)
            if not status & DD:
                break
            parts.append(self.buffer(q, k)[:length].tobytes())
            if status & EOP:
                frames.append(b"".join(parts))
                parts = []
        assert not parts, "a frame without an end"
        return frames

    def take(self, q=0, first=0):
        """The frames from descriptor `first` on, and their descriptors given back."""
        frames = self.received(q, first)
        self.give(q, len(frames))
        return frames

    # transmit

    def put(self, data):
        """Bytes into memory that the device can read; returns their device address."""
        start = self.free_tx
        self.free_tx = (start + len(data) + 63) // 64 * 64
        self.tx_data.array[start : start + len(data)] = np.frombuffer(data, np.uint8)
        return self.tx_data.iova + start

    def queue_tx(self, address, command, q=0):
        """One raw descriptor at the tail; the device sees it only after `doorbell`."""
        tail = self.tx_tail[q]
        self.tx[q, tail] = address, command
        self.tx_tail[q] = (tail + 1) % self.n
        return tail

    def doorbell(self, q=0):
        """Store the tail as kernels do, past the register behaviour."""
        self.bus.bar0.view("<u4")[r.TDT[q].offset // 4] = self.tx_tail[q]

    def send(self, data, q=0, command=TX_WHOLE | TX_RS):
        """Queue a frame in one descriptor and ring the doorbell; returns the descriptor's index."""
        index = self.queue_tx(self.put(data), command | len(data) | len(data) << 46, q)
        self.doorbell(q)
        return index

    def sent(self, index, q=0):
        """Whether the device reported the transmit descriptor as done."""
        return bool(int(self.tx[q, index, 1]) >> 32 & DD)

    def wire(self, name):
        return self.bus.summary()[name]

    def close(self):
        self.bus.close()
        for memory in (self.rings, self.rx_data, self.tx_data):
            memory.close()
