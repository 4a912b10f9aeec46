"""Pass UDP to one port only, count bytes per source: `python udp_filter.py 53 sim:in=a.pcap sim:out=b.pcap`."""

import ipaddress
import sys

import numpy as np

from ixy_numba import DROP, handler, run

IPV4, UDP = 0x0800, 17
SLOTS = 4096  # a hash table with open addressing; when it is full, further sources share the last slot looked at
STATE = np.dtype([("port", "u4"), ("source", "u4", (SLOTS,)), ("bytes", "u8", (SLOTS,))])


@handler
def only_udp(packet, state):
    if len(packet) < 42 or packet.be16(12) != IPV4 or packet[14] >> 4 != 4 or packet[23] != UDP:
        return DROP
    udp = 14 + 4 * (packet[14] & 15)
    if packet.be16(20) & 0x1FFF or packet.be16(udp + 2) != state.port:  # a later fragment has no ports
        return DROP
    source = packet.be32(26)
    slot = (source * 40503 >> 12) & (SLOTS - 1)
    for _ in range(SLOTS):
        if state.source[slot] == source or state.bytes[slot] == 0:
            break
        slot = (slot + 1) & (SLOTS - 1)
    state.source[slot] = source
    state.bytes[slot] += len(packet)
    return 1 - packet.port


if __name__ == "__main__":
    port, *devices = sys.argv[1:]
    state = np.zeros(1, np.dtype((np.record, STATE)))[0]
    state.port = int(port)
    code = run(only_udp, devices, state=state)
    used = np.flatnonzero(state.bytes)
    for slot in sorted(used, key=lambda slot: -state.bytes[slot]):
        print(f"{ipaddress.IPv4Address(int(state.source[slot]))!s:<15} {state.bytes[slot]:>12} bytes")
    sys.exit(code)
