"""What the MAC of the simulated 82599 does with a received frame: size and CRC rules, filters, statistics, RSS."""

from ..core.jit import kernel
from ..core.raw import load8, load16, load64
from .checksum import (
    IPV4,
    IPV4_OPTIONS,
    IPV6,
    PROTOCOL_SCTP,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    SCTP,
    TCP,
    UDP,
    verify,
)
from .state import BPRC, CRCERRS, FILTERED, GORC, GPRC, MPRC, ONE, RFC, RJC, ROC, RUC, TOR, TPR, ZERO, U
from .wire import swap16

CRC_SIZE, HEADER_SIZE, LONGEST_STANDARD = U(4), U(14), U(1518)
MAC_MASK = U(0xFFFFFFFFFFFF)
# RSS types (write-back bits 3:0) of section 7.1.6.2, MRQC's bits
HASH_TCP4, HASH_IP4, HASH_TCP6, HASH_IP6, HASH_UDP4, HASH_UDP6 = U(1), U(2), U(3), U(5), U(7), U(8)
MRQC_TCP4, MRQC_IP4, MRQC_IP6, MRQC_TCP6, MRQC_UDP4, MRQC_UDP6 = (U(1 << k) for k in (16, 17, 20, 21, 22, 23))
ETHERTYPE_IPV4, ETHERTYPE_IPV6 = U(0x0800), U(0x86DD)


@kernel(inline=True)
def size_class(octets):
    """Which of the six frame-size counters a frame of `octets` bytes, CRC included, goes to."""
    if octets <= U(64):
        return U(0)
    if octets < U(256):
        return U(1) if octets < U(128) else U(2)
    if octets < U(1024):
        return U(3) if octets < U(512) else U(4)
    return U(5)


# The MAC: 8.2.3.22, filters of 7.1.1


@kernel
def destination_passes(device, address):
    """Whether the destination address gets through the filters of section 7.1.1.1."""
    mac = load64(address) & MAC_MASK
    if mac == MAC_MASK:
        return device.broadcast != ZERO
    if mac & ONE:
        if device.all_multicast:
            return True
        if device.multicast_on:
            bits = mac >> (U(36) - device.multicast_shift) & U(0xFFF)
            if U(device.mta[bits >> U(5)]) >> (bits & U(31)) & ONE:
                return True
    elif device.all_unicast:
        return True
    for k in range(device.addresses):
        if device.address[k] == mac:
            return True
    return False


@kernel(inline=True)
def longest_frame(device, address):
    """The longest legal frame with CRC: MAXFRS counts only for jumbo frames; a VLAN tag comes on top."""
    limit = device.max_frame if device.jumbo else LONGEST_STANDARD
    return limit + CRC_SIZE if swap16(load16(address + U(12))) == device.vlan_type else limit


@kernel(inline=True)
def tag_of(device, address, length):
    """(whether the frame has a VLAN tag of VLNCTRL.VET's type, the tag). Section 7.4."""
    if length >= U(18) and swap16(load16(address + U(12))) == device.vlan_type:
        return True, swap16(load16(address + U(14)))
    return False, ZERO


@kernel
def vlan_passes(device, address, length):
    """Whether an untagged frame, or one whose VLAN is in the table, gets through the filter of section 7.4.4."""
    if not device.vlan_filter:
        return True
    tagged, tag = tag_of(device, address, length)
    return not tagged or U(device.vfta[(tag & U(0xFFF)) >> U(5)]) >> (tag & U(31)) & ONE != ZERO


@kernel
def admit(device, address, length, bad):
    """The MAC's rules and statistics; True if the frame is for the host. `bad`: its CRC is wrong."""
    octets, count = length + CRC_SIZE, device.count
    count[TPR] += ONE
    count[TOR] += octets
    passes = destination_passes(device, address) and vlan_passes(device, address, length)
    if length < device.min_frame or octets > longest_frame(device, address):
        if passes:
            if length < device.min_frame:
                count[RFC if bad else RUC] += ONE
            else:
                count[RJC if bad else ROC] += ONE
        return False
    if bad:
        count[CRCERRS] += ONE
        return device.store_bad != ZERO
    if not passes:
        device.wire[FILTERED] += ONE
        return False
    count[GPRC] += ONE
    count[GORC] += octets
    device.rx_sizes[size_class(octets)] += ONE
    if load8(address) & ONE:
        count[BPRC if load64(address) & MAC_MASK == MAC_MASK else MPRC] += ONE
    return True


# Receive side scaling, 7.1.2.8


@kernel(inline=True)
def _toeplitz(device, position, address, n):
    value = U(0)
    for k in range(n):
        value ^= U(device.toeplitz[position + k, load8(address + U(k))])
    return value


@kernel
def classify(device, address, length):
    """(packet type | RSS type, hash, checksum status) of a frame; RSS type 0 where no enabled function fits."""
    at = HEADER_SIZE if not tag_of(device, address, length)[0] else HEADER_SIZE + U(4)
    kind = swap16(load16(address + at - U(2)))
    here = address + at
    if kind == ETHERTYPE_IPV4 and length >= at + U(20):
        header = (load8(here) & U(15)) << U(2)
        found, protocol = IPV4 if header <= U(20) else IPV4 | IPV4_OPTIONS, load8(here + U(9))
        whole = swap16(load16(here + U(6))) & U(0x3FFF) == ZERO
        addresses, size = here + U(12), 8
        tcp, udp, ip = MRQC_TCP4, MRQC_UDP4, MRQC_IP4
        hash_tcp, hash_udp, hash_ip = HASH_TCP4, HASH_UDP4, HASH_IP4
    elif kind == ETHERTYPE_IPV6 and length >= at + U(40):
        header, found, protocol, whole = U(40), IPV6, load8(here + U(6)), True
        addresses, size = here + U(8), 32
        tcp, udp, ip = MRQC_TCP6, MRQC_UDP6, MRQC_IP6
        hash_tcp, hash_udp, hash_ip = HASH_TCP6, HASH_UDP6, HASH_IP6
    else:
        return ZERO, ZERO, ZERO
    ports = whole and length >= at + header + U(4)
    wanted, hashed = ip, hash_ip
    if ports and protocol == PROTOCOL_TCP:
        found |= TCP
        if device.rss & tcp:
            wanted, hashed = tcp, hash_tcp
    elif ports and protocol == PROTOCOL_UDP:
        found |= UDP
        if device.rss & udp:
            wanted, hashed = udp, hash_udp
    elif ports and protocol == PROTOCOL_SCTP:
        found |= SCTP
    status = verify(here, length - at, found)
    if device.rss & wanted == ZERO:
        return found, ZERO, status
    value = _toeplitz(device, 0, addresses, size)
    if wanted != ip:
        value ^= _toeplitz(device, size, here + header, 4)
    return found | hashed, value, status
