"""Cables between a simulated device and the world: back to back to another one, or to a TAP interface."""

import fcntl
import os
import socket
import struct
import threading

import numpy as np

from ..core.errors import IxyError, UsageError
from .wire import FIFO_SIZE, unplug

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def new_fifo():
    """(memory to keep, address of an empty FIFO in it)."""
    memory = np.zeros(FIFO_SIZE + 63, np.uint8)
    return memory, (memory.ctypes.data + 63) & ~63


class Cable:
    """Two devices of this process, back to back: what one sends the other receives, in order and without loss."""

    _lock = threading.Lock()
    _by_name = {}

    def __init__(self, name):
        self.name = name
        self._ends, self._plugged = [], set()  # who had which end; who still has one
        self._memory, self._fifos = zip(new_fifo(), new_fifo(), strict=True)

    @classmethod
    def join(cls, name, bus):
        """Take an end of the cable `name`; UsageError if both are taken."""
        with cls._lock:
            cable = cls._by_name.setdefault(name, cls(name))
            if len(cable._ends) == 2:
                raise UsageError(f"{bus.name}: link={name} has two ends already; choose another name")
            cable._ends.append(bus)
            cable._plugged.add(bus)
            return cable

    def fifos(self, bus):
        """(inbox, outbox) of one end."""
        return self._fifos if self._ends[0] is bus else self._fifos[::-1]

    def leave(self, bus):
        """Pull an end: the other's link goes down, what it sends is lost. A new cable can have the name."""
        with self._lock:
            if self._by_name.get(self.name) is self:
                del self._by_name[self.name]
            unplug(np.uint64(self.fifos(bus)[0]))
            self._plugged.discard(bus)
            for other in self._plugged:
                other.model.set_link(False)


class Tap:
    """A TAP interface: frames written to `descriptor` appear on it; what it sends, the engine puts into `fifo`."""

    def __init__(self, name, descriptor):
        self.name, self.descriptor = name, descriptor
        self._memory, self.fifo = new_fifo()

    @property
    def up(self):
        """Whether the interface is up, as `ip link set … up` and `down` have it; False if it is gone."""
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                return bool(_flags(control, self.name) & _IFF_UP)
        except OSError:
            return False

    def close(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def open_tap(name):
    """Attach to the TAP interface `name`, made if need be, and bring it up. IxyError where that is not allowed."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise IxyError(f"tap={name}: cannot open /dev/net/tun: {error.strerror}; "
                       f"is the tun module loaded, and are you root?") from None
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            up = struct.pack("16sH22x", name.encode(), _flags(control, name) | _IFF_UP)
            fcntl.ioctl(control, _SIOCSIFFLAGS, up)
    except OSError as error:
        os.close(descriptor)
        hint = "it is in use by another program" if error.errno == 16 else "root or CAP_NET_ADMIN is needed"
        raise IxyError(f"tap={name}: cannot set the interface up: {error.strerror}; {hint}") from None
    return Tap(name, descriptor)


def _flags(control, name):
    answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
    return struct.unpack_from("H", answer, 16)[0]
