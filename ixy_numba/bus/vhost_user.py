"""`vhost-user:PATH[,KEY=VALUE…]`: a virtio device that is another process (DPDK, VPP, Open vSwitch, QEMU), no NIC.

This is the front-end: it connects to the Unix socket PATH where the back-end listens, shares its memory with it, and
says where the queues lie. PATH ends at the first comma. Keys (`OPTIONS`): wait, mrg_rxbuf, event_idx.

Protocol: "Vhost-user Protocol" in QEMU's documentation (docs/interop/vhost-user.rst). Should the back-end go away, the
queues stay as they are; as soon as it listens again they are handed to it from where it had got to.
"""

import contextlib
import os
import socket
import struct
import threading
import time

import numpy as np

from ..core.errors import IxyError, UsageError
from ..core.memory import ANY
from ..core.pool import BUFFER_SIZE
from . import Bus, parse_options
from .virtio import Notifier, VirtioTransport

OPTIONS = {
    "wait": "seconds to wait for the back-end to listen (5)",
    "mrg_rxbuf": "on or off: whether frames may take several buffers (on; such frames are dropped and counted)",
    "event_idx": "on or off: whether to be told by index when to notify (on, if the back-end has it)",
}
MRG_RXBUF, EVENT_IDX, MTU = 1 << 15, 1 << 29, 1 << 3
PROTOCOL_FEATURES = 1 << 30  # of the device's features, but about this protocol
MQ, REPLY_ACK, NET_MTU, CONFIG = 1 << 0, 1 << 3, 1 << 4, 1 << 9  # protocol features

REQUESTS = {
    "GET_FEATURES": 1, "SET_FEATURES": 2, "SET_OWNER": 3, "SET_MEM_TABLE": 5, "SET_VRING_NUM": 8, "SET_VRING_ADDR": 9,
    "SET_VRING_BASE": 10, "GET_VRING_BASE": 11, "SET_VRING_KICK": 12, "SET_VRING_CALL": 13,
    "GET_PROTOCOL_FEATURES": 15, "SET_PROTOCOL_FEATURES": 16, "GET_QUEUE_NUM": 17, "SET_VRING_ENABLE": 18,
    "NET_SET_MTU": 20, "GET_CONFIG": 24,
}
VERSION, REPLY, NEED_REPLY = 1, 1 << 2, 1 << 3  # a message's flags
HEADER, U64, STATE = struct.Struct("<III"), struct.Struct("<Q"), struct.Struct("<II")
ADDRESSES, REGION, CONFIG_HEAD = struct.Struct("<II4Q"), struct.Struct("<4Q"), struct.Struct("<III")
MAX_REGIONS = 8
CONFIG_SIZE = 12  # mac, status, max_virtqueue_pairs, mtu: virtio 1.1, 5.1.4
MESSAGE_TIMEOUT_S, RETRY_S = 5.0, 0.1


class PeerGone(IxyError):
    """The back-end closed the connection, or does not listen."""


class Channel:
    """Messages to the back-end and its replies, each within MESSAGE_TIMEOUT_S. IxyError for anything unexpected.

    No wait goes on once the event `stopping` is set: PeerGone.
    """

    def __init__(self, name, path, stopping):
        self.name, self.stopping, self.reply_ack, self.socket = name, stopping, False, None
        try:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(MESSAGE_TIMEOUT_S)
            self.socket.connect(path)
        except OSError as error:
            self.close()
            reason = {FileNotFoundError: "there is no such socket", ConnectionRefusedError: "nobody listens there",
                      BlockingIOError: "the back-end accepts no connection"}.get(type(error))
            if reason:
                raise PeerGone(f"{name}: {reason}; start the back-end first") from None
            raise IxyError(f"{name}: cannot connect to {path}: {error.strerror or error}") from None

    def close(self):
        if self.socket:
            self.socket.close()

    def ask(self, request, payload=b"", size=8):
        """Send a request that has an answer; returns the answer, `size` bytes (None: however many)."""
        self._send(request, payload, (), VERSION)
        return self._reply(request, size)

    def tell(self, request, payload=b"", descriptors=()):
        """Send a request that has none; where the back-end confirms requests, wait for that."""
        self._send(request, payload, descriptors, VERSION | (NEED_REPLY if self.reply_ack else 0))
        if self.reply_ack:
            refused, = U64.unpack(self._reply(request, 8))
            if refused:
                raise IxyError(f"{self.name}: the back-end refuses {request} (error {refused}); see its own log")

    @contextlib.contextmanager
    def _exchange(self, request):
        self._deadline = time.monotonic() + MESSAGE_TIMEOUT_S
        try:
            yield
        except TimeoutError:
            raise IxyError(f"{self.name}: no answer to {request} within {MESSAGE_TIMEOUT_S:g} s; is the back-end "
                           "stopped, or busy with another front-end?") from None
        except OSError as error:
            raise PeerGone(f"{self.name}: the back-end is gone ({error.strerror or error})") from None

    def _wait(self, transfer, *args):
        """What `transfer` of the socket returns once it can."""
        while (left := self._deadline - time.monotonic()) > 0:
            if self.stopping.is_set():
                raise PeerGone(f"{self.name}: it is being closed")
            self.socket.settimeout(min(left, RETRY_S))
            with contextlib.suppress(TimeoutError):
                return transfer(self.socket, *args)
        raise TimeoutError

    def _send(self, request, payload, descriptors, flags):
        message = HEADER.pack(REQUESTS[request], flags, len(payload)) + payload
        with self._exchange(request):
            while message:
                sent = self._wait(socket.send_fds, [message], descriptors)
                message, descriptors = message[sent:], ()

    def _reply(self, request, size):
        with self._exchange(request):
            kind, flags, length = HEADER.unpack(self._receive(HEADER.size, request))
            expected = f"{REQUESTS[request]} with {'any number of' if size is None else size} bytes"
            if (kind != REQUESTS[request] or flags & (REPLY | 3) != REPLY | VERSION or length > 256
                    or size is not None and length != size):
                raise IxyError(f"{self.name}: the back-end answers {request} with message {kind}, flags {flags:#x}, "
                               f"{length} bytes; expected {expected}; is it a vhost-user back-end?")
            return self._receive(length, request)

    def _receive(self, size, request):
        data = b""
        while len(data) < size:
            part, descriptors, flags, _ = self._wait(socket.recv_fds, size - len(data), 8)
            for descriptor in descriptors:
                os.close(descriptor)
            if descriptors or flags & socket.MSG_CTRUNC:
                raise IxyError(f"{self.name}: the back-end answers {request} with file descriptors; expected none")
            if not part:
                raise ConnectionResetError("it closed the connection")
            data += part
        return data


class VhostUser(Bus, VirtioTransport):
    """A vhost-user device at the socket `path`; see the module. The connection is made, and minded, here."""

    vendor, device = 0x1AF4, 0x1041  # what a virtio 1.x network device has on PCI
    memory_needs, shares_memory = ANY, True

    def __init__(self, name, path, wait_s=5.0, refused_features=0):
        self.name, self.path, self.refused = name, path, refused_features
        self._regions, self._queues, self._events, self._features = [], {}, [], 0
        self._channel = self._watcher = self._failure = None
        self._stopping, self.reconnects = threading.Event(), 0
        deadline = time.monotonic() + wait_s
        while self._channel is None:
            try:
                self._channel = self._connect()
            except PeerGone as error:
                if time.monotonic() >= deadline:
                    raise IxyError(f"{error} (waited {wait_s:g} s)") from None
                time.sleep(min(RETRY_S, wait_s))

    # The seam to the driver

    def offered_features(self):
        return self._offered & ~(PROTOCOL_FEATURES | self.refused)

    def accept_features(self, features):
        self._features = features | self._offered & PROTOCOL_FEATURES

    def read_config(self, offset, size):
        return self._config[offset : offset + size] if self._config else None

    @property
    def max_queue_pairs(self):
        return self._pairs

    @property
    def connected(self):
        return self._channel is not None

    def set_queue(self, number, addresses, vector=None):
        kick = _eventfd()
        self._queues[number] = addresses, kick, _eventfd() if vector is None else self._events[vector]
        return Notifier(kick)

    def enable_interrupts(self, vectors):
        self._events = [_eventfd() for _ in range(vectors)]
        return self._events

    def map_dma(self, memory):
        self._regions.append(memory)
        return memory.iova + np.arange(memory.size // memory.page_size, dtype=np.uint64) * np.uint64(memory.page_size)

    def unmap_dma(self, memory):
        self._regions.remove(memory)

    def start(self):
        if len(self._regions) > MAX_REGIONS:
            raise UsageError(f"{self.name}: {len(self._regions)} pieces of memory; a back-end takes {MAX_REGIONS}: "
                             f"use at most {MAX_REGIONS - 1} queues")
        self._hand_over(self._channel)
        self._watcher = threading.Thread(target=self._watch, name=self.name, daemon=True)
        self._watcher.start()

    def check(self):
        if self._failure:
            raise self._failure

    def summary(self):
        return {"connected": self.connected, "reconnects": self.reconnects}

    def stop(self):
        self._stopping.set()
        if self._watcher:
            self._watcher.join()
        self._stopping.clear()  # which ended its waits; ours are still to come
        errors = []
        if self.connected and self._watcher:
            try:
                for number in self._queues if self._features & PROTOCOL_FEATURES else ():
                    self._channel.tell("SET_VRING_ENABLE", STATE.pack(number, 0))
                for number in self._queues:
                    self._channel.ask("GET_VRING_BASE", STATE.pack(number, 0))
            except PeerGone:
                pass  # what is gone is quiet
            except IxyError as error:
                errors.append(error)
        return errors

    def close(self):
        if self._channel:
            self._channel.close()
            self._channel = None
        for descriptor in {*self._events, *(end for _, kick, call in self._queues.values() for end in (kick, call))}:
            os.close(descriptor)
        self._queues, self._events = {}, []

    # The protocol

    def _connect(self):
        """A Channel to the back-end, with what it offers asked for."""
        channel = Channel(self.name, self.path, self._stopping)
        try:
            channel.tell("SET_OWNER")
            self._offered, = U64.unpack(channel.ask("GET_FEATURES"))
            protocol = 0
            if self._offered & PROTOCOL_FEATURES:
                protocol, = U64.unpack(channel.ask("GET_PROTOCOL_FEATURES"))
                protocol &= MQ | REPLY_ACK | NET_MTU | CONFIG
                channel.tell("SET_PROTOCOL_FEATURES", U64.pack(protocol))
            channel.reply_ack = bool(protocol & REPLY_ACK)
            self._pairs = min(U64.unpack(channel.ask("GET_QUEUE_NUM"))[0], 128) if protocol & MQ else 1
            self._config = _read_config(channel) if protocol & CONFIG else None
            self._tells_mtu = bool(protocol & NET_MTU)
        except BaseException:
            channel.close()
            raise
        return channel

    def _hand_over(self, channel):
        """Let the back-end work on the queues, from where their used rings say that it, or the one before, had got."""
        channel.tell("SET_FEATURES", U64.pack(self._features))
        if self._tells_mtu and self._features & MTU:
            channel.tell("NET_SET_MTU", U64.pack(BUFFER_SIZE - 14))  # without the Ethernet header
        channel.tell("SET_MEM_TABLE", STATE.pack(len(self._regions), 0) + b"".join(
            REGION.pack(memory.iova, memory.size, memory.virtual_address, memory.fd_offset)
            for memory in self._regions), [memory.fd for memory in self._regions])
        for number, (ring, kick, call) in self._queues.items():
            used = self._at(ring.used)
            used_index = int.from_bytes(used[2:4].tobytes(), "little")
            channel.tell("SET_VRING_NUM", STATE.pack(number, ring.size))
            channel.tell("SET_VRING_BASE", STATE.pack(number, used_index))
            channel.tell("SET_VRING_ADDR", ADDRESSES.pack(number, 0, *(
                self._at(iova).ctypes.data for iova in (ring.desc, ring.used, ring.avail)), 0))
            channel.tell("SET_VRING_CALL", U64.pack(number), [call])
            channel.tell("SET_VRING_KICK", U64.pack(number), [kick])
        if self._features & PROTOCOL_FEATURES:  # without, queues are enabled from the start
            for number in self._queues:
                channel.tell("SET_VRING_ENABLE", STATE.pack(number, 1))
        for _, kick, _ in self._queues.values():  # only then does a back-end start a ring
            with contextlib.suppress(BlockingIOError):  # it cannot be kicked more
                os.eventfd_write(kick, 1)

    def _at(self, iova):
        """Our own view of the memory that the device sees at `iova`."""
        for memory in self._regions:
            if 0 <= iova - memory.iova < memory.size:
                return memory.array[iova - memory.iova :]
        raise UsageError(f"{self.name}: a queue at {iova:#x}, outside of the memory that is mapped")

    # The watch on the back-end, in a thread of its own

    def _watch(self):
        try:
            while not self._stopping.wait(RETRY_S):
                if self._channel is None:
                    self._reconnect()
                elif self._is_gone():
                    channel, self._channel = self._channel, None
                    channel.close()
        except IxyError as error:
            self._failure = error

    def _is_gone(self):
        """Whether the back-end closed the connection. IxyError if it sent anything: nothing was asked."""
        self._channel.socket.setblocking(False)
        try:
            data = self._channel.socket.recv(64)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            raise IxyError(f"{self.name}: the back-end sent {data[:16].hex(' ')}… without being asked; restart it")
        return True

    def _reconnect(self):
        try:
            channel = self._connect()
        except PeerGone:
            return
        try:
            missing = self._features & ~self._offered
            if missing or self._pairs < len(self._queues) // 2:
                raise IxyError(f"{self.name}: the back-end came back with {self._pairs} queue pairs and without the "
                               f"features {missing:#x} in use; restart this side too")
            self._hand_over(channel)
        except PeerGone:
            channel.close()
        except BaseException:
            channel.close()
            raise
        else:
            self._channel = channel
            self.reconnects += 1


def _eventfd():
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _read_config(channel):
    """The first bytes of the device's configuration, or None where it says that it has none."""
    answer = channel.ask("GET_CONFIG", CONFIG_HEAD.pack(0, CONFIG_SIZE, 0) + bytes(CONFIG_SIZE), None)
    return answer[CONFIG_HEAD.size :] if len(answer) == CONFIG_HEAD.size + CONFIG_SIZE else None


def open_bus(spec, rest):
    """The vhost-user device that `spec` (the text that the user typed) describes with `rest`, PATH[,KEY=VALUE…]"""
    path, _, options = rest.partition(",")
    if not path:
        raise UsageError(f"{spec}: expected vhost-user:PATH, the socket of a vhost-user back-end")
    if len(os.fsencode(path)) > 107:
        raise UsageError(f"{spec}: a socket's path has at most 107 bytes, this one has {len(os.fsencode(path))}")
    chosen = parse_options(spec, options)
    for key in chosen:
        if key not in OPTIONS:
            raise UsageError(f"{spec}: unknown key {key!r}: expected {', '.join(OPTIONS)}")
    refused = sum(bit for key, bit in (("mrg_rxbuf", MRG_RXBUF), ("event_idx", EVENT_IDX))
                  if not _switch(spec, key, chosen.get(key, "on")))
    return VhostUser(spec, path, _seconds(spec, chosen.get("wait", "5")), refused)


def _switch(spec, key, text):
    if text not in ("on", "off"):
        raise UsageError(f"{spec}: {key}={text}: expected on or off")
    return text == "on"


def _seconds(spec, text):
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 3600:
        raise UsageError(f"{spec}: wait={text}: expected seconds, 0 to 3600")
    return value
