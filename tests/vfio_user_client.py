"""A vfio-user client for tests: just enough of the protocol to drive a served device as QEMU does."""

import array
import fcntl
import mmap
import os
import select
import socket
import struct

import numpy as np

HEADER = struct.Struct("<HHIII")
(VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, _, GET_IRQ_INFO, SET_IRQS, REGION_READ, REGION_WRITE, _, _,
 RESET) = range(1, 14)
INTX, MSI, MSIX = range(3)
BAR0, CONFIG = 0, 7
SET_EVENTFDS, UNMASK_NONE, DISABLE = 4 | 0x20, 1 | 0x10, 1 | 0x20


class Refused(Exception):
    """The server answered with an error number."""


class Memory:
    """`size` bytes that a device may reach at `iova`, sealed as QEMU's are."""

    def __init__(self, size, iova, sealed=True):
        self.size, self.iova = size, iova
        self.file = os.memfd_create("guest", os.MFD_ALLOW_SEALING if sealed else 0)
        os.ftruncate(self.file, size)
        if sealed:
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.array = np.frombuffer(mmap.mmap(self.file, size), np.uint8)
        self.words = self.array.view("<u8")

    def put(self, offset, data):
        self.array[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        return self.iova + offset

    def close(self):
        os.close(self.file)


class Client:
    def __init__(self, path, greet=True, timeout_s=60):
        self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.stream.settimeout(timeout_s)
        self.stream.connect(str(path))
        self.number = 0
        if greet:
            self.request(VERSION, struct.pack("<HH", 0, 1) + b'{"capabilities":{}}\0')

    def close(self):
        self.stream.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, command, payload=b"", files=(), flags=0):
        self.number = self.number + 1 & 0xFFFF
        message = HEADER.pack(self.number, command, HEADER.size + len(payload), flags, 0) + payload
        if files:
            socket.send_fds(self.stream, [message], list(files))
        else:
            self.stream.sendall(message)

    def receive(self):
        """(payload, files) of the reply; EOFError if the server hung up."""
        data, ancillary, _, _ = self.stream.recvmsg(HEADER.size, socket.CMSG_SPACE(64))
        files = [f for _, _, content in ancillary for f in array.array("i", content)]
        while len(data) < HEADER.size:
            data += self._more(HEADER.size - len(data))
        number, _, size, flags, error = HEADER.unpack(data)
        payload = b""
        while len(payload) < size - HEADER.size:
            payload += self._more(size - HEADER.size - len(payload))
        assert number == self.number and flags & 0xF == 1
        if flags & 0x20:
            raise Refused(error)
        return payload, files

    def _more(self, n):
        data = self.stream.recv(n)
        if not data:
            raise EOFError("the server hung up")
        return data

    def request(self, command, payload=b"", files=()):
        self.send(command, payload, files)
        return self.receive()[0]

    # Regions

    def read(self, region, offset, count):
        return self.request(REGION_READ, struct.pack("<QII", offset, region, count))[16:]

    def write(self, region, offset, data, posted=False):
        payload = struct.pack("<QII", offset, region, len(data)) + data
        self.send(REGION_WRITE, payload, flags=0x10 if posted else 0)
        if not posted:
            self.receive()

    def read32(self, offset):
        return int.from_bytes(self.read(BAR0, offset, 4), "little")

    def write32(self, offset, value):
        self.write(BAR0, offset, value.to_bytes(4, "little"), posted=True)

    def set_command(self, value):
        """PCI's command register: 2 is memory, 4 bus mastering."""
        self.write(CONFIG, 4, value.to_bytes(2, "little"))

    # DMA and interrupts

    def map(self, memory, flags=3):
        self.request(DMA_MAP, struct.pack("<IIQQQ", 32, flags, 0, memory.iova, memory.size), [memory.file])

    def unmap(self, memory):
        self.request(DMA_UNMAP, struct.pack("<IIQQ", 24, 0, memory.iova, memory.size))

    def interrupts(self, index, count):
        """`count` eventfds, connected to the first vectors of `index`."""
        files = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.request(SET_IRQS, struct.pack("<IIIII", 20, SET_EVENTFDS, index, 0, count), files)
        return files


def fired(eventfd, timeout_s=0.0):
    """How often an eventfd was written to since it was last read."""
    if not select.select([eventfd], [], [], timeout_s)[0]:
        return 0
    return int.from_bytes(os.read(eventfd, 8), "little")
