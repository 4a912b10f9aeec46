"""Checksums as the simulated 82599 verifies (7.1.11) and inserts (7.2.5) them: IPv4, TCP, UDP, SCTP."""

from ..core.jit import kernel
from ..core.raw import load8, load16, load32
from .state import ZERO, U
from .wire import crc_table, fold, swap16

# Packet types: write-back bits of section 7.1.6.2
IPV4, IPV4_OPTIONS, IPV6, TCP, UDP, SCTP = U(0x10), U(0x20), U(0x40), U(0x100), U(0x200), U(0x400)
# Status and errors of the write-back: checksums that were verified, and those that were wrong
L4_CHECKED, IP_CHECKED, L4_WRONG, IP_WRONG = U(1 << 5), U(1 << 6), U(1 << 30), U(1 << 31)
LOW16, LOW32 = U(0xFFFF), U(0xFFFFFFFF)
PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_SCTP = U(6), U(17), U(132)

_CASTAGNOLI = crc_table(0x82F63B78)


@kernel
def words(address, n):
    """The sum of the little-endian 16-bit words of `n` bytes, not folded yet; an odd byte has a zero after it."""
    total, k = ZERO, ZERO
    while k + U(4) <= n:
        total += load32(address + k)
        k += U(4)
    if k + U(2) <= n:
        total += load16(address + k)
        k += U(2)
    if k < n:
        total += load8(address + k)
    return total


@kernel
def _crc32c(crc, address, n):
    for k in range(n):
        crc = crc >> U(8) ^ U(_CASTAGNOLI[(crc ^ load8(address + U(k))) & U(0xFF)])
    return crc


@kernel
def sctp_checksum(address, n):
    """CRC32c (RFC 9260) of an SCTP packet of at least 12 bytes, its checksum field taken as zero."""
    crc = _crc32c(LOW32, address, U(8))
    for _ in range(4):
        crc = crc >> U(8) ^ U(_CASTAGNOLI[crc & U(0xFF)])
    return _crc32c(crc, address + U(12), n - U(12)) ^ LOW32


@kernel
def verify(here, length, kind):
    """The bits of the write-back for the IP packet at `here`, in `length` bytes, whose packet type is `kind`."""
    status = ZERO
    if kind & IPV4:
        header, total = (load8(here) & U(15)) << U(2), swap16(load16(here + U(2)))
        if not U(20) <= header <= length:
            return ZERO
        status = IP_CHECKED if fold(words(here, header)) == LOW16 else IP_CHECKED | IP_WRONG
        pseudo = words(here + U(12), U(8))
    else:
        header, total = U(40), U(40) + swap16(load16(here + U(4)))
        pseudo = words(here + U(8), U(32))
    if not header + U(8) <= total <= length:
        return status
    start, size = here + header, total - header
    if kind & SCTP:
        right = size >= U(12) and load32(start + U(8)) == sctp_checksum(start, size)
    elif kind & UDP and load16(start + U(6)) == ZERO:
        return status  # the sender made none
    elif kind & (TCP | UDP):
        protocol = PROTOCOL_TCP if kind & TCP else PROTOCOL_UDP
        right = fold(words(start, size) + pseudo + swap16(protocol) + swap16(size)) == LOW16
    else:
        return status
    return status | (L4_CHECKED if right else L4_CHECKED | L4_WRONG)
