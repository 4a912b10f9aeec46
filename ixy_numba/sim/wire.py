"""What is at the other end of the cable: the generator's frames, the sink that checks them, and the FIFO between."""

import numpy as np

from ..core.capture import append
from ..core.jit import kernel
from ..core.libc import AGAIN, IO_ERROR, read_into, write_from
from ..core.raw import (
    copy,
    load8,
    load16,
    load64,
    load_acquire64,
    store8,
    store16,
    store64,
    store_release64,
)
from .state import (
    BATCH,
    FILE,
    LINK,
    ONE,
    REFUSED,
    SENT,
    SINK,
    TAP,
    UNPLUGGED,
    ZERO,
    U,
)

# The generator's frames: Ethernet, IPv4, UDP; the last 8 bytes are a sequence number, big-endian.
SEQUENCE_PORT = 9  # UDP destination port (discard); only frames to it are checked by the sink
FIRST_SOURCE_PORT = 1024  # flow k comes from this port + k
MIN_SIZE, MAX_SIZE = 60, 1514
SHORTEST, BYTE, HALF, LOW16 = U(MIN_SIZE), U(8), U(16), U(0xFFFF)
BYTES, HALVES = U(0x00FF00FF00FF00FF), U(0x0000FFFF0000FFFF)
LAST_SEQUENCE = U(1 << 62)
_IPV4, _UDP = U(0x0008), U(17)  # the type as the little-endian load sees it
_PORT = U(SEQUENCE_PORT << 8)


@kernel(inline=True)
def swap16(value):
    return (value << BYTE | value >> BYTE) & LOW16


@kernel(inline=True)
def swap64(value):
    value = (value & BYTES) << BYTE | value >> BYTE & BYTES
    value = (value & HALVES) << HALF | value >> HALF & HALVES
    return value << U(32) | value >> U(32)


@kernel(inline=True)
def fold(total):
    """The one's complement sum of the 16-bit parts of `total`, in 16 bits."""
    total = (total & U(0xFFFFFFFF)) + (total >> U(32))
    total = (total & LOW16) + (total >> HALF & LOW16) + (total >> U(32))
    total = (total & LOW16) + (total >> HALF)
    return (total & LOW16) + (total >> HALF)


@kernel(inline=True)
def generate(device, target, sequence, flow):
    """Write the generator's frame number `sequence` to `target`: the template, source port, checksum, sequence."""
    size, template = device.frame_size, device.template_at
    port = U(FIRST_SOURCE_PORT) + flow
    part = fold(sequence)
    if size & ONE:  # the number begins at an odd offset: its bytes count with the other weight
        part = swap16(part)
    checksum = ~fold(device.checksum + port + part) & LOW16
    if checksum == ZERO:
        checksum = LOW16  # 0 would mean "no checksum"
    if size == SHORTEST:  # eight stores instead of a call
        store64(target, load64(template))
        store64(target + U(8), load64(template + U(8)))
        store64(target + U(16), load64(template + U(16)))
        store64(target + U(24), load64(template + U(24)))
        store64(target + U(40), swap16(checksum))
        store64(target + U(48), ZERO)
    else:
        copy(target, template, size)
        store16(target + U(40), swap16(checksum))
    store64(target + U(32), load64(template + U(32)) | swap16(port) << HALF)
    store64(target + size - U(8), swap64(sequence))


@kernel(inline=True)
def check_sequence(queue, address, length):
    """At the sink: numbers must increase on each transmit queue. Gaps are losses, anything else is an error."""
    if length < SHORTEST or load16(address + U(36)) != _PORT:
        return
    if load16(address + U(12)) != _IPV4 or load8(address + U(23)) != _UDP:
        return
    sequence = swap64(load64(address + length - U(8)))
    if queue.checked == ZERO:
        queue.first = queue.next = sequence
    if queue.next <= sequence < LAST_SEQUENCE:
        queue.next = sequence + ONE
    else:
        queue.errors += ONE
    queue.checked += ONE


# A FIFO of frames for one writer and one reader: what a link or a TAP interface delivers.

SLOTS, SLOT_SIZE = 1024, 2048
SLOT_MASK = U(SLOTS - 1)
LONGEST = U(SLOT_SIZE - 16)  # bytes of a frame; stamp and length stand before it
_WRITTEN, _READ, _UNPLUGGED, _FIRST = U(0), U(64), U(128), U(192)
FIFO_SIZE = 192 + SLOTS * SLOT_SIZE


@kernel(inline=True)
def _slot(fifo, number):
    return fifo + _FIRST + (number & SLOT_MASK) * U(SLOT_SIZE)


@kernel
def unplug(fifo):
    """Nobody will read this FIFO any more."""
    store_release64(fifo + _UNPLUGGED, ONE)


@kernel(inline=True)
def _commit(fifo, length, stamp):
    written = load64(fifo + _WRITTEN)
    slot = _slot(fifo, written)
    store64(slot, stamp)
    store64(slot + U(8), length)
    store_release64(fifo + _WRITTEN, written + ONE)


@kernel
def push(fifo, address, length, stamp):
    """Append a frame of at most LONGEST bytes; False if the FIFO is full."""
    written = load64(fifo + _WRITTEN)
    if written - load_acquire64(fifo + _READ) == U(SLOTS):
        return False
    copy(_slot(fifo, written) + U(16), address, length)
    _commit(fifo, length, stamp)
    return True


@kernel
def front(fifo):
    """(address, length, stamp) of the oldest frame; length 0 if there is none."""
    read = load64(fifo + _READ)
    if read == load_acquire64(fifo + _WRITTEN):
        return ZERO, ZERO, ZERO
    slot = _slot(fifo, read)
    return slot + U(16), load64(slot + U(8)), load64(slot)


@kernel
def ripe(fifo, now, delay, limit):
    """How many of the oldest `limit` frames were stamped at least `delay` before `now`."""
    read, n = load64(fifo + _READ), ZERO
    limit = min(limit, load_acquire64(fifo + _WRITTEN) - read)
    while n < limit and load64(_slot(fifo, read + n)) + delay <= now:
        n += ONE
    return n


@kernel
def pop(fifo):
    store_release64(fifo + _READ, load64(fifo + _READ) + ONE)


@kernel
def read_tap(device, now):
    """Move what the TAP interface has to the inbox, at most a batch."""
    fifo = device.inbox
    for _ in range(BATCH):
        written = load64(fifo + _WRITTEN)
        if written - load_acquire64(fifo + _READ) == U(SLOTS):
            return
        n = read_into(device.tap, _slot(fifo, written) + U(16), LONGEST)
        if n <= 0:
            if n not in (0, -AGAIN, -IO_ERROR):
                _fail(device, n)
            return
        length = U(n)
        if length == LONGEST:  # it was longer, and cut off
            device.wire[REFUSED] += ONE
            continue
        while length < device.min_frame:  # the MAC of a sender pads
            store8(_slot(fifo, written) + U(16) + length, ZERO)
            length += ONE
        _commit(fifo, length, now)


@kernel
def _fail(device, result):
    device.error = U(-result)
    device.attention = ONE
    device.sink = UNPLUGGED


@kernel
def emit(device, queue, address, length, now, time_ns):
    """Put a frame on the wire; False if the other end has no room yet."""
    if device.sink == SINK:
        check_sequence(queue, address, length)
    elif device.sink == FILE:
        taken = append(device.out, address, length, time_ns)
        if device.out.wanted != ZERO:
            device.attention = ONE
        if not taken:
            return False
    elif device.sink == TAP:
        n = write_from(device.tap, address, length)
        if n == -AGAIN:
            return False
        if n < 0:
            device.wire[REFUSED] += ONE
            if n != -IO_ERROR:  # an interface that is down loses frames, as a pulled cable does
                _fail(device, n)
            return True
    elif device.sink == LINK and load_acquire64(device.outbox + _UNPLUGGED) == ZERO:
        if length > LONGEST:
            device.wire[REFUSED] += ONE
            return True
        if not push(device.outbox, address, length, now):
            return False
    else:
        device.wire[REFUSED] += ONE
        return True
    device.wire[SENT] += ONE
    return True


def crc_table(polynomial):
    """What a byte does to a CRC of 32 bits, low bit first, with this (reflected) polynomial: uint32, shape (256,)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * np.uint32(polynomial)
    return table


_TABLE = crc_table(0xEDB88320)


@kernel
def crc32(address, length):
    """The Ethernet frame check sequence; on the wire its low byte comes first."""
    crc = U(0xFFFFFFFF)
    for k in range(length):
        crc = crc >> BYTE ^ U(_TABLE[(crc ^ load8(address + U(k))) & U(0xFF)])
    return crc ^ U(0xFFFFFFFF)
