"""System calls that kernels make, without the interpreter: read, write, sleep, yield."""

import ctypes
import os
import time

import numpy as np
from numba import types

from .jit import INTERPRETED, kernel
from .raw import load32

U = np.uint64
AGAIN, IO_ERROR = 11, 5  # errno: nothing there now; the interface is down

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

    def sleep_us(microseconds):
        time.sleep(int(microseconds) / 1e6)

    def yield_processor():
        os.sched_yield()

else:
    _read = types.ExternalFunction("read", types.int64(types.int32, types.uint64, types.uint64))
    _write = types.ExternalFunction("write", types.int64(types.int32, types.uint64, types.uint64))
    _pwrite = types.ExternalFunction("pwrite", types.int64(types.int32, types.uint64, types.uint64, types.int64))
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
    def sleep_us(microseconds):
        _sleep(np.uint32(microseconds))

    @kernel
    def yield_processor():
        """Let another thread run, if one waits for this processor."""
        _yield()
