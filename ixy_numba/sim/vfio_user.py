"""A simulated 82599 for another process, QEMU's `vfio-user-pci` above all: the server's side of the vfio-user protocol.

The protocol is specified in QEMU's docs/interop/vfio-user.rst. Every length, index and offset that a client sends is
checked here; DMA goes through the model's map, which has nothing but what this client mapped.
"""

import array
import contextlib
import errno
import json
import os
import socket
import stat
import struct
import sys
import threading

from ..core.errors import IxyError
from .guest_memory import GuestMemory
from .messages import FAULT, INTX, Messages, check_eventfd
from .pci import BAR2_SIZE, BAR4_SIZE, CONFIG_SIZE, VECTORS, PciFunction
from .state import MAX_MAPPINGS

PATIENCE_S = 10  # for the rest of a message, and for a reply to be taken
RETRY_S = 1  # until the next client is looked for where one could not be accepted
HEADER = struct.Struct("<HHIII")  # message id, command, size with header, flags, error number
REPLY, NO_REPLY, ERROR = 0x1, 0x10, 0x20
KIND = 0xF
ACCESS = struct.Struct("<QII")  # offset, region, count
MAX_FILES, MAX_TRANSFER = 16, 1 << 16
LONGEST = HEADER.size + ACCESS.size + MAX_TRANSFER
(VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO, SET_IRQS, REGION_READ,
 REGION_WRITE, DMA_READ, DMA_WRITE, RESET) = range(1, 14)
REGIONS, CONFIG = 9, 7  # of VFIO's PCI devices: BARs 0 to 5, ROM, configuration space, VGA
IRQS = ((1, 7), (1, 1), (VECTORS, 1), (1, 1), (0, 0))  # (count, flags): INTx can be masked and masks itself
READABLE_WRITABLE, MAPPABLE, HAS_CAPABILITIES = 3, 4, 8
# Of BAR 0: the registers of 64 queues each way.
# DEVIATION(sim-mapped-rings): a mapped RXDCTL or TXDCTL takes effect a moment later; counters among them stay 0.
RING_PAGES = ((0x1000, 0x1000), (0x6000, 0x1000))
DATA_NONE, DATA_BOOL, DATA_EVENTFD, MASK, UNMASK, TRIGGER = (1 << k for k in range(6))
UNMAP_ALL = 2


class ProtocolError(IxyError):
    """The client sent something that ends the connection."""


class Refusal(Exception):
    """A request that is well formed and not supported: the client is told so. args: errno."""


class Server:
    """Serves the device behind `bus` (a SimBus) on the unix socket `path`, one client after the other.

    `map_rings` lets the client map the queues' registers. IxyError if the socket cannot be made. Messages go to stderr.
    """

    def __init__(self, path, bus, map_rings=False):
        self.path, self.bus, self.map_rings = path, bus, map_rings
        self.function = PciFunction(bus.model, bus.device)
        self._listener, self._client, self._closed = _listen(path), None, threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"vfio-user {path}", daemon=True)
        self._thread.start()

    def close(self):
        self._closed.set()
        for one in (self._listener, self._client):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _serve(self):
        while not self._closed.is_set():
            try:
                self._client, _ = self._listener.accept()
            except OSError as error:  # most likely out of file descriptors, which come back
                if not self._closed.is_set():
                    self._say(f"no client can be accepted, trying again: {error.strerror}")
                    self._closed.wait(RETRY_S)
                continue
            with self._client:  # open until all has been said and the device is off
                if not self._closed.is_set():  # else `close` may not have seen the client
                    self._serve_client()
            self._client = None

    def _serve_client(self):
        self._say("connected")
        try:
            with contextlib.closing(Connection(self._client, self.function, self.bus.model, self.map_rings)) as one:
                one.serve()
                self._say("disconnected")
        except (IxyError, OSError) as error:
            self._say(f"connection ended: {error}")
        except Exception as error:  # a fault of this program: it must not take the device from those who come next
            self._say(f"connection ended by an internal error: {error!r}")

    def _say(self, text):
        with contextlib.suppress(OSError, ValueError):  # a device works on where nobody reads stderr any more
            print(f"{self.path}: {text}", file=sys.stderr, flush=True)


def _listen(path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
                os.unlink(path)  # left behind by a server that was killed
        listener.bind(path)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise IxyError(f"{path}: cannot listen there: {error.strerror or error}; choose another path") from None
    return listener


def _answers(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EAGAIN)  # busy, and as many wait to be accepted as can


class Connection:
    """One client of one device. The stream stays the caller's."""

    def __init__(self, stream, function, model, map_rings):
        self._stream, self._function, self._model, self._map_rings = stream, function, model, map_rings
        self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", PATIENCE_S, 0))
        self._memory, self._messages = GuestMemory(model), Messages(function)
        self._greeted, self._files = False, []
        model.connect(self._messages)
        model.watch(map_rings)
        self._accesses = {
            0: (model.bar0.size, function.read_bar0, function.write_bar0),
            2: (BAR2_SIZE, function.read_bar2, function.write_bar2),
            4: (BAR4_SIZE, function.read_bar4, function.write_bar4),
            CONFIG: (CONFIG_SIZE, function.read_config, function.write_config),
        }
        self._handlers = {
            VERSION: self._version, DMA_MAP: self._dma_map, DMA_UNMAP: self._dma_unmap, GET_INFO: self._get_info,
            GET_REGION_INFO: self._get_region_info, GET_IRQ_INFO: self._get_irq_info, SET_IRQS: self._set_irqs,
            REGION_READ: self._region_read, REGION_WRITE: self._region_write, RESET: self._reset,
        }

    def close(self):
        """The device as if the machine around it had been switched off."""
        self._function.reset()
        self._model.connect(None)
        self._memory.clear()
        self._messages.close()

    def serve(self):
        """Answer requests until the client is gone. IxyError, OSError: why the connection cannot go on."""
        while True:
            header = self._receive_header()
            if header is None:
                return
            reply, error, files = b"", 0, ()
            try:
                number, command, size, flags, _ = HEADER.unpack(header)
                if not HEADER.size <= size <= LONGEST or flags & KIND:
                    raise ProtocolError(f"message of {size} bytes with flags {flags:#x}: expected a request of "
                                        f"{HEADER.size} to {LONGEST} bytes")
                reply, *files = self._handle(command, self._receive(size - HEADER.size))
            except Refusal as refusal:
                error = refusal.args[0]
            finally:
                for descriptor in self._files:
                    os.close(descriptor)
            if not flags & NO_REPLY:
                answer = HEADER.pack(number, command, HEADER.size + len(reply), REPLY | (ERROR if error else 0), error)
                if files:
                    socket.send_fds(self._stream, [answer + reply], files)
                else:
                    self._stream.sendall(answer + reply)

    def _handle(self, command, body):
        """(payload of the reply, file descriptors to send with it)."""
        if command != VERSION and not self._greeted:
            raise ProtocolError(f"the first message is command {command}, expected {VERSION} (version)")
        handler = self._handlers.get(command)
        if handler is None:
            raise Refusal(errno.ENOTSUP)
        try:
            return handler(body)
        except struct.error:
            raise ProtocolError(f"command {command} with only {len(body)} bytes") from None

    # The stream

    def _receive_header(self):
        """16 bytes, with the file descriptors that came along in self._files; None if the client has gone."""
        self._files = []
        data, ancillary, flags, _ = self._stream.recvmsg(
            HEADER.size, socket.CMSG_SPACE(4 * MAX_FILES), socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._files += array.array("i", content[: len(content) // 4 * 4])
        try:
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(f"more than {MAX_FILES} file descriptors in a message")
            return self._receive(HEADER.size, data) if data else None
        except BaseException:
            for descriptor in self._files:
                os.close(descriptor)
            raise

    def _receive(self, size, data=b""):
        """The rest of `size` bytes; the client has to send them soon."""
        if len(data) < size:
            self._stream.settimeout(PATIENCE_S)
            try:
                while len(data) < size:
                    more = self._stream.recv(size - len(data))
                    if not more:
                        raise ProtocolError(f"a message ends after {len(data)} of {size} bytes")
                    data += more
            except TimeoutError:
                raise ProtocolError(f"a message stops after {len(data)} of {size} bytes") from None
            finally:
                self._stream.settimeout(None)
        return data

    # Requests. Each returns the reply's payload, and what file descriptors go with it.

    def _version(self, body):
        major, minor = struct.unpack_from("<HH", body)
        if major != 0:
            raise ProtocolError(f"version {major}.{minor} of the protocol, expected 0.x")
        self._greeted = True
        ours = {"max_msg_fds": MAX_FILES, "max_data_xfer_size": MAX_TRANSFER, "pgsizes": 4096,
                "max_dma_maps": MAX_MAPPINGS}
        return (struct.pack("<HH", 0, min(minor, 1)) + json.dumps({"capabilities": ours}).encode() + b"\0",)

    def _dma_map(self, body):
        _, flags, offset, iova, size = struct.unpack_from("<IIQQQ", body)
        self._memory.map(iova, size, offset, flags, self._files[0] if self._files else None)
        return (b"",)

    def _dma_unmap(self, body):
        _, flags, iova, size = struct.unpack_from("<IIQQ", body)
        if flags & ~UNMAP_ALL:
            raise Refusal(errno.ENOTSUP)  # dirty pages are not tracked
        if flags & UNMAP_ALL:
            self._memory.clear()
        else:
            self._memory.unmap(iova, size)
        return (body,)

    def _get_info(self, body):
        return (struct.pack("<IIII", 16, 3, REGIONS, len(IRQS)),)  # a PCI device that can be reset

    def _get_region_info(self, body):
        room, _, index = struct.unpack_from("<III", body)
        if index >= REGIONS:
            raise Refusal(errno.EINVAL)
        size = self._accesses[index][0] if index in self._accesses else 0
        flags, areas, files = READABLE_WRITABLE if size else 0, b"", ()
        if index == 0 and self._map_rings:
            flags |= MAPPABLE | HAS_CAPABILITIES
            areas = struct.pack("<HHIII", 1, 1, 0, len(RING_PAGES), 0)  # the only capability: sparse areas, version 1
            areas += b"".join(struct.pack("<QQ", *area) for area in RING_PAGES)
            files = (self._model.bar0_file,)
        needed = 32 + len(areas)
        reply = struct.pack("<IIIIQQ", needed, flags, index, 32 if areas else 0, size, 0)
        return (reply + areas if room >= needed else reply, *files)

    def _get_irq_info(self, body):
        _, _, index = struct.unpack_from("<III", body)
        if index >= len(IRQS):
            raise Refusal(errno.EINVAL)
        count, flags = IRQS[index]
        return (struct.pack("<IIII", 16, flags, index, count),)

    def _set_irqs(self, body):
        _, flags, index, first, count = struct.unpack_from("<IIIII", body)
        if index > FAULT or first + count > IRQS[index][0]:
            raise Refusal(errno.EINVAL)
        kind, action = flags & (DATA_NONE | DATA_BOOL | DATA_EVENTFD), flags & (MASK | UNMASK | TRIGGER)
        vectors = range(first, first + count)
        if kind == DATA_BOOL:
            chosen = struct.unpack_from(f"<{count}B", body, 20)
            vectors = [vector for vector, wanted in zip(vectors, chosen, strict=True) if wanted]
        with self._model.held():
            if action == TRIGGER and kind == DATA_EVENTFD:
                self._connect(index, vectors)
            elif action == TRIGGER and kind == DATA_NONE and count == 0:
                self._messages.disconnect(index)
            elif action == TRIGGER and kind in (DATA_NONE, DATA_BOOL):
                for vector in vectors:
                    self._messages.trigger(index, vector)
            elif action in (MASK, UNMASK) and kind in (DATA_NONE, DATA_BOOL) and index == INTX:
                self._messages.mask_pin(action == MASK)
            else:
                raise Refusal(errno.EINVAL)
        return (b"",)

    def _connect(self, index, vectors):
        """A vector an eventfd, in order; a vector for which none was sent is disconnected."""
        try:
            for descriptor in self._files:
                check_eventfd(descriptor)
        except OSError:
            raise ProtocolError("an interrupt's file descriptor is no eventfd") from None
        for vector in vectors:
            self._messages.connect(index, vector, self._files.pop(0) if self._files else None)

    def _access(self, body):
        offset, region, count = ACCESS.unpack_from(body)
        size, read, write = self._accesses.get(region, (0, None, None))
        if not 0 < count <= MAX_TRANSFER or offset + count > size:
            raise ProtocolError(f"access of {count} bytes at {offset:#x} of region {region}, which has {size}")
        return offset, count, read, write

    def _region_read(self, body):
        offset, count, read, _ = self._access(body)
        return (body[: ACCESS.size] + read(offset, count),)

    def _region_write(self, body):
        offset, count, _, write = self._access(body)
        data = body[ACCESS.size : ACCESS.size + count]
        if len(data) < count:
            raise ProtocolError(f"a write of {count} bytes with only {len(data)}")
        write(offset, data)
        return (body[: ACCESS.size],)

    def _reset(self, body):
        self._function.reset()
        return (b"",)
