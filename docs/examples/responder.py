"""Answer ARP and ping for one address: `python responder.py 10.9.0.2 sim:tap=ixy0`."""

import ipaddress
import sys

import numpy as np

from ixy_numba import DROP, handler, kernel, run

ARP, IPV4 = 0x0806, 0x0800
REQUEST, REPLY = 1, 2
ECHO_REQUEST, ECHO_REPLY = 8, 0
MAC = 0x02_00_00_00_0A_09  # ours; `state` holds the IPv4 address


@handler
def answer(packet, state):
    if len(packet) < 42:
        return DROP
    kind = packet.be16(12)
    if kind == ARP and packet.be16(20) == REQUEST and packet.be32(38) == state[0]:
        packet[0:6] = packet[6:12]
        write_mac(packet, 6)
        packet.set_be16(20, REPLY)
        packet[32:42] = packet[22:32]  # the asker becomes the target
        write_mac(packet, 22)
        packet.set_be32(28, state[0])
        return packet.port
    if kind == IPV4 and packet[14] == 0x45 and packet[23] == 1 and packet[34] == ECHO_REQUEST:
        if packet.be32(30) != state[0]:
            return DROP
        packet[0:6] = packet[6:12]
        write_mac(packet, 6)
        packet.set_be32(30, packet.be32(26))
        packet.set_be32(26, state[0])
        packet[34] = ECHO_REPLY
        checksum = packet.be16(36) + (ECHO_REQUEST << 8)  # RFC 1624: the sum grows by what the message lost
        packet.set_be16(36, (checksum & 0xFFFF) + (checksum >> 16))
        return packet.port
    return DROP


@kernel
def write_mac(packet, offset):
    packet.set_be16(offset, MAC >> 32)
    packet.set_be32(offset + 2, MAC & 0xFFFFFFFF)


if __name__ == "__main__":
    address, *devices = sys.argv[1:]
    sys.exit(run(answer, devices, state=np.array([int(ipaddress.IPv4Address(address))], np.uint32)))
