"""DMA memory: what the device reads and writes while the kernels do, as NumPy views over one mapping."""

import collections
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import weakref

import numpy as np

from .errors import ClosedError, DmaError, UsageError
from .thread import stop_kernels

PAGE, HUGE_PAGE, GIANT_PAGE = mmap.PAGESIZE, 2 << 20, 1 << 30
# What a bus needs, weakest first: PINNED are pages that the bus itself keeps where they are, as VFIO does.
ANY, PINNED, HUGE = "any pages", "pages that the bus pins", "huge pages"

_MAP_HUGETLB, _MAP_HUGE_2MB, _MAP_HUGE_1GB, _MAP_FIXED = 0x40000, 21 << 26, 30 << 26, 0x10
_MADV_POPULATE_WRITE, _MPOL_PREFERRED = 23, 1
_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers; the C library has no function for it
_MAP_FAILED, _READ_WRITE = ctypes.c_void_p(-1).value, mmap.PROT_READ | mmap.PROT_WRITE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
# Addresses as the device sees them: never equal to virtual ones, so that a mix-up faults at once; below 2**39, as far
# as the narrowest IOMMUs reach. No two regions share one, so that one pool can be mapped for several devices; a closed
# region's is used again as late as possible, so that a device that still writes there is found out.
IOVA_LIMIT, LARGEST = 1 << 39, 1 << 30
_iovas = collections.deque(range(4 << 30, IOVA_LIMIT, LARGEST))


def strongest(needs):
    """What satisfies all of `needs`."""
    return max(needs, key=(ANY, PINNED, HUGE).index)


class DmaMemory:
    """`size` bytes (rounded up to whole pages) that a device may reach once its bus has mapped them.

    `needs` says what the bus asks of the pages: HUGE (each physically contiguous), PINNED, or ANY (a software
    device). Huge pages are taken where there are any; the rest is ordinary memory, locked when allowed.
    `node` is the NUMA node that the device is next to; its memory is preferred.
    With `shared`, another process can be the device: it maps the file `fd`, where the memory begins at `fd_offset`.
    Attributes: `array` (uint8, shape (size,)), `iova` (the device's address of byte 0), `page_size`.
    Raises DmaError where the need cannot be met. The memory is private to the process, or a file without a name:
    however it ends, the kernel takes the pages back, and a child process does not have them.
    """

    def __init__(self, size, needs=ANY, node=None, shared=False):
        if size <= 0:
            raise UsageError(f"DMA memory of {size} bytes: expected at least 1")
        if size > LARGEST:
            raise DmaError(f"DMA memory of {size} bytes: expected at most 1 GiB a region")
        self._map, used, self.page_size, self.fd = _map(size, needs, node, shared)
        self.size, self.fd_offset = len(used), used.ctypes.data - np.frombuffer(self._map, np.uint8).ctypes.data
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
        unmap(self._map)
        if self.fd is not None:
            os.close(self.fd)

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


def unmap(mapping):
    """Close a mapping; where somebody holds a view of it, its addresses become empty memory of their own instead."""
    try:
        mapping.close()
    except BufferError:
        detach(np.frombuffer(mapping, np.uint8))


def detach(array):
    """Put empty memory in the place of a whole mapping, under everyone who still looks at it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    _libc.mmap(*_extent(array), _READ_WRITE, flags, -1, ctypes.c_long(0))


def sealed_file(name, size, flags=0):
    """The descriptor of a new memory file: `size` bytes of zeros. `flags` are added to memfd_create's.

    Nobody can change its size: who got the file could otherwise cut it, and the next access here would end the process.
    """
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return file
    except BaseException:
        os.close(file)
        raise


def map_file(descriptor, start, size):
    """`size` bytes of a file from `start` as uint8, shared with whoever maps it. OSError where that cannot be.

    Unlike one of the mmap module, the mapping does not keep the file open. It ends with the last view of it.
    """
    address = _libc.mmap(None, ctypes.c_size_t(size), _READ_WRITE, mmap.MAP_SHARED, descriptor, ctypes.c_long(start))
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mapped = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(mapped, _libc.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size)).atexit = False
    return np.frombuffer(mapped, np.uint8)


def _map(size, needs, node, shared):
    """(mapping, the part of it to use as uint8, page size, file): huge pages first, then what `needs` leaves."""
    found, page = _map_huge(size, needs, node, shared), HUGE_PAGE
    if found is None:
        found, page = _map_ordinary(size, needs, node, shared), PAGE
    mapping, used, file = found
    if needs != ANY:  # a fork would move one side to other pages on the next write, and the device writes to the old
        mapping.madvise(mmap.MADV_DONTFORK)
    return mapping, used, page, file


def _map_huge(size, needs, node, shared):
    """In huge pages of 2 MiB; where a device cannot do without, in one of 1 GiB, which is contiguous all the more."""
    rounded = -(-size // HUGE_PAGE) * HUGE_PAGE
    kinds = [(rounded, _MAP_HUGE_2MB)] + [(GIANT_PAGE, _MAP_HUGE_1GB)] * (needs == HUGE)
    for length, kind in kinds:
        try:
            mapping, file = _new_mapping(length, _MAP_HUGETLB | kind, shared)
            used = np.frombuffer(mapping, np.uint8)
            _prefer(node, used)
            _populate(mapping, used)
            return mapping, used[:rounded], file
        except OSError:
            pass
    if needs == HUGE:
        pages = rounded // HUGE_PAGE
        raise DmaError(f"DMA memory: {pages} free huge pages of 2 MiB needed, fewer are there; set them up: "
                       f"echo {pages + 64} > /proc/sys/vm/nr_hugepages (as root)")
    return None


def _map_ordinary(size, needs, node, shared):
    size = -(-size // PAGE) * PAGE
    slack = HUGE_PAGE if size >= HUGE_PAGE else 0  # addresses, not memory: to begin where a huge page can
    try:
        mapping, file = _new_mapping(size + slack, 0, shared)
    except OSError as error:
        raise DmaError(f"DMA memory of {size} bytes: {error.strerror}; free some memory or ask for less") from None
    used = np.frombuffer(mapping, np.uint8)
    if slack:
        start = -used.ctypes.data % HUGE_PAGE
        used = used[start : start + size]
        mapping.madvise(mmap.MADV_HUGEPAGE)  # fewer TLB misses where the kernel has such pages to give
    _prefer(node, used)
    if needs == ANY:
        _libc.mlock(*_extent(used))  # pages that a bus pins would count twice against the limit
    return mapping, used, file


def _new_mapping(length, huge, shared):
    """(mapping, file) of zeros: private and without a file, or of one whose size nobody can change any more."""
    if not shared:
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | huge), None
    kind = os.MFD_HUGETLB | huge & ~_MAP_HUGETLB if huge else 0  # the page size has the same place in both flags
    file = sealed_file("ixy_numba", length, kind)
    try:
        return mmap.mmap(file, length, flags=mmap.MAP_SHARED), file
    except BaseException:
        os.close(file)
        raise


def _prefer(node, array):
    """Ask for pages of a NUMA node, before they are touched. Where that cannot be they are farther away, no worse."""
    call = _MBIND.get(platform.machine())
    if node is None or call is None:
        return
    nodes = (ctypes.c_ulong * 16)()
    nodes[node // 64] = 1 << node % 64
    _libc.syscall(ctypes.c_long(call), *_extent(array), ctypes.c_long(_MPOL_PREFERRED), nodes,
                  ctypes.c_ulong(8 * ctypes.sizeof(nodes) + 1), ctypes.c_ulong(0))


def _populate(mapping, array):
    """Have every page now, or an OSError: a huge page that is missing later would end the process."""
    try:
        mapping.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.14 the reservation has to do
            raise
        array[::PAGE] = 0


def _extent(array):
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(len(array))
