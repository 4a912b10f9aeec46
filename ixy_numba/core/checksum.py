"""The Internet checksum (RFC 1071) and the UDP frame that generators send."""

import numpy as np

from .jit import kernel

U = np.uint64
HEADERS = 14 + 20 + 8  # Ethernet, IPv4, UDP
SEQUENCE_SIZE = 8  # the last bytes of a generated frame: a big-endian sequence number
SMALLEST = HEADERS + SEQUENCE_SIZE
UDP_START, SOURCE_PORT, UDP_CHECKSUM = 34, 34, 40  # offsets in the frame
TEST_PORT = 9  # the discard service: nobody answers


@kernel(inline=True)
def fold(total):
    """A sum of 16-bit words (uint64) in 16 bits, carries added back in; not yet inverted."""
    total = (total & U(0xFFFFFFFF)) + (total >> U(32))
    total = (total & U(0xFFFF)) + (total >> U(16))
    total = (total & U(0xFFFF)) + (total >> U(16))
    return (total & U(0xFFFF)) + (total >> U(16))


@kernel(inline=True)
def sum64(word):
    """The sum of the four 16-bit words of a uint64."""
    return (word & U(0xFFFF)) + (word >> U(16) & U(0xFFFF)) + (word >> U(32) & U(0xFFFF)) + (word >> U(48))


@kernel(inline=True)
def finish(total):
    """The checksum field for a sum of words; 0 is sent as 0xFFFF, since 0 means "none" in UDP (RFC 768)."""
    checksum = ~fold(total) & U(0xFFFF)
    return checksum if checksum != U(0) else U(0xFFFF)


def words(data):
    """The sum of the big-endian 16-bit words of `data` as an int; an odd byte is padded with zero."""
    data = bytes(data) + b"\0" * (len(data) % 2)
    return sum(int.from_bytes(data[k : k + 2], "big") for k in range(0, len(data), 2))


def udp_frame(size, source_mac, destination_mac, source_port=0):
    """An Ethernet frame of `size` bytes (no CRC): IPv4, UDP to TEST_PORT, payload and UDP checksum field zero.

    Returns (frame as a uint8 array, sum of words that its UDP checksum covers).
    """
    udp_length = size - UDP_START
    addresses = bytes([198, 18, 0, 1, 198, 18, 0, 2])  # RFC 2544: the range for benchmarks
    ip = bytearray(b"\x45\0" + (size - 14).to_bytes(2, "big") + b"\0\0\x40\0\x40\x11\0\0" + addresses)
    ip[10:12] = int(finish(U(words(ip)))).to_bytes(2, "big")
    udp = source_port.to_bytes(2, "big") + TEST_PORT.to_bytes(2, "big") + udp_length.to_bytes(2, "big") + b"\0\0"
    covered = words(addresses + b"\0\x11" + udp_length.to_bytes(2, "big") + udp)
    frame = destination_mac + source_mac + b"\x08\0" + bytes(ip) + udp
    return np.frombuffer(frame.ljust(size, b"\0"), np.uint8), covered


@kernel
def number(packet, covered, source_port, sequence):
    """Give a `udp_frame` in `packet` its source port, sequence number and checksum (all uint64)."""
    offset = len(packet) - 8
    total = sum64(sequence)
    if offset & 1:  # the number straddles the words that the checksum is over
        total = fold(total)
        total = (total >> U(8)) | (total & U(0xFF)) << U(8)
    packet.set_be16(SOURCE_PORT, source_port)
    packet.set_be16(UDP_CHECKSUM, finish(covered + source_port + total))
    packet.set_be64(offset, sequence)
