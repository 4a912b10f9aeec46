"""The other side of virtio for tests: a device's data path by address, in this process or behind a vhost-user socket.

It shares nothing with the driver but the specification: layouts are spelled out again, by address.
"""

import contextlib
import ctypes
import mmap
import os
import select
import socket
import struct
import threading
import time

import numpy as np

from ixy_numba.bus import Bus
from ixy_numba.bus.virtio import Notifier, VirtioTransport
from ixy_numba.core.jit import kernel
from ixy_numba.core.memory import ANY, new_record
from ixy_numba.core.mmio import fence, fence_acquire, fence_release
from ixy_numba.core.pool import U
from ixy_numba.core.raw import copy, load8, load16, load32, load64, store8, store16, store32
from ixy_numba.device import _attach

NONE = U(0xFFFFFFFF)
LOW16 = U(0xFFFF)
MTU, MAC, MRG_RXBUF, STATUS, MQ, ANY_LAYOUT = 1 << 3, 1 << 5, 1 << 15, 1 << 16, 1 << 22, 1 << 27
EVENT_IDX, PROTOCOL, VERSION_1 = 1 << 29, 1 << 30, 1 << 32

MEMORY = np.dtype([("n", "u8"), ("gpa", "u8", (8,)), ("length", "u8", (8,)), ("at", "u8", (8,))])
QUEUE = np.dtype([("desc", "u8"), ("avail", "u8"), ("used", "u8"), ("slots", "u8"),  # addresses here; descriptors
                  ("next", "u8"), ("used_idx", "u8"), ("header", "u8"), ("mergeable", "u8"), ("faults", "u8")])


@kernel
def translate(memory, gpa, n):
    """Where the `n` bytes at the device address `gpa` are here, or 0 if they are not all in one region."""
    for k in range(memory.n):
        if memory.gpa[k] <= gpa and gpa - memory.gpa[k] + n <= memory.length[k]:
            return memory.at[k] + (gpa - memory.gpa[k])
    return U(0)


@kernel
def asked(address):
    """The 16-bit word at `address`, read after everything before it was stored."""
    fence()
    return load16(address)


@kernel
def available(queue):
    """How many descriptors the driver has made available that were not taken yet."""
    n = (load16(queue.avail + U(2)) + U(0x10000) - queue.next) & LOW16
    fence_acquire()
    return n


@kernel
def take_next(queue):
    """The id of the next available descriptor, or NONE."""
    if available(queue) == U(0):
        return NONE
    taken = load16(queue.avail + U(4) + U(2) * (queue.next & (queue.slots - U(1))))
    queue.next = (queue.next + U(1)) & LOW16
    return taken


@kernel
def use(queue, taken, length):
    """Hand a descriptor back, with `length` bytes written."""
    slot = queue.used + U(4) + U(8) * (queue.used_idx & (queue.slots - U(1)))
    store32(slot, taken)
    store32(slot + U(4), length)
    queue.used_idx = (queue.used_idx + U(1)) & LOW16
    fence_release()
    store16(queue.used + U(2), queue.used_idx)


@kernel
def deliver(memory, queue, frame, length):
    """Write the `length` bytes at `frame` behind a header into the next buffers; returns how many it took, 0: none."""
    room = load32(queue.desc + U(8)) - queue.header
    needed = max(U(1), (length + queue.header + room + queue.header - U(1)) // (room + queue.header))
    if available(queue) < needed or (needed > U(1) and queue.mergeable == U(0)):
        return U(0)
    done = U(0)
    for k in range(needed):
        taken = take_next(queue)
        desc = queue.desc + U(16) * taken
        head = queue.header if k == 0 else U(0)
        n = min(length - done, load32(desc + U(8)) - head)
        at = translate(memory, load64(desc), n + head)
        if at == U(0) or load16(desc + U(12)) != U(2):
            queue.faults += U(1)
            continue
        for j in range(head):
            store8(at + U(j), U(0))
        if head == U(12):
            store16(at + U(10), needed)
        copy(at + head, frame + done, n)
        done += n
        use(queue, taken, n + head)
    return needed


@kernel
def read_sent(memory, queue, taken, target):
    """Copy the frame of a taken transmit descriptor to `target`; returns its length. Headers must be all zero."""
    desc = queue.desc + U(16) * taken
    n = load32(desc + U(8))
    at = translate(memory, load64(desc), n)
    if at == U(0) or load16(desc + U(12)) != U(0) or n <= queue.header:
        queue.faults += U(1)
        return U(0)
    for j in range(queue.header):
        if load8(at + U(j)) != U(0):
            queue.faults += U(1)
    copy(target, at + queue.header, n - queue.header)
    return n - queue.header


@kernel
def echo(memory, receive, transmit, scratch):
    """Send every transmitted frame back; returns how many."""
    n = U(0)
    while available(receive) > U(0):
        taken = take_next(transmit)
        if taken == NONE:
            break
        length = read_sent(memory, transmit, taken, scratch)
        use(transmit, taken, U(0))
        if length and deliver(memory, receive, scratch, length) == U(1):
            n += U(1)
    return n


class Side:
    """A device's view of its memory and queues, with the kernels above as methods that take and give bytes."""

    def __init__(self):
        self.memory, self.queues, self.kick_fds = new_record(MEMORY), {}, {}
        self.scratch = np.zeros(1 << 16, np.uint8)

    def region(self, gpa, size, at):
        k = int(self.memory.n)
        self.memory.gpa[k], self.memory.length[k], self.memory.at[k] = gpa, size, at
        self.memory.n = k + 1

    def local(self, gpa):
        return int(translate(self.memory, U(gpa), U(1)))

    def bytes(self, gpa, n):
        """The `n` bytes at a device address, as a view."""
        return np.frombuffer((ctypes.c_char * n).from_address(self.local(gpa)), np.uint8)

    def set(self, number, **fields):
        queue = self.queues.setdefault(number, new_record(QUEUE))
        for name, value in fields.items():
            queue[name] = value

    def deliver(self, frame, number=0):
        data = np.frombuffer(bytes(frame), np.uint8)
        return int(deliver(self.memory, self.queues[number], U(data.ctypes.data), U(len(data))))

    def take(self, number, n):
        return [int(take_next(self.queues[number])) for _ in range(n)]

    def use(self, taken, length=0, number=1):
        use(self.queues[number], U(taken), U(length))

    def read(self, taken, number=1):
        length = read_sent(self.memory, self.queues[number], U(taken), U(self.scratch.ctypes.data))
        return self.scratch[: int(length)].tobytes()

    def collect(self, number=1):
        """All frames sent so far, their descriptors handed back."""
        frames = []
        while (taken := self.take(number, 1)[0]) != NONE:
            frames.append(self.read(taken, number))
            self.use(taken, 0, number)
        return frames

    def echo(self, pair=0):
        return int(echo(self.memory, self.queues[2 * pair], self.queues[2 * pair + 1], U(self.scratch.ctypes.data)))

    def wants_interrupt(self, number):
        """Whether the driver asks for one after the last entry used (2.6.7)."""
        queue = self.queues[number]
        if self.accepted & EVENT_IDX:
            wanted = int(asked(queue.avail + U(4) + U(2) * queue.slots))
            return wanted == int(queue.used_idx) - 1 & 0xFFFF
        return not int(asked(queue.avail)) & 1

    def kicks(self, number):
        """How often the queue was kicked since the last look."""
        try:
            return os.eventfd_read(self.kick_fds[number])
        except BlockingIOError:
            return 0

    @property
    def faults(self):
        return sum(int(queue.faults) for queue in self.queues.values())


class Loop(Bus, VirtioTransport, Side):
    """A virtio device in this process, which does what a test tells it."""

    vendor, device, memory_needs, connected = 0x1AF4, 0x1041, ANY, True

    def __init__(self, offered=VERSION_1 | MRG_RXBUF | PROTOCOL, config=None, pairs=4):
        Side.__init__(self)
        self.name, self.offered, self.config, self.max_pairs, self.accepted = "loop", offered, config, pairs, None
        self.stopped = False

    max_queue_pairs = property(lambda self: self.max_pairs)

    def offered_features(self):
        return self.offered

    def accept_features(self, features):
        self.accepted = features

    def read_config(self, offset, size):
        return self.config and self.config[offset : offset + size]

    def map_dma(self, memory):
        self.region(memory.iova, memory.size, memory.virtual_address)
        return memory.iova + np.arange(memory.size // memory.page_size, dtype=np.uint64) * U(memory.page_size)

    def unmap_dma(self, memory):
        pass

    def set_queue(self, number, addresses, vector=None):
        desc, avail, used = map(self.local, (addresses.desc, addresses.avail, addresses.used))
        begin = int.from_bytes(self.bytes(addresses.used + 2, 2), "little")
        header = 12 if self.accepted & (VERSION_1 | MRG_RXBUF) else 10
        self.set(number, desc=desc, avail=avail, used=used, slots=addresses.size, next=begin, used_idx=begin,
                 header=header, mergeable=bool(self.accepted & MRG_RXBUF))
        self.kick_fds[number] = os.eventfd(0, os.EFD_NONBLOCK)
        return Notifier(self.kick_fds[number])

    def stop(self):
        self.stopped = True
        return []

    def close(self):
        while self.kick_fds:
            os.close(self.kick_fds.popitem()[1])


def attach(bus, queues=1, ring_size=64, pools=None):
    return _attach(bus, queues, ring_size, pools)


class Backend(Side):
    """A vhost-user back-end at the socket `path`, serving one connection after the other in a thread of its own.

    `override` maps a request's number to what is done instead: called with (connection, payload).
    """

    def __init__(self, path, features=VERSION_1 | MRG_RXBUF | EVENT_IDX | MQ | MTU, protocol=0x19, pairs=4, config=None,
                 override=None):
        super().__init__()
        self.path, self.features, self.protocol, self.pairs, self.config = path, features, protocol, pairs, config
        self.override, self.log, self.values, self.enabled = override or {}, [], {}, set()
        self._maps, self._fds, self._regions, self.calls = [], [], [], {}
        self._ready, self._end = threading.Event(), threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        """As if the process were killed: everything is closed at once."""
        self._end.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()
        os.unlink(self.path)
        for fd in self._fds:
            os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _serve(self):
        while not self._end.is_set():
            if select.select([self._listener], [], [], 0.02)[0]:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    self._talk(connection)

    def _talk(self, connection):
        while not self._end.is_set():
            if not select.select([connection], [], [], 0.02)[0]:
                continue
            head, fds, _, _ = socket.recv_fds(connection, 12, 8)
            if not head:
                return
            request, flags, size = struct.unpack("<III", head)
            payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
            self._fds += fds
            self.log.append(request)
            if request in self.override:
                self.override[request](connection, payload)
                continue
            answer = self._handle(request, payload, fds)
            if answer is None and flags & 8:
                answer = struct.pack("<Q", 0)
            if answer is not None:
                connection.sendall(struct.pack("<III", request, 5, len(answer)) + answer)

    def _handle(self, request, payload, fds):
        number = struct.unpack("<Q", payload[:8].ljust(8, b"\0"))[0]
        index, value = number & 0xFFFFFFFF, number >> 32
        if request == 1:
            return struct.pack("<Q", self.features | (PROTOCOL if self.protocol is not None else 0))
        if request == 15:
            return struct.pack("<Q", self.protocol)
        if request == 17:
            return struct.pack("<Q", self.pairs)
        if request == 24:
            return payload[:12] + self.config[: len(payload) - 12] if self.config else b""
        if request == 5:
            self._map(payload, fds)
        elif request == 9:
            self._addresses(index, *struct.unpack("<4Q", payload[8:]))
        elif request == 8:
            self.set(index, slots=value)
        elif request == 10:
            self.set(index, next=value, used_idx=value)
        elif request == 18:
            (self.enabled.add if value else self.enabled.discard)(index)
            if len(self.enabled) == len(self.queues):
                self._ready.set()
        elif request == 11:
            return struct.pack("<II", index, int(self.queues[index]["next"]))
        elif request == 12:
            self.kick_fds[index], = fds
        elif request == 13:
            self.calls[index], = fds
        else:
            self.values[request] = number
        return None

    def _map(self, payload, fds):
        self.memory.n, self._regions = 0, []
        for k, fd in enumerate(fds):
            gpa, size, address, offset = struct.unpack_from("<4Q", payload, 8 + 32 * k)
            mapped = mmap.mmap(fd, size + offset, mmap.MAP_SHARED)
            self._maps.append(mapped)
            at = np.frombuffer(mapped, np.uint8).ctypes.data + offset
            self.region(gpa, size, at)
            self._regions.append((address, size, at))

    def _addresses(self, index, desc, used, avail, log):
        def here(address):
            return next(at + address - start for start, size, at in self._regions if start <= address < start + size)

        features = self.values[2]
        self.set(index, desc=here(desc), used=here(used), avail=here(avail),
                 header=12 if features & (VERSION_1 | MRG_RXBUF) else 10, mergeable=bool(features & MRG_RXBUF))

    accepted = property(lambda self: self.values[2])

    def interrupt(self, number):
        """Raise the queue's interrupt after an entry was used, if the driver asks for it."""
        if self.wants_interrupt(number):
            os.eventfd_write(self.calls[number], 1)

    def wait_ready(self, timeout_s=10):
        """Until all queues are enabled, for the first time or again."""
        assert self._ready.wait(timeout_s)


def reply(request, payload, flags=5, fds=()):
    """An override that answers with these bytes, right or wrong."""
    def answer(connection, _):
        socket.send_fds(connection, [struct.pack("<III", request, flags, len(payload)) + payload], fds)
    return answer


def silence(connection, payload):
    """An override that never answers."""


def wait_for(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
