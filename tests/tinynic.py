"""The least of an 82599 that the driver comes up on: registers that answer, descriptors worked off when a test says so.

It finds its rings through its registers and memory through what was mapped for it, so that a wrong address, an unmapped
buffer or a forgotten doorbell fails the test.
"""

import time
from types import SimpleNamespace
from unittest import mock

import numpy as np

from ixy_numba.bus import Bus
from ixy_numba.core.memory import ANY
from ixy_numba.core.pool import INDEX_MASK
from ixy_numba.device import _attach
from ixy_numba.drivers.ixgbe import setup

DD, EOP, SENT = 1, 2, 1 << 32
DATA_DESCRIPTOR = 0x23300000  # DEXT, IFCS, EOP, DTYP data
RS = 1 << 27
IN_ORDER = np.arange


class TinyNic(Bus):
    """`order(n)` says where the n pages of mapped memory lie for the device; `answers` fixes what registers read."""

    vendor, device, simulated, memory_needs = 0x8086, 0x10FB, True, ANY

    def __init__(self, name="tiny", order=IN_ORDER, answers=None):
        self.name, self.order = name, order
        self.bar0 = np.zeros(0x20000, np.uint8)
        self.words = self.bar0.view(np.uint32)
        # CTRL out of reset, RDRXCTL.DMAIDONE, LINKS up at 10 Gbit/s, EEC.AUTO_RD
        self.answers = {0x00000: 0, 0x02F00: 8, 0x042A4: 0x70000000, 0x10010: 0x300, **(answers or {})}
        self.pages, self.closed = {}, False

    def read32(self, offset):
        return self.answers.get(offset, int(self.words[offset // 4]))

    def write32(self, offset, value):
        self.words[offset // 4] = value

    def map_dma(self, memory):
        where = memory.iova + self.order(memory.size // memory.page_size) * memory.page_size
        for k, page in enumerate(where):
            for part in range(0, memory.page_size, 4096):
                self.pages[(int(page) + part) >> 12] = (memory, k * memory.page_size + part)
        return where.astype(np.uint64)

    def unmap_dma(self, memory):
        self.pages = {page: found for page, found in self.pages.items() if found[0] is not memory}

    def close(self):
        self.closed = True

    def dma(self, bus_addr, length):
        """The `length` bytes at a device address, as a view."""
        memory, start = self.pages[bus_addr >> 12]
        for page in range(bus_addr >> 12, (bus_addr + length - 1 >> 12) + 1):
            assert self.pages[page] == (memory, start + (page - (bus_addr >> 12)) * 4096), "not contiguous"
        start += bus_addr % 4096
        return memory.array[start : start + length]

    def _queue(self, block, queue):
        """(register words, ring as uint64 of shape (size, 2), head, tail)."""
        words = self.words[(block + 0x40 * queue) // 4 :]
        ring = self.dma(int(words[0]) | int(words[1]) << 32, int(words[2])).view(np.uint64).reshape(-1, 2)
        return words, ring, int(words[4]), int(words[6])

    def receive(self, frame, done=None, queue=0):
        """A frame from the wire into the next descriptor, with `done` as its write-back; False when there is none."""
        words, ring, head, tail = self._queue(0x1000, queue)
        if head == tail:
            return False
        assert ring[head, 1] == 0, "a descriptor handed over with its old status"
        self.dma(int(ring[head, 0]), 2048)[: len(frame)] = np.frombuffer(frame, np.uint8)
        ring[head, 1] = DD | EOP | len(frame) << 32 if done is None else done
        words[4] = (head + 1) % len(ring)
        return True

    def send(self, limit=1 << 20, queue=0):
        """Put up to `limit` frames of the transmit ring on the wire; returns them."""
        words, ring, head, tail = self._queue(0x6000, queue)
        sent = []
        while head != tail and len(sent) < limit:
            command = int(ring[head, 1])
            length = command & 0xFFFF
            assert command & 0xFFFF0000 & ~RS == DATA_DESCRIPTOR and command >> 46 == length
            sent.append(self.dma(int(ring[head, 0]), length).tobytes())
            ring[head, 1] = SENT if command & RS else 0
            head = (head + 1) % len(ring)
        words[4] = head
        return sent


def attach(pool, ring_size=64, queues=1, **more):
    """A device on a new TinyNic: (device, nic)."""
    nic = TinyNic(**more)
    with mock.patch.object(setup, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)):
        return _attach(nic, queues, ring_size, pool if isinstance(pool, list) else [pool]), nic


def account(pool, devices, held=()):
    """Every buffer is in exactly one place: free, in a ring, or one of the handles `held` by the application."""
    table = pool.view.table
    places = [table.free[: int(table.top)], np.array([int(h) & 0xFFFFFFFF for h in held], np.uint32)]
    for device in devices:
        for rxq, txq in zip(device.rx, device.tx, strict=True):
            clean, tail, size = int(txq.state.clean), int(txq.state.tail), len(txq.ring.desc)
            places.append(rxq.state.held & INDEX_MASK)
            places.append(txq.state.held[np.arange(clean, tail + size * (tail < clean)) % size])
    found = np.concatenate(places)
    assert len(found) == len(np.unique(found)) == pool.usable
