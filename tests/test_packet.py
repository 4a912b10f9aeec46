"""The packet view, compiled and in plain Python, against one oracle on plain bytes, with canaries all around."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.errors import TypingError
from tinynic import TinyNic

from ixy_numba import Packet, alloc_batch, packet, resize
from ixy_numba.core.jit import CHECKED, INTERPRETED, kernel
from ixy_numba.core.packet import view
from ixy_numba.core.pool import BUFFER_SIZE, BUFFER_STRIDE, HEADROOM, Pool

U = np.uint64
CANARY = 0xCC
GET, SET, BE16, BE32, BE64, SET16, SET32, SET64, PART, FROM, TO, ALL, NESTED, MOVE = range(14)
SIZES = {GET: 1, SET: 1, BE16: 2, BE32: 4, BE64: 8, SET16: 2, SET32: 4, SET64: 8}
checked_only = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast does not check accesses")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")


@kernel
def access(packet, what, a, b, c, d, value):
    """One access of each kind; what it gave as an integer."""
    if what == GET:
        return U(packet[a])
    if what == SET:
        packet[a] = value
    elif what == BE16:
        return U(packet.be16(a))
    elif what == BE32:
        return U(packet.be32(a))
    elif what == BE64:
        return U(packet.be64(a))
    elif what == SET16:
        packet.set_be16(a, value)
    elif what == SET32:
        packet.set_be32(a, value)
    elif what == SET64:
        packet.set_be64(a, value)
    elif what == PART:
        return checksum(packet[a:b])
    elif what == FROM:
        return checksum(packet[a:])
    elif what == TO:
        return checksum(packet[:b])
    elif what == ALL:
        return checksum(packet[:])
    elif what == NESTED:
        return U(packet[a:b].be16(c))
    elif what == MOVE:
        packet[a:b] = packet[c:d]
    return U(0)


@kernel
def checksum(packet):
    """Of length and bytes, so that both must be right."""
    total = U(len(packet))
    for k in range(len(packet)):
        total = (total * U(31) + U(packet[k])) & U(0xFFFFFF)
    return total


@kernel
def access_buffer(pool, handle, what, a, b, c, d, value):
    return access(packet(pool, handle), what, a, b, c, d, value)


def oracle(data, what, a, b, c, d, value):
    """The same on a bytearray, by the rules as documented; IndexError or OverflowError where they say so."""
    def inside(condition):
        if not condition:
            raise IndexError

    def sum_of(part):
        total = len(part)
        for byte in part:
            total = (total * 31 + byte) & 0xFFFFFF
        return total

    if what in SIZES:
        size = SIZES[what]
        inside(0 <= a and a + size <= len(data))
        if what in (SET, SET16, SET32, SET64):
            data[a : a + size] = value.to_bytes(size, "big")  # OverflowError
            return 0
        return int.from_bytes(data[a : a + size], "big")
    a, b = {FROM: (a, len(data)), TO: (0, b), ALL: (0, len(data))}.get(what, (a, b))
    inside(0 <= a <= b <= len(data))
    if what == NESTED:
        inside(0 <= c and c + 2 <= b - a)
        return int.from_bytes(data[a + c : a + c + 2], "big")
    if what == MOVE:
        inside(0 <= c <= d <= len(data) and d - c == b - a)
        data[a:b] = bytes(data[c:d])
        return 0
    return sum_of(data[a:b])


class Buffer:
    """A packet in the middle of a pool whose every other byte is a canary."""

    def __init__(self):
        self.pool = Pool(64)
        self.pool.map(TinyNic())
        batch = self.pool.batch()
        alloc_batch(self.pool.view, batch, U(30))
        self.handle, self.start = batch.packet[29], 29 * BUFFER_STRIDE + HEADROOM

    def fill(self, data):
        self.memory = self.pool.memory.array
        self.memory[:] = CANARY
        self.end = self.start + len(data)
        self.memory[self.start : self.end] = np.frombuffer(bytes(data), np.uint8)
        return resize(self.handle, U(len(data)))

    def contents(self):
        assert (self.memory[: self.start] == CANARY).all() and (self.memory[self.end :] == CANARY).all()
        return self.memory[self.start : self.end].tobytes()


@pytest.fixture(scope="module")
def buffer():
    return Buffer()


LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from([60, 1514, 2047, 2048]))


@st.composite
def accesses(draw):
    """(bytes, kind, four offsets near the ends of the packet or far off, value)"""
    length = draw(LENGTHS)
    near = st.one_of(st.integers(-2, min(length + 2, 24)), st.integers(length - 9, length + 2))
    offset = st.one_of(near, near, st.sampled_from([1 << 31, 1 << 32, 1 << 62, -(1 << 63), (1 << 63) - 2, -(1 << 31)]))
    data = draw(st.binary(min_size=min(length, 60), max_size=min(length, 60))).ljust(length, b"\x81")
    value = draw(st.one_of(st.integers(-2, 300), st.integers(0, 1 << 33), st.integers(-(1 << 63), (1 << 63) - 1)))
    what, a, b, c = draw(st.integers(GET, MOVE)), draw(offset), draw(offset), draw(offset)
    same_length = min(max(c + b - a, -(1 << 63)), (1 << 63) - 2)
    return data, what, a, b, c, draw(st.one_of(st.just(same_length), offset)), value


def outcome(function):
    try:
        return int(function())
    except (IndexError, OverflowError) as error:
        return type(error)


@checked_only
@pytest.mark.safety("packet_bounds")
@settings(max_examples=200 if INTERPRETED else 500)
@given(case=accesses())
def test_compiled_view(buffer, case):
    data, what, *offsets, value = case
    expected = bytearray(data)
    handle = buffer.fill(data)
    numbers = [np.int64(number) for number in (*offsets, value)]
    found = outcome(lambda: access_buffer(buffer.pool.view, handle, what, *numbers))
    assert found == outcome(lambda: oracle(expected, what, *offsets, value))
    assert buffer.contents() == expected


@settings(max_examples=300)
@given(case=accesses())
def test_plain_python_class(buffer, case):
    data, what, *offsets, value = case
    expected = bytearray(data)
    buffer.fill(data)
    plain = getattr(access, "py_func", access)
    part = Packet(buffer.memory[buffer.start : buffer.end])
    found = outcome(lambda: plain(part, what, *map(np.int64, offsets), value))
    assert found == outcome(lambda: oracle(expected, what, *offsets, value))
    assert buffer.contents() == expected


@checked_only
@pytest.mark.safety("packet_bounds")
@pytest.mark.parametrize("length", [0, 1, 7, 8, 60, 2048])
@pytest.mark.parametrize("what", SIZES)
def test_the_last_place_and_the_one_after(buffer, length, what):
    """Unsigned offsets, and each access at exactly len - size, one beyond, and at both ends of 64 bits."""
    handle = buffer.fill(bytes(length))
    places = [length - SIZES[what] + k for k in (-1, 0, 1)] + [length, (1 << 64) - 1, (1 << 64) - SIZES[what], 1 << 63]
    for place in places:
        place = place if place >= 0 else place + (1 << 64)
        numbers = [U(place), U(0), U(0), U(0), U(0xFF)]
        found = outcome(lambda numbers=numbers: access_buffer(buffer.pool.view, handle, what, *numbers))
        assert (found is IndexError) == (place > length - SIZES[what]), place
    buffer.contents()


@checked_only
def test_unsigned_values_must_fit(buffer):
    handle = buffer.fill(bytes(16))
    for what, place, size in ((SET, 0, 1), (SET16, 1, 2), (SET32, 3, 4), (SET64, 7, 8)):
        largest = (1 << 8 * size) - 1
        access_buffer(buffer.pool.view, handle, what, U(place), U(0), U(0), U(0), U(largest))
        assert buffer.contents()[place : place + size] == b"\xff" * size
        if size < 8:
            with pytest.raises(OverflowError):
                access_buffer(buffer.pool.view, handle, what, U(place), U(0), U(0), U(0), U(largest + 1))


@kernel
def swap_between(pool, left, right):
    """Copies between two packets: the Ethernet source of one becomes the other's destination."""
    packet(pool, left)[0:6] = packet(pool, right)[6:12]


def test_copies_between_packets():
    pool = Pool(64)
    pool.map(TinyNic())
    batch = pool.batch()
    alloc_batch(pool.view, batch, U(2))
    left, right = (resize(batch.packet[k], U(60)) for k in range(2))
    memory = pool.view.memory.buffer
    memory[0].octets[:12], memory[1].octets[:12] = 1, np.arange(12)
    swap_between(pool.view, left, right)
    assert memory[0].octets[:12].tolist() == [6, 7, 8, 9, 10, 11] + [1] * 6
    assert memory[1].octets[:12].tolist() == list(range(12))


@kernel
def port_of(memory, index, port):
    whole = view(memory, U(index), U(20), port)
    return whole.port, whole[5:].port, len(whole[5:])


def test_parts_keep_the_port(buffer):
    assert port_of(buffer.pool.view.memory, 3, U(7)) == (7, 7, 15)
    part = Packet(np.zeros(20, np.uint8), 7)
    assert (part.port, part[5:].port, len(part[5:])) == (7, 7, 15)


@kernel
def every_other(pool, handle):
    return len(packet(pool, handle)[0:4:2])


@kernel
def at_a_float(pool, handle):
    return packet(pool, handle)[1.5]


@kernel
def store_a_float(pool, handle):
    packet(pool, handle)[0] = 1.5


@kernel
def word_at_a_float(pool, handle):
    return packet(pool, handle).be16(1.5)


@compiled_only
@pytest.mark.parametrize("function", [every_other, at_a_float, store_a_float, word_at_a_float])
def test_what_does_not_compile(buffer, function):
    with pytest.raises(TypingError):
        function(buffer.pool.view, buffer.fill(bytes(8)))


@pytest.mark.parametrize("use, error", [
    (lambda packet: packet[0:4:2], IndexError), (lambda packet: packet[0:4:1], IndexError),
    (lambda packet: packet[1.5], TypeError), (lambda packet: packet.be16(1.5), TypeError),
    (lambda packet: packet[1.0:], TypeError), (lambda packet: packet.__setitem__(0, 1.5), TypeError)])
def test_what_plain_python_refuses_too(use, error):
    with pytest.raises(error):
        use(Packet(np.zeros(8, np.uint8)))


def test_messages_of_the_plain_class_say_where():
    part = Packet(np.zeros(8, np.uint8))
    for use, words in ((lambda: part[8], r"access outside the packet: 1 byte\(s\) at offset 8 of 8"),
                       (lambda: part.be32(5), r"access outside the packet: 4 byte\(s\) at offset 5 of 8"),
                       (lambda: part[3:9], r"slice outside the packet: \[3:9\] of 8 bytes"),
                       (lambda: part.__setitem__(slice(0, 3), part[0:2]), "slices differ in length: 3 and 2 bytes")):
        with pytest.raises(IndexError, match=words):
            use()


@pytest.mark.parametrize("length", [0, 1, 60, BUFFER_SIZE])
def test_resize_changes_the_length_alone(buffer, length):
    handle = resize(U(0xABCD_1234_0000_0007), U(length))
    assert handle == 0xABCD_0000_0000_0007 | length << 32


@kernel
def mark(packet):
    packet[0] = packet.port
    return packet.be16(len(packet) - 2)


def test_kernels_take_a_plain_packet_and_work_on_its_bytes():
    data = np.arange(20, dtype=np.uint8)
    references = sys.getrefcount(data)
    assert mark(Packet(data[4:12], 9)) == 10 << 8 | 11
    assert data[:6].tolist() == [0, 1, 2, 3, 9, 5]
    assert sys.getrefcount(data) == references
    if CHECKED:
        with pytest.raises(IndexError, match="outside the packet"):
            mark(Packet(data[:1]))


@compiled_only
@pytest.mark.parametrize("data", [
    np.zeros(8, np.uint8)[::2], np.zeros(8, np.uint16), np.zeros((2, 8), np.uint8), np.frombuffer(b"fixed", np.uint8),
    bytearray(8)])
def test_a_packet_over_other_memory_is_not_given_to_kernels(data):
    with pytest.raises(TypeError, match="contiguous, writable, one-dimensional uint8 array"):
        mark(Packet(data))
