"""The parsers that are fuzzed, each with the contract that it keeps for every input.

A target takes bytes and returns nothing. Either the parser's result satisfies what the target asserts, or the parser
refused the input with one line; any other exception is a finding.
"""

import contextlib
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ixy_numba import device
from ixy_numba.bus import parse_options
from ixy_numba.core import capture
from ixy_numba.core.errors import IxyError, UsageError
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.sim import spec as sim_spec

CORPUS = Path(__file__).parent / "corpus"


class Target(NamedTuple):
    run: object  # takes bytes
    sources: tuple  # modules whose coverage guides the fuzzer
    longest: int  # bytes of an input
    words: tuple  # byte strings that it is likely to need

    def corpus(self, name):
        """{file name: bytes} of the committed inputs."""
        return {path.name: path.read_bytes() for path in sorted((CORPUS / name).iterdir())}


@contextlib.contextmanager
def _refused_in_one_line(kind):
    try:
        yield
    except kind as error:
        assert len(str(error).splitlines()) == 1, f"not one line: {str(error)!r}"


# ---- captures

_walk, _load32 = capture._walk, capture.load32


@contextlib.contextmanager
def _loads_inside():
    """Interpreted kernels read by integer address like compiled ones: hold them to the file that they were given."""
    first = last = 0

    def walk(address, size, *rest):
        nonlocal first, last
        first, last = int(address), int(address) + int(size) - 4
        return _walk(address, size, *rest)

    def load32(address):
        assert first <= int(address) <= last, f"a load at {int(address) - first}, the file ends at {last + 4 - first}"
        return _load32(address)

    capture._walk, capture.load32 = (walk, load32) if INTERPRETED else (_walk, _load32)
    try:
        yield
    finally:
        capture._walk, capture.load32 = _walk, _load32


def read_capture(data):
    """A file of these bytes: its records lie one behind the other and fill it, with the times that they say."""
    with (open(os.memfd_create("capture"), "wb", buffering=0) as file, _refused_in_one_line(IxyError),
          _loads_inside(), np.errstate(all="raise")):
        file.write(data)
        with capture.Capture(f"/proc/self/fd/{file.fileno()}") as found:
            _check_records(data, found)


def _check_records(data, found):
    order = "<" if data[0] in (0xD4, 0x4D) else ">"
    unit = 1 if 0x4D in (data[0], data[3]) else 1000
    at = 24
    for k in range(len(found)):
        seconds, fraction, length, original = struct.unpack_from(f"{order}4I", data, at)
        at += 16
        assert (int(found.offsets[k]), int(found.lengths[k]), int(found.original[k])) == (at, length, original)
        assert int(found.times_ns[k]) == seconds * 10**9 + fraction * unit
        at += length
    assert at == len(data) == len(found.data)


# ---- device specs


def open_bus(spec, rest):
    """Stands in for the simulator's, which would go on to open files and interfaces."""
    return sim_spec.parse(spec, parse_options(spec, rest))


def read_spec(data):
    """What a user types as a device, decoded as the interpreter decodes arguments."""
    schemes, device.SCHEMES = device.SCHEMES, {"sim": __name__}
    try:
        with _refused_in_one_line(UsageError):
            _check_spec(device.open_bus(data.decode("utf-8", "surrogateescape")))
    finally:
        device.SCHEMES = schemes


def _check_spec(found):
    for low, value, high in ((1, found.frames or 1, 1 << 48), (14, found.size, 1 << 16), (1, found.flows, 60000),
                             (1, found.loop, 1 << 20), (1, found.seed, (1 << 63) - 1), (0, found.device, 0xFFFF),
                             (14, found.min_frame, 60)):
        assert type(value) is int and low <= value <= high, found
    for value, high in ((found.loss, 1), (found.corrupt, 1), (found.delay_us, 1e9), (found.rate or 0, 1e9)):
        assert 0 <= value <= high, found
    assert found.rate is None or found.rate > 0
    assert found.mac is None or len(found.mac) == 6 and not found.mac[0] & 1
    tap = found.tap
    assert tap is None or 0 < len(tap.encode()) < 16 and "%" not in tap, "15 bytes, and Linux replaces %d"
    for path in filter(None, (found.capture_in, found.capture_out, found.link)):
        assert "\0" not in path
    assert sum(map(bool, (found.generate, found.capture_in, found.tap, found.link))) <= 1
    assert sum(map(bool, (found.capture_out, found.tap, found.link))) <= 1


TARGETS = {
    "capture": Target(read_capture, ("ixy_numba.core.capture",), 4096,
                      tuple(struct.pack(f"{order}I", word) for order in "<>"
                            for word in (capture.MICROSECOND, capture.NANOSECOND, 1, 60, 1 << 18, 0xFFFFFFFF))),
    "spec": Target(read_spec, ("ixy_numba.device", "ixy_numba.bus", "ixy_numba.sim.spec"), 512,
                   (b"sim:", b",", b"0000:03:00.0", b"line", *(f"{key}=".encode() for key in sim_spec.OPTIONS))),
}
