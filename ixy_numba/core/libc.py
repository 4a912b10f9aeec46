"""System calls that kernels make, without the interpreter: read, write, poll, eventfds, sleep, yield."""

import ctypes
import os
import select
import time

import numpy as np
from numba import types

from .jit import INTERPRETED, kernel
from .raw import load32

U = np.uint64
AGAIN, IO_ERROR = 11, 5  # errno: nothing there now; the interface is down
POLLFD = np.dtype([("fd", "i4"), ("events", "i2"), ("revents", "i2")])  # struct pollfd: what to wait for, what came
POLLIN = 1

if INTERPRETED:

    def read_into(descriptor, address, size):
        try:
            data = os.read(int(descriptor), int(size))
        except OSError as error:
            return -error.errno
        ctypes.memmove(int(address), data, len(data))
        return len(data)

    def write_from(descriptor, address, size):
        try:
            return os.write(int(descriptor), ctypes.string_at(int(address), int(size)))
        except OSError as error:
            return -error.errno

    def write_at(descriptor, address, size, offset):
        try:
            return os.pwrite(int(descriptor), ctypes.string_at(int(address), int(size)), int(offset))
        except OSError as error:
            return -error.errno

    def poll(address, count, timeout_ms):
        files = np.frombuffer((ctypes.c_char * (int(count) * POLLFD.itemsize)).from_address(int(address)), POLLFD)
        poller = select.poll()
        for file in files:
            poller.register(int(file["fd"]), int(file["events"]))
        found = dict(poller.poll(int(timeout_ms)))
        files["revents"] = [found.get(int(fd), 0) for fd in files["fd"]]
        return len(found)

    def signal_event(descriptor):
        try:
            os.eventfd_write(int(descriptor), 1)
        except OSError as error:
            return -error.errno
        return 0

    def sleep_us(microseconds):
        time.sleep(int(microseconds) / 1e6)

    def yield_processor():
        os.sched_yield()

else:
    _read = types.ExternalFunction("read", types.int64(types.int32, types.uint64, types.uint64))
    _write = types.ExternalFunction("write", types.int64(types.int32, types.uint64, types.uint64))
    _pwrite = types.ExternalFunction("pwrite", types.int64(types.int32, types.uint64, types.uint64, types.int64))
    _poll = types.ExternalFunction("poll", types.int32(types.uint64, types.uint64, types.int32))
    _eventfd_write = types.ExternalFunction("eventfd_write", types.int32(types.int32, types.uint64))
    _sleep = types.ExternalFunction("usleep", types.int32(types.uint32))
    _yield = types.ExternalFunction("sched_yield", types.int32())
    _errno = types.ExternalFunction("__errno_location", types.uint64())

    @kernel
    def read_into(descriptor, address, size):
        """Bytes read from a file descriptor to `address`, or -errno."""
        n = _read(np.int32(descriptor), address, size)
        return n if n >= 0 else -np.int64(load32(_errno()))

    @kernel
    def write_from(descriptor, address, size):
        """Bytes written to a file descriptor from `address`, or -errno."""
        n = _write(np.int32(descriptor), address, size)
        return n if n >= 0 else -np.int64(load32(_errno()))

    @kernel
    def write_at(descriptor, address, size, offset):
        """Bytes written from `address` to byte `offset` of a file, or -errno."""
        n = _pwrite(np.int32(descriptor), address, size, offset)
        return n if n >= 0 else -np.int64(load32(_errno()))

    @kernel
    def poll(address, count, timeout_ms):
        """Wait for one of `count` POLLFD at `address`, at most so long; how many are ready, negative after a signal."""
        return _poll(address, count, np.int32(timeout_ms))

    @kernel
    def signal_event(descriptor):
        """Add 1 to an eventfd; negative where that cannot be, as on one that is full."""
        return _eventfd_write(np.int32(descriptor), U(1))

    @kernel
    def sleep_us(microseconds):
        _sleep(np.uint32(microseconds))

    @kernel
    def yield_processor():
        """Let another thread run, if one waits for this processor."""
        _yield()
