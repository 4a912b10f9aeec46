"""The rivals in C: compiled on this machine when the benchmark runs, loaded with ctypes."""

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ixy_numba.core.errors import IxyError
from ixy_numba.core.memory import DmaMemory, new_record

from .nic import PORT, Native, address

SOURCES = Path(__file__).parent / "c"
COMPILERS = ("gcc", "clang")
PORT_WORDS = 6  # of `struct port` in c/nic.h
FLAGS = ("-std=c11", "-O3", "-march=native")
# Every form: (source, prefix of its functions, the function that forwards)
FORMS = {"ixy_style": ("ixy_style", "ixy_style", "ixy_style_batch"),
         "same_design": ("same_design", "same_design", "same_design_batch"),
         "same_design_fused": ("same_design", "same_design", "same_design_fused"),
         "same_design_in_place": ("same_design", "in_place", "in_place_run")}


@dataclass
class Compiler:
    name: str
    version: str


@cache
def compilers():
    """Those that this machine has."""
    found = []
    for name in COMPILERS:
        if shutil.which(name):
            first = subprocess.run([name, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
            found.append(Compiler(name, first))
    return found


@cache
def _directory():
    return tempfile.TemporaryDirectory(prefix="ixy_numba-bench-")


@cache
def library(source, compiler, handler="touch", flags=FLAGS):
    """The shared library of one source with one handler."""
    target = f"{source}-{compiler}-{handler}.so"
    return ctypes.CDLL(_compile(source, compiler, target, *flags, f"-DHANDLER={handler}", "-shared", "-fPIC"))


def program(source, compiler, package=None):
    """The path of an executable, built with what pkg-config says that `package` needs."""
    wanted = _output("pkg-config", "--cflags", "--libs", package).split() if package else ()
    return _compile(source, compiler, f"{source}-{compiler}", *wanted, *FLAGS)


def _compile(source, compiler, target, *flags):
    path = str(Path(_directory().name) / target)
    _output(compiler, str(SOURCES / f"{source}.c"), *flags, "-o", path)
    return path


def _output(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise IxyError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[0]}")
    return done.stdout


class Rival:
    """One form compiled by one compiler, open on DMA memory of its own."""

    def __init__(self, form, compiler, handler="touch", flags=FLAGS):
        source, prefix, run = FORMS[form]
        self.name, self.handler = f"{form}_{compiler}", handler
        code = library(source, compiler, handler, flags)

        def function(name, result=ctypes.c_uint64):
            found = getattr(code, name)
            found.restype = result
            return found

        self._memory = DmaMemory(function(f"{prefix}_dma_bytes")())
        self._state = new_record(np.dtype([("octets", "u1", (function(f"{prefix}_state_bytes")(),))]))
        state, dma = address(self._state), self._memory.virtual_address
        addresses = (ctypes.c_uint64 * (2 * PORT_WORDS))()
        function(f"{prefix}_open", None)(ctypes.c_void_p(state), ctypes.c_void_p(dma), addresses)
        self.ports = np.zeros(2, PORT)
        self.ports.view(np.uint64).reshape(2, -1)[:, :PORT_WORDS] = np.array(addresses).reshape(2, PORT_WORDS)
        self.driver = Native(np.uint64(ctypes.cast(getattr(code, run), ctypes.c_void_p).value), np.uint64(state))
        self.private = [(state, self._state.dtype.itemsize, 64)]
        if form == "ixy_style":  # a packet's metadata is the driver's own, although it lies in DMA memory
            self.private.append((dma, 2 * 4096 * 2048, 2048))
        self.buffers = function(f"{prefix}_buffers")()
        self._audit = function(f"{prefix}_audit")

    def audit(self):
        """How many buffers are accounted for exactly once: free, waiting for a packet, or being sent."""
        return self._audit(ctypes.c_void_p(address(self._state)))
