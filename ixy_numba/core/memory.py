"""DMA memory: what the device reads and writes while the kernels do, as NumPy views over one mapping."""

import collections
import contextlib
import ctypes
import mmap
import weakref

import numpy as np

from .errors import ClosedError, DmaError, UsageError
from .thread import stop_kernels

PAGE, HUGE_PAGE = mmap.PAGESIZE, 2 << 20
ANY, LOCKED, HUGE = "any pages", "locked pages", "2 MiB huge pages"  # what a bus needs, weakest first

_MAP_HUGETLB, _MAP_HUGE_2MB = 0x40000, 21 << 26
_libc = ctypes.CDLL(None, use_errno=True)
# Addresses as the device sees them: never equal to virtual ones, so that a mix-up faults at once; below 2**39, as far
# as the narrowest IOMMUs reach. No two regions share one, so that one pool can be mapped for several devices; a closed
# region's is used again as late as possible, so that a device that still writes there is found out.
IOVA_LIMIT, LARGEST = 1 << 39, 1 << 30
_iovas = collections.deque(range(4 << 30, IOVA_LIMIT, LARGEST))


class DmaMemory:
    """`size` bytes (rounded up to whole pages) that a device may reach once its bus has mapped them.

    `needs` says what the device asks of the pages: HUGE (physically contiguous, 2 MiB), LOCKED, or ANY (a software
    device). Huge pages are taken where there are any; the rest is ordinary memory, locked when allowed.
    Attributes: `array` (uint8, shape (size,)), `iova` (the device's address of byte 0), `page_size`.
    Raises DmaError where the need cannot be met. The memory is private to the process: however it ends, the kernel
    takes the pages back.
    """

    def __init__(self, size, needs=ANY):
        if size <= 0:
            raise UsageError(f"DMA memory of {size} bytes: expected at least 1")
        if size > LARGEST:
            raise DmaError(f"DMA memory of {size} bytes: expected at most 1 GiB a region")
        self._map, used, self.page_size = _map(size, needs)
        self.size = len(used)
        if not _iovas:
            raise DmaError("DMA memory: all 508 regions are in use; close the devices and pools that are not needed")
        self.iova = _iovas.popleft()
        self._give_back = weakref.finalize(self, _iovas.append, self.iova)
        self.array = used
        self.users = 0  # devices that it is mapped for
        self._taken = 0

    @property
    def virtual_address(self):
        return self._open().ctypes.data

    @property
    def closed(self):
        return self.array is None

    def take(self, dtype, align=64):
        """The next free part of the memory as one record of `dtype`; returns (record, iova of its first byte)."""
        start = -(-self._taken // align) * align
        if start + dtype.itemsize > self.size:
            raise DmaError(f"DMA memory: {dtype.itemsize} bytes asked for, {max(self.size - start, 0)} left")
        self._taken = start + dtype.itemsize
        return record(self._open()[start : self._taken], dtype), self.iova + start

    def close(self, timeout_s=60.0):
        """Give the memory back, once the kernels that run on it in a KernelThread have been stopped.

        Views that are still held keep the addresses mapped and read zeros: nothing unmapped can be touched.
        UsageError while devices use it; IxyError, and nothing is given back, if a kernel runs on.
        """
        if self.closed:
            return
        if self.users:
            raise UsageError(f"this memory is in use by {self.users} open device(s); close them first")
        start = self.virtual_address
        stop_kernels(lambda record: start <= address_of(record) < start + self.size, timeout_s)
        self.array = None
        self._give_back()
        try:
            self._map.close()
        except BufferError:  # somebody holds a view: keep the addresses, drop the pages
            _libc.munlock(*_extent(np.frombuffer(self._map, np.uint8)))
            with contextlib.suppress(OSError):  # huge pages before Linux 5.18: they go with the last view
                self._map.madvise(mmap.MADV_DONTNEED)

    def _open(self):
        if self.closed:
            raise ClosedError("this DMA memory is closed; open the device again")
        return self.array


def record(array, dtype):
    """A uint8 array of exactly `dtype.itemsize` bytes as one record, whose fields read and write that memory."""
    return array.view(np.dtype((np.record, dtype)))[0]


def address_of(record):
    """Where a record lies."""
    return record.__array_interface__["data"][0]


def new_record(dtype):
    """A zeroed record in ordinary memory, aligned to a cache line."""
    raw = np.zeros(dtype.itemsize + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return record(raw[start : start + dtype.itemsize], dtype)


def _map(size, needs):
    """(mapping, the part of it to use as uint8, page size): huge pages first, then what `needs` leaves."""
    rounded = -(-size // HUGE_PAGE) * HUGE_PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    try:
        memory = mmap.mmap(-1, rounded, flags=flags | _MAP_HUGETLB | _MAP_HUGE_2MB)
        return memory, np.frombuffer(memory, np.uint8), HUGE_PAGE
    except OSError:
        if needs == HUGE:
            pages = rounded // HUGE_PAGE
            raise DmaError(f"DMA memory: {pages} free huge pages of 2 MiB needed, fewer are there; set them up: "
                           f"echo {pages + 64} > /proc/sys/vm/nr_hugepages (as root)") from None
    size = -(-size // PAGE) * PAGE
    slack = HUGE_PAGE if size >= HUGE_PAGE else 0  # addresses, not memory: to begin where a huge page can
    try:
        memory = mmap.mmap(-1, size + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DmaError(f"DMA memory of {size} bytes: {error.strerror}; free some memory or ask for less") from None
    used = np.frombuffer(memory, np.uint8)
    if slack:
        start = -used.ctypes.data % HUGE_PAGE
        used = used[start : start + size]
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer TLB misses where the kernel has such pages to give
    if _libc.mlock(*_extent(used)) and needs == LOCKED:
        raise DmaError(f"DMA memory: cannot lock {size} bytes; raise the limit (ulimit -l) or set up huge pages")
    return memory, used, PAGE


def _extent(array):
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(len(array))
