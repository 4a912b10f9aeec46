"""Capture files (pcap): read through a memory map with a checked index, written by kernels into preallocated pages.

The format is pcap 2.4 as in libpcap's pcap-savefile(5): a 24-byte file header, then records of a 16-byte header
(seconds, microseconds or nanoseconds, captured length, original length; 32 bits each) and the captured bytes.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from shlex import quote
from typing import NamedTuple

import numpy as np

from .clock import Clock, now_ns  # noqa: F401 (whoever writes captures needs the time too)
from .errors import ClosedError, IxyError, UsageError
from .jit import kernel
from .memory import PAGE, new_record
from .mmio import load_acquire, store_release
from .raw import copy, load32, store64

U = np.uint64
ONE, LOW32, SHIFT32 = U(1), U(0xFFFFFFFF), U(32)
FILE_HEADER, RECORD_HEADER = U(24), U(16)
BILLION = U(1_000_000_000)
LONGEST = U(256 << 10)  # libpcap's MAXIMUM_SNAPLEN: anything longer is a damaged length
ETHERNET = 1  # LINKTYPE_ETHERNET, "EN10MB"
MICROSECOND, NANOSECOND = 0xA1B2C3D4, 0xA1B23C4D

NOT_PCAP = {  # how other files that people try begin: what they are, and the way from them to pcap
    b"\x0a\x0d\x0d\x0a": ("pcapng, not pcap", "editcap -F nsecpcap {0} FIXED"),
    b"\x1f\x8b": ("compressed (gzip)", "gunzip -c {0} > FIXED"),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", "zstd -dc {0} > FIXED"),
    b"\xfd7zXZ": ("compressed (xz)", "xz -dc {0} > FIXED"),
    b"BZh": ("compressed (bzip2)", "bzip2 -dc {0} > FIXED"),
}
LINK_TYPES = {0: "BSD loopback", 101: "raw IP", 105: "802.11", 113: "Linux cooked, as from `tcpdump -i any`",
              127: "802.11 with radiotap", 276: "Linux cooked v2, as from `tcpdump -i any`"}
HINTS = {
    errno.ENOENT: "is the path right?",
    errno.EACCES: "are its permissions right?",
    errno.ENOSPC: "make room, or choose another disk",
    errno.EFBIG: "raise the limit (ulimit -f), or split the capture",
    errno.EOPNOTSUPP: "its file system cannot preallocate, choose another one",
    errno.ENODEV: "its file system cannot map files, choose another one",
}


class Index(NamedTuple):
    """What is known of every record; arrays of shape (n,)."""

    offsets: np.ndarray  # uint64, of the first captured byte in the file
    lengths: np.ndarray  # uint32, captured bytes
    original: np.ndarray  # uint32, bytes on the wire
    times_ns: np.ndarray  # uint64, since 1970

    @classmethod
    def empty(cls, n):
        return cls(np.empty(n, U), np.empty(n, np.uint32), np.empty(n, np.uint32), np.empty(n, U))


@kernel(inline=True)
def _load32(address, swapped):
    word = load32(address)
    if swapped:
        word = ((word & U(0xFF)) << U(24) | (word & U(0xFF00)) << U(8)
                | (word >> U(8)) & U(0xFF00) | word >> U(24))
    return word


@kernel
def _walk(address, size, swapped, scale, index):
    """Follow the records of the `size` bytes at `address` and write down as many as `index` has room for.

    Returns (records, where it stopped, end of the last record whose header is not all zero). It stopped at `size`, or
    at the first record that does not fit the file or is longer than LONGEST.
    """
    at, written, n, room = FILE_HEADER, FILE_HEADER, U(0), U(len(index.offsets))
    while size - at >= RECORD_HEADER:
        here = address + at
        seconds, fraction = _load32(here, swapped), _load32(here + U(4), swapped)
        length, original = _load32(here + U(8), swapped), _load32(here + U(12), swapped)
        data = at + RECORD_HEADER
        if length > LONGEST or length > size - data:
            break
        if n < room:
            index.offsets[n], index.lengths[n], index.original[n] = data, length, original
            index.times_ns[n] = seconds * BILLION + fraction * scale
        n += ONE
        at = data + length
        if seconds | fraction | length | original:
            written = at
    return n, at, written


class Capture:
    """The Ethernet frames of the pcap file `path`: mapped read-only, every record checked before any is used.

    Attributes: `data` (uint8, the whole file, read-only) and, for each record, `offsets`, `lengths`, `original` and
    `times_ns` (see `Index`); frame k is `data[offsets[k] : offsets[k] + lengths[k]]`. Microsecond and nanosecond files
    of either byte order. IxyError for anything else, with the remedy. The file is locked (flock, shared) so that no
    CaptureWriter overwrites it meanwhile; another program that truncates it kills the process (SIGBUS).
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        self.data = _map_file(self.path)
        swapped, scale = _check_header(self.path, self.data)
        where, size = U(self.data.ctypes.data), U(len(self.data))
        found = _walk(where, size, swapped, scale, Index.empty(0))
        _check_end(self.path, self.data, swapped, found)
        try:
            index = Index.empty(int(found[0]))
        except MemoryError:
            raise IxyError(f"{self.path}: no memory for the index of its {found[0]} records; split it: "
                           f"editcap -c 1000000 {quote(self.path)} PART") from None
        if _walk(where, size, swapped, scale, index) != found:
            raise IxyError(f"{self.path}: changed while it was read; wait until its writer is done")
        self.offsets, self.lengths, self.original, self.times_ns = index

    def __len__(self):
        return len(self.offsets)

    def close(self):
        """Give the mapping back as soon as nobody holds a view of `data`; stop kernels that use it by address first."""
        self.data = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _map_file(path):
    """The bytes of a regular, non-empty file as a read-only uint8 array that owns the mapping and a shared lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO without a writer must not hang
    except OSError as error:
        raise _failed(path, "read", error) from None
    try:
        _require_regular(path, os.fstat(descriptor))
        if not _lock(descriptor, fcntl.LOCK_SH):
            raise IxyError(f"{path}: is being written as a capture; wait until its writer is done")
        if os.fstat(descriptor).st_size == 0:
            raise IxyError(f"{path}: is empty, expected a pcap file (at least {FILE_HEADER} bytes)")
        return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise _failed(path, "map", error) from None
    finally:
        os.close(descriptor)  # the mapping keeps a duplicate, and the lock with it


def _os_error(code):
    return OSError(code, os.strerror(code))


def _failed(path, task, error):
    hint = HINTS.get(error.errno, "choose another file")
    return IxyError(f"{path}: cannot {task} this capture: {error.strerror}; {hint}")


def _require_regular(path, status):
    for test, kind in ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
                       (stat.S_ISCHR, "a character device"), (stat.S_ISBLK, "a block device")):
        if test(status.st_mode):
            raise IxyError(f"{path}: is {kind}, expected a regular file: captures are memory-mapped")


def _lock(descriptor, how):
    """Whether the file is ours to use; file systems without locks are trusted."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _check_header(path, data):
    """(byte order swapped, nanoseconds of a fraction) from the file header."""
    head = data[: int(FILE_HEADER)].tobytes()
    for start, (kind, remedy) in NOT_PCAP.items():
        if head.startswith(start):
            raise IxyError(f"{path}: is {kind}; convert it: {remedy.format(quote(path))}")
    scales = {MICROSECOND: 1000, NANOSECOND: 1}
    scale, swapped = scales.get(int.from_bytes(head[:4], "little")), 0
    if scale is None:
        scale, swapped = scales.get(int.from_bytes(head[:4], "big")), 1
    if scale is None:
        raise IxyError(f"{path}: is no pcap file: it begins with {head[:4].hex(' ')}, expected d4 c3 b2 a1 or alike; "
                       f"convert a capture of another kind: editcap -F nsecpcap {quote(path)} FIXED")
    if len(head) < FILE_HEADER:
        raise IxyError(f"{path}: is cut off: {len(head)} of its header's {FILE_HEADER} bytes are there; fetch it again")
    major, minor, link = struct.unpack(f"{'<>'[swapped]}4x2H12xI", head)
    if (major, minor) != (2, 4):
        raise IxyError(f"{path}: is pcap version {major}.{minor}, expected 2.4; convert it: "
                       f"tcpdump --nano -r {quote(path)} -w FIXED")
    if link != ETHERNET:
        known = f" ({LINK_TYPES[link]})" if link in LINK_TYPES else ""
        raise IxyError(f"{path}: has link type {link}{known}, expected {ETHERNET} (Ethernet); "
                       f"capture on an Ethernet interface")
    return U(swapped), U(scale)


def _check_end(path, data, swapped, found):
    """Nothing if the records fill the file, else what is wrong with the first bad one."""
    n, at, written = map(int, found)
    left = len(data) - at
    if at - written >= PAGE:  # no frame has length 0 at time 0: this is space preallocated, never used
        raise IxyError(f"{path}: holds only zeros from byte {written} on: its writer was killed; "
                       f"mend it: truncate -s {written} {quote(path)}")
    if not left:
        return
    record = f"record {n + 1} at byte {at}"
    mend = f"keep the records before it: tcpdump --nano -r {quote(path)} -w FIXED"
    if left < RECORD_HEADER:
        raise IxyError(f"{path}: {record} is cut off: {left} of its header's {RECORD_HEADER} bytes are there; {mend}")
    length = int.from_bytes(data[at + 8 : at + 12].tobytes(), "big" if swapped else "little")
    if length > LONGEST:
        raise IxyError(f"{path}: {record} is damaged: it claims {length} bytes, at most {LONGEST} are possible; {mend}")
    raise IxyError(f"{path}: {record} is cut off: {left - int(RECORD_HEADER)} of its {length} bytes are there; {mend}")


# Writing. The whole file is one mapping that begins at byte 0 and reaches far beyond the file's end; only what is below
# `limit` has blocks on disk and may be touched. To grow, the file is extended and `limit` raised: one word, so a
# kernel may go on appending meanwhile, and no record ever straddles two mappings.

NOT_WANTED, SOON, STUCK = U(0), U(1), U(2)
OUT = np.dtype([
    ("address", "u8"),  # of byte 0 of the file in memory
    ("limit", "u8"),  # bytes of the file that may be written
    ("position", "u8"),  # bytes of the file that are written
    ("margin", "u8"),  # ask for more when less than this is left
    ("snaplen", "u8"),  # bytes of a frame that are kept
    ("frames", "u8"),  # written
    ("bytes", "u8"),  # of these frames on the wire
    ("wanted", "u8"),  # NOT_WANTED, SOON, or STUCK: an append failed; cleared by service()
])
SMALLEST_STEP = 64 << 10
RESERVE = 1 << 40

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
_libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
_libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


@kernel
def append(out, address, length, time_ns):
    """Write the frame of `length` bytes at `address`, seen at `time_ns` (all uint64), to the CaptureWriter's `out`.

    False, and nothing written, when there is no room: try again once the writer's owner has called `service()`. One
    thread at a time.
    """
    captured = min(length, out.snaplen)
    at = out.position
    end = at + RECORD_HEADER + captured
    limit = load_acquire(out, "limit")
    if end > limit:
        store_release(out, "wanted", STUCK)
        return False
    seconds = time_ns // BILLION
    target = out.address + at
    store64(target, seconds & LOW32 | (time_ns - seconds * BILLION) << SHIFT32)
    store64(target + U(8), captured | length << SHIFT32)
    copy(target + RECORD_HEADER, address, captured)
    out.position = end
    out.frames += ONE
    out.bytes += length
    if limit - end < out.margin:
        store_release(out, "wanted", SOON)
    return True


@kernel
def _wanted(out):
    return load_acquire(out, "wanted")


@kernel
def _raise_limit(out, limit):
    store_release(out, "limit", limit)
    store_release(out, "wanted", NOT_WANTED)


class CaptureWriter:
    """A nanosecond pcap file that kernels fill through `append(writer.out, …)`; little-endian, Ethernet.

    `snaplen`: bytes kept of each frame, 1 to 262144. Disk space is taken `chunk` bytes ahead (less when the disk has
    less), so that a full disk is an error here and no SIGBUS in a kernel. Call `service()` now and then while kernels
    append, stop them, then `close()`, which cuts the file to what was written. If the process is killed the file ends
    in up to two chunks of zeros instead; `truncate` mends it, `Capture` says how.
    Raises UsageError for bad arguments, IxyError if the file cannot be written, is in use by a Capture or another
    writer, or cannot be memory-mapped (pipes, devices).
    """

    def __init__(self, path, snaplen=65535, chunk=64 << 20):
        if not 1 <= snaplen <= LONGEST:
            raise UsageError(f"snaplen {snaplen}: expected 1 to {LONGEST} bytes")
        if chunk < 1:
            raise UsageError(f"chunk {chunk}: expected at least 1 byte")
        self.path, self.chunk = os.fspath(path), -(-chunk // PAGE) * PAGE
        self.out = new_record(OUT)
        self.out.snaplen, self.out.margin = snaplen, self.chunk // 2
        self._descriptor = _open_for_writing(self.path)
        self._reserved = self._dropped = 0
        try:
            header = struct.pack("<I2H8xII", NANOSECOND, 2, 4, snaplen, ETHERNET)
            os.pwrite(self._descriptor, header, 0)
            self.out.position = FILE_HEADER
            self._reserve()
            _raise_limit(self.out, self._grown())
        except OSError as error:
            self.close()
            raise _failed(self.path, "write", error) from None

    @property
    def frames(self):
        """Frames written so far."""
        return int(self.out.frames)

    @property
    def bytes_written(self):
        """Length of the file so far in bytes, headers included."""
        return int(self.out.position)

    def service(self):
        """Extend the file if a kernel asked for it. IxyError when it had to stop and the disk is full."""
        if self._descriptor is None:
            raise ClosedError(f"{self.path}: this capture is closed")
        wanted = _wanted(self.out)
        if wanted == NOT_WANTED:
            return
        try:
            limit = self._grown()
        except OSError as error:
            if wanted == STUCK:
                kept = f"{self.frames} frames, {self.bytes_written} bytes"
                raise _failed(self.path, f"write more than {kept} of", error) from None
            limit = self.out.limit  # what is left may do
        _raise_limit(self.out, limit)

    def close(self):
        """Cut the file to what was written. No kernel may be appending any more."""
        if self._descriptor is None:
            return
        self.out.limit = 0
        descriptor, self._descriptor = self._descriptor, None
        try:
            if self._reserved:
                _libc.munmap(int(self.out.address), self._reserved)
            os.ftruncate(descriptor, self.bytes_written)
        except OSError as error:
            raise _failed(self.path, "finish", error) from None
        finally:
            os.close(descriptor)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _reserve(self):
        """Map the file far beyond its end; less where the file system or a limit on address space says so."""
        size = RESERVE
        while True:
            address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, self._descriptor, 0)
            if address != ctypes.c_void_p(-1).value:
                self.out.address, self._reserved = address, size
                return
            if size <= SMALLEST_STEP:
                raise _os_error(ctypes.get_errno())
            size //= 2

    def _grown(self):
        """Take disk space for the next chunk, or for what can be had; returns the new limit."""
        limit, step = int(self.out.limit), self.chunk
        while True:
            try:
                if limit + step > self._reserved:
                    raise _os_error(errno.EFBIG)
                os.posix_fallocate(self._descriptor, limit, step)
                break
            except OSError:
                if step <= SMALLEST_STEP:
                    raise
                step = step // 2 // PAGE * PAGE
        full = int(self.out.position) // PAGE * PAGE  # these pages are of no more use here: the file has them
        _libc.madvise(int(self.out.address) + self._dropped, full - self._dropped, mmap.MADV_DONTNEED)
        self._dropped = full
        return U(limit + step)


def _open_for_writing(path):
    """A descriptor of an empty regular file, locked so that nobody of ours reads or writes it."""
    try:
        if os.path.exists(path):
            _require_regular(path, os.stat(path))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not _lock(descriptor, fcntl.LOCK_EX):
            os.close(descriptor)
            raise IxyError(f"{path}: is in use as another capture; choose another output file")
        os.ftruncate(descriptor, 0)
    except OSError as error:
        raise _failed(path, "write", error) from None
    return descriptor
