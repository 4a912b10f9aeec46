"""What a test of a hostile device needs, whatever its rings: guarded memory, canaries, random numbers, an audit."""

import contextlib
import ctypes
import mmap
from unittest import mock

import numpy as np

from ixy_numba.core import memory, pool
from ixy_numba.core.jit import kernel
from ixy_numba.core.memory import PAGE, record
from ixy_numba.core.pool import INDEX_MASK, U

GUARD = 32 * PAGE  # on either side of a region: no access at all, further than a 16-bit offset reaches
CANARY = 0xCA
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


class Canaries:
    """Bytes that nobody may write to."""

    def __init__(self):
        self._parts = []

    def add(self, part):
        part[...] = CANARY
        self._parts.append(part)

    def damaged(self):
        """How many bytes are no longer what they were."""
        return sum(int(np.count_nonzero(part != CANARY)) for part in self._parts)


def _guarded(size):
    """(mapping, `size` bytes of it in whole pages) between pages that cannot be touched."""
    size = -(-size // PAGE) * PAGE
    mapping = mmap.mmap(-1, size + 2 * GUARD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(mapping, np.uint8)
    for start in (0, GUARD + size):
        address = ctypes.c_void_p(whole.ctypes.data + start)
        if _libc.mprotect(address, ctypes.c_size_t(GUARD), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    return mapping, whole[GUARD : GUARD + size]


@contextlib.contextmanager
def guarded_memory(*drivers):
    """All DMA memory and all private records made inside lie between untouchable pages; yields Canaries around them.

    `drivers` are the modules that make records of their own (`new_record`).
    """
    canaries = Canaries()

    def map_memory(size, *_):
        mapping, used = _guarded(size)
        return mapping, used, PAGE, None

    def new_record(dtype):
        _, whole = _guarded(dtype.itemsize + 63)
        start = (len(whole) - dtype.itemsize) // 64 * 64  # as close to the upper guard as a cache line allows
        canaries.add(whole[:start])
        canaries.add(whole[start + dtype.itemsize :])
        return record(whole[start : start + dtype.itemsize], dtype)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(memory, "_map", map_memory))
        for module in (pool, *drivers):
            stack.enter_context(mock.patch.object(module, "new_record", new_record))
        yield canaries


def audit(pool, devices):
    """How many buffers are in exactly one place: free, in a receive ring, or on their way out."""
    table = pool.view.table
    if table.top > pool.usable:
        return -1
    places = [table.free[: int(table.top)]]
    for device in devices:
        for rxq, txq in zip(device.rx, device.tx, strict=True):
            clean, tail, size = int(txq.state.clean), int(txq.state.tail), len(txq.ring.desc)
            sending = np.arange(clean, clean + (tail - clean) % size) % size
            places += [rxq.state.held & INDEX_MASK, txq.state.held[sending]]
    found = np.concatenate(places)
    return len(np.unique(found)) if len(found) == pool.usable else -len(found)


@kernel(inline=True)
def draw(foe):
    """64 random bits; foe.random is never 0."""
    x = foe.random
    x ^= x << U(13)
    x ^= x >> U(7)
    x ^= x << U(17)
    foe.random = x
    return x
