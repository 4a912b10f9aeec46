"""The parsers that are fuzzed, each with the contract that it keeps for every input.

A target takes bytes and returns nothing. Either the parser's result satisfies what the target asserts, or the parser
refused the input with one line; any other exception is a finding.
"""

import array
import contextlib
import functools
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ixy_numba import device
from ixy_numba.bus import vhost_user
from ixy_numba.core import capture
from ixy_numba.core.errors import IxyError, UsageError
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.sim import bus as sim_bus
from ixy_numba.sim import spec as sim_spec
from ixy_numba.sim import vfio_user
from ixy_numba.sim.pci import PciFunction

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
def _replaced(module, **values):
    """`module` with other `values` under these names."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


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

    with _replaced(capture, _walk=walk, load32=load32) if INTERPRETED else contextlib.nullcontext():
        yield


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


def read_spec(data):
    """What a user types as a device, decoded as the interpreter decodes arguments; nothing is opened."""
    with (_replaced(device, PCI=__name__), _replaced(sim_bus, SimBus=lambda name, spec, manual: spec),
          _replaced(vhost_user, VhostUser=lambda *found: found), _refused_in_one_line(UsageError)):
        found = device.open_bus(data.decode("utf-8", "surrogateescape"))
        if isinstance(found, sim_spec.Spec):
            _check_spec(found)
        elif isinstance(found, tuple):
            _, path, wait_s, refused = found
            assert 0 < len(os.fsencode(path)) <= 107 and 0 <= wait_s <= 3600
            assert not refused & ~(vhost_user.MRG_RXBUF | vhost_user.EVENT_IDX)
        else:
            assert device.PCI_ADDRESS.fullmatch(found)


def open_bus(address, unbind):
    """Stands in for the PCI bus, which would go on to take the device."""
    return address


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


# ---- vhost-user


class Scripted(vhost_user.Channel):
    """A connection to a back-end that has said all that it will ever say, and closed its side."""

    said, passed = b"", 0

    def __init__(self, name, path, stopping):
        self.name, self.stopping, self.reply_ack = name, stopping, False
        self.socket, self.peer = socket.socketpair()
        descriptors = [self.peer.fileno()] * self.passed
        socket.send_fds(self.peer, [self.said or b"\0"], descriptors)
        self.peer.shutdown(socket.SHUT_WR)

    def close(self):
        super().close()
        self.peer.close()


def read_messages(data):
    """What a vhost-user back-end answers, behind a byte that tells how many file descriptors come with it."""
    before = os.listdir("/proc/self/fd")
    Scripted.passed, Scripted.said = data[0] % 12 if data else 0, data[1:]
    with _replaced(vhost_user, Channel=Scripted, MESSAGE_TIMEOUT_S=1.0), _refused_in_one_line(IxyError):
        bus = vhost_user.VhostUser("vhost-user:fuzz", "fuzz", wait_s=0)
        try:
            assert 0 <= bus.offered_features() < 1 << 64 and 0 <= bus.max_queue_pairs <= 128
            mac = bus.read_config(0, 6)
            assert mac is None or len(mac) == 6
            bus.accept_features(bus.offered_features())
            bus._hand_over(bus._channel)
            bus._is_gone()
        finally:
            bus.close()
    assert len(os.listdir("/proc/self/fd")) == len(before), "file descriptors that the peer sent are left open"


# ---- vfio-user


class Client:
    """A vfio-user client's stream: all that it will ever say; with each message come `passed` % 4 file descriptors.

    They are eventfds and memory in turn, the other way round for a `passed` from 4 on.
    """

    def __init__(self, said, passed):
        self._said, self._at, self._passed = said, 0, passed

    def recvmsg(self, size, room, flags):
        more = self._at < len(self._said)
        passed = [_descriptor(k + self._passed // 4) for k in range(self._passed % 4 * more)]
        return self.recv(size), [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", passed).tobytes())], 0, None

    def recv(self, size):
        part = self._said[self._at : self._at + size]
        self._at += len(part)
        return part

    def sendall(self, reply):
        self.sendmsg([reply])

    def sendmsg(self, parts, *_):
        reply = b"".join(parts)
        assert struct.unpack_from("<4xI", reply)[0] == len(reply), "a reply of another size than it says"

    def setsockopt(self, *_):
        pass

    def settimeout(self, _):
        pass


def _descriptor(number):
    """An eventfd or 64 KiB of memory."""
    if number % 2 == 0:
        return os.eventfd(0)
    memory = os.memfd_create("dma", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 1 << 16)
    return memory


@functools.cache
def _simulated():
    bus = sim_bus.SimBus("fuzz", manual=True)
    return bus, PciFunction(bus.model, bus.device)


def read_requests(data):
    """What a vfio-user client asks of the simulated card, behind a byte for the file descriptors with each message."""
    bus, function = _simulated()
    before = os.listdir("/proc/self/fd")
    connection = vfio_user.Connection(Client(data[1:], data[0] % 8 if data else 0), function, bus.model, True)
    try:
        with _refused_in_one_line(IxyError):
            connection.serve()
    finally:
        connection.close()
    assert len(os.listdir("/proc/self/fd")) == len(before), "file descriptors that the client sent are left open"


TARGETS = {
    "capture": Target(read_capture, ("ixy_numba.core.capture",), 4096,
                      tuple(struct.pack(f"{order}I", word) for order in "<>"
                            for word in (capture.MICROSECOND, capture.NANOSECOND, 1, 60, 1 << 18, 0xFFFFFFFF))),
    "spec": Target(read_spec, ("ixy_numba.device", "ixy_numba.bus", "ixy_numba.sim.spec"), 512,
                   (b"sim:", b"vhost-user:", b",", b"0000:03:00.0", b"line", b"off",
                    *(f"{key}=".encode() for key in (*sim_spec.OPTIONS, *vhost_user.OPTIONS)))),
    "vhost": Target(read_messages, ("ixy_numba.bus.vhost_user",), 512,
                    tuple(vhost_user.HEADER.pack(kind, vhost_user.REPLY | vhost_user.VERSION, 8)
                          for kind in vhost_user.REQUESTS.values())),
    "vfio": Target(read_requests, ("ixy_numba.sim.vfio_user", "ixy_numba.sim.messages", "ixy_numba.sim.guest_memory",
                                   "ixy_numba.sim.pci"), 1024,
                   tuple(vfio_user.HEADER.pack(1, kind, 48, 0, 0) for kind in range(1, 14))),
}
