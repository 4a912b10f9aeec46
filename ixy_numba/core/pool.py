"""Packet buffers: where they lie, who owns each, and handles that cannot outlive their packet.

A packet in an application's hands is one `uint64`, its handle:

    bits  0..31  the buffer's index in its pool
    bits 32..47  the frame's length in bytes
    bits 48..63  the buffer's generation; its low 4 bits are the pool's id

The pool's table has one word a buffer, so that one load serves both the descriptor and the check:

    bits  0..15  the generation
    bit  16      1 while the buffer is not the application's: free, or in a ring
    bits 17..63  the buffer's device address

A handle is good if it equals the low 17 bits, so there is none that is good while the buffer is in a ring or free, not
even a forged one. The generation moves on when the buffer leaves the application (sent or freed): a handle kept from
before, one freed twice, or one of another pool no longer matches, is counted in `bad_handles` and otherwise ignored.
"""

import itertools
from typing import NamedTuple

import numpy as np

from .errors import ClosedError, DmaError, UsageError
from .integers import wrapping_add, wrapping_sub
from .jit import PROTECTED, kernel
from .memory import ANY, DmaMemory, new_record

U = np.uint64
ZERO, ONE = U(0), U(1)
INDEX_MASK, LENGTH_SHIFT, LENGTH_MASK = U(0xFFFFFFFF), U(32), U(0xFFFF)
ADDRESS_SHIFT, GENERATION_SHIFT = U(17), U(48)
NEXT_GENERATION, KEPT = U(16), U(1 << 16)
OWNER_MASK = U(0x1FFFF)  # generation and KEPT
ADDRESS_LIMIT = 1 << 47

BUFFER_SIZE = 2048  # bytes a device may write to; with SRRCTL in steps of 1 KiB
HEADROOM = 128  # bytes in front of a packet, for the header that a virtio device puts before it
BUFFER_STRIDE = HEADROOM + BUFFER_SIZE  # no power of two: neighbouring packets do not fight for the same cache sets
TOO_LONG = U((0x10000 - BUFFER_SIZE) << 32)  # the bits of a length, where a handle has it, that is 2048 or more
MAX_BATCH = 256
GENERATIONS, LIFETIMES = "packet_use_after_free" in PROTECTED, "memory_use_after_free" in PROTECTED

_BUFFER = np.dtype([("headroom", "u8", (HEADROOM // 8,)), ("octets", "u1", (BUFFER_SIZE,))])
BATCH = np.dtype([("packet", "u8", (MAX_BATCH,))])
_ids = itertools.count(1)


class PoolView(NamedTuple):
    """What kernels see of a pool: `table` (free list, words) and `memory` (the bytes: `memory.buffer[i].octets`)."""

    table: np.record
    memory: np.record


class Pool:
    """`count` packet buffers in DMA memory, for one or more devices of one thread.

    A packet received on one device and sent on another that share the pool returns to it. `bus.map_dma` makes the
    memory reachable for a device; the address must come out the same for every device of the pool.
    A pool stays alive as long as a device uses it. A `transient` one closes itself when the last of its devices does.
    `needs`, `node` and `shared` are those of `DmaMemory`.
    Raises UsageError for a count outside 64..262144, DmaError where memory is short.
    """

    def __init__(self, count=4096, needs=ANY, transient=False, node=None, shared=False):
        if not 64 <= count <= 262144:
            raise UsageError(f"pool of {count} buffers: expected 64 to 262144")
        self.count, self.transient = count, transient
        self.memory = DmaMemory(count * BUFFER_STRIDE, needs, node, shared)
        layout = np.dtype([("buffer", _BUFFER, (count,))])
        buffers, _ = self.memory.take(layout)
        slots = 1 << (count - 1).bit_length()  # a power of two: an index under a mask needs no check
        table = new_record(np.dtype([
            ("top", "u8"),  # buffers free[0:top] are free
            ("bad_handles", "u8"), ("empty", "u8"),  # refused handles; batches that an empty pool ended early
            ("closed", "u8"),
            ("word", "u8", (slots,)), ("free", "u4", (slots,))]))
        self.id = next(_ids) % 16
        table.word = self.id | int(KEPT)
        self.view = PoolView(table, buffers)
        self._addresses = None

    def map(self, bus):
        """Make the buffers reachable for a device behind `bus`."""
        if self.memory.closed:
            raise ClosedError("this pool is closed; make another")
        addresses = bus.map_dma(self.memory)
        start, page = np.arange(self.count) * BUFFER_STRIDE + HEADROOM, self.memory.page_size
        first = addresses[start // page] + start % page
        if int(addresses.max()) >= ADDRESS_LIMIT:
            bus.unmap_dma(self.memory)
            raise DmaError(f"the device sees this pool at {int(addresses.max()):#x}: expected addresses below 2**47")
        if self._addresses is None:
            self._addresses = first
            self._fill(addresses, first)
        elif (self._addresses != first).any():
            bus.unmap_dma(self.memory)
            raise DmaError("the devices see this pool at different addresses; give each a pool of its own")
        self.memory.users += 1

    def unmap(self, bus):
        """Take the buffers from the device behind `bus` again."""
        bus.unmap_dma(self.memory)
        self.memory.users -= 1
        if self.transient and not self.memory.users:
            self.close()

    def _fill(self, addresses, first):
        """Every buffer that is contiguous for the device, with its headroom, becomes free, the lowest on top."""
        table = self.view.table
        page = self.memory.page_size
        start = np.arange(self.count) * BUFFER_STRIDE
        end = start + BUFFER_STRIDE - 1
        last = addresses[end // page] + end % page
        usable = np.flatnonzero(last - (addresses[start // page] + start % page) == BUFFER_STRIDE - 1)
        table.word[: self.count] |= first.astype(np.uint64) << ADDRESS_SHIFT
        table.free[: len(usable)] = usable[::-1]
        table.top = len(usable)
        self.usable = len(usable)

    def reserve(self, n):
        """Take `n` buffers out for good (a receive ring's): their indices, uint32. DmaError where fewer are free."""
        table = self.view.table
        if n > table.top:
            raise DmaError(f"a pool with {int(table.top)} free buffers of {self.count}: {n} needed; make a larger one")
        table.top -= np.uint64(n)
        return table.free[int(table.top) : int(table.top) + n].copy()

    def restore(self, indices):
        """Put buffers back that a closed device held."""
        table = self.view.table
        start = int(table.top)
        table.free[start : start + len(indices)] = indices
        table.top = start + len(indices)

    def batch(self):
        """An empty batch record, `batch.packet` of uint64, shape (256,), for the verbs."""
        return new_record(BATCH)

    @property
    def available(self):
        """How many buffers are free."""
        return int(self.view.table.top)

    def outstanding(self):
        """The buffers that the application holds, as indices: uint32. Not known in fast mode (UsageError)."""
        if not GENERATIONS:
            raise UsageError("without packet_use_after_free a pool does not know which buffers the application holds")
        return np.flatnonzero(self.view.table.word & KEPT == ZERO).astype(np.uint32)

    def recover(self):
        """Take back all that the application holds, as after a kernel that raised with packets in its batch.

        Returns how many; their handles are bad from then on. Call it while no kernel uses the pool.
        """
        indices, table = self.outstanding(), self.view.table
        table.word[indices] = table.word[indices] + NEXT_GENERATION | KEPT
        self.restore(indices)
        return len(indices)

    def close(self):
        """Give the memory back. UsageError while open devices use it; afterwards no handle of it is good any more."""
        self.memory.close()
        table = self.view.table
        table.closed, table.top, table.word = 1, 0, KEPT


# Handles are checked in one comparison: what must be 0 is collected first.


@kernel(inline=True)
def owns(pool, handle):
    """Whether `handle` is a packet of this pool that the application still holds. IXY_NUMBA_MODE=fast: always."""
    return _flaw(pool.table, handle) | handle & _beyond(pool.table) == ZERO


@kernel(inline=True)
def sendable(pool, handle):
    """Whether `handle` is a packet of this pool that the application still holds, and has 1 to 2048 bytes."""
    # Of the handle less one byte: a length of 0 borrows from the generation, and is far too long then.
    less = wrapping_sub(handle, ONE << LENGTH_SHIFT)
    return _flaw(pool.table, handle) | less & (_beyond(pool.table) | TOO_LONG) == ZERO


@kernel(inline=True)
def _flaw(table, handle):
    """0 if the application owns the buffer in this generation. Words beyond the last buffer's are KEPT for ever."""
    if GENERATIONS:
        return (word_of(table, handle) ^ handle >> GENERATION_SHIFT) & OWNER_MASK
    return ZERO


@kernel(inline=True)
def _beyond(table):
    """The bits of a handle's index that no buffer of this pool has."""
    if GENERATIONS:
        return INDEX_MASK & ~U(len(table.word) - 1)
    return ZERO


@kernel(inline=True)
def index_of(table, handle):
    """The index of the buffer of a handle that is the application's."""
    return handle & U(len(table.word) - 1)


@kernel(inline=True)
def word_of(table, index):
    """Address and generation of buffer `index`, one of the pool's own."""
    return table.word[index & U(len(table.word) - 1)]


@kernel(inline=True)
def take(table, top):
    """The free buffer under `top`, which is not 0. The caller lowers table.top by a checked subtraction when done."""
    return U(table.free[wrapping_sub(top, ONE) & U(len(table.free) - 1)])


@kernel(inline=True)
def leave(table, index):
    """The buffer leaves the application: every handle of it stops being valid. Returns its address for the device."""
    word = word_of(table, index)
    if GENERATIONS:  # the last generation carries into KEPT, which is 0, and the first one follows
        table.word[index & U(len(table.word) - 1)] = wrapping_add(word, NEXT_GENERATION) | KEPT
    return word >> ADDRESS_SHIFT


@kernel(inline=True)
def lend(table, index):
    """The buffer becomes the application's. Returns its generation, where a handle has it."""
    word = word_of(table, index)
    if GENERATIONS:
        table.word[index & U(len(table.word) - 1)] = word & ~KEPT
    return word << GENERATION_SHIFT


@kernel(inline=True)
def check_open(table):
    """ClosedError if the pool is closed. Once a batch: the handles of a closed pool are all bad as well."""
    if LIFETIMES and table.closed != ZERO:
        raise ClosedError("this pool is closed; make another")


@kernel
def alloc_batch(pool, batch, limit):
    """Take up to `limit` free buffers as empty packets (length 0): batch.packet[0:n]; returns n. The caller owns them.

    `pool` is a device's or a queue's `.pool`; at most 256. An empty pool gives fewer and counts it.
    """
    table = pool.table
    check_open(table)
    limit = min(U(limit), U(len(batch.packet)))
    n = min(limit, table.top)
    if n < limit:
        table.empty += ONE
    for k in range(n):
        index = take(table, table.top - k)
        batch.packet[k] = index | lend(table, index)
    table.top -= n
    return n


@kernel
def free_batch(pool, batch, first, end):
    """Give packets batch.packet[first:end] back to their pool; returns how many were valid. Others are counted."""
    table = pool.table
    check_open(table)
    top, size = table.top, U(len(batch.packet))
    for k in range(min(U(first), size), min(U(end), size)):
        handle = batch.packet[k]
        if owns(pool, handle):
            index = index_of(table, handle)
            leave(table, index)
            table.free[top] = index
            top += ONE
        else:
            table.bad_handles += ONE
    freed = top - table.top
    table.top = top
    return freed
