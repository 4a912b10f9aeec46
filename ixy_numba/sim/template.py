"""The generator's frame without what changes: an Ethernet frame with IPv4, UDP and zeros."""

import struct

from .wire import SEQUENCE_PORT

SOURCE_MAC = bytes.fromhex("025990000000")
SOURCE_IP, TARGET_IP = bytes((198, 18, 0, 1)), bytes((198, 19, 0, 1))  # RFC 2544's addresses for benchmarks


def template(mac, size):
    """(`size` bytes with source port, checksum and sequence number 0, sum of what the UDP checksum covers of them)."""
    udp_length = size - 34
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, size - 14, 0, 0, 64, 17, 0, SOURCE_IP, TARGET_IP)
    ip = ip[:10] + struct.pack(">H", ~ones_sum(ip) & 0xFFFF) + ip[12:]
    udp = struct.pack(">HHHH", 0, SEQUENCE_PORT, udp_length, 0)
    pseudo = SOURCE_IP + TARGET_IP + struct.pack(">HH", 17, udp_length)
    frame = mac + SOURCE_MAC + b"\x08\x00" + ip + udp
    return frame.ljust(size, b"\0"), ones_sum(pseudo + udp)


def ones_sum(data):
    """The one's complement sum of the big-endian 16-bit words of an even number of bytes."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
