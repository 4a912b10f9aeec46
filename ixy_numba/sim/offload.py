"""What the simulated 82599 does to a frame on its way out: checksums, segmentation, VLAN tag, padding. 7.2.4, 7.2.5."""

from ..core.jit import kernel
from ..core.raw import copy, load8, load16, load32, load64, store8, store16, store32, store64
from .checksum import LOW16, LOW32, sctp_checksum, words
from .mac import CRC_SIZE, HEADER_SIZE
from .state import MALFORMED, ONE, SCRATCH_SIZE, ZERO, U
from .wire import crc32, fold, swap16

IFCS, IC, DEXT, VLE, TSE = (U(1 << k) for k in (25, 26, 29, 30, 31))
INSERT_IP, INSERT_L4 = U(1 << 40), U(1 << 41)  # POPTS.IXSM and TXSM
IPSEC, OFFLOADS = U(1 << 42), U(7 << 40)  # all three
IPV4, L4_TYPE, L4_UDP, L4_TCP, L4_SCTP = U(1 << 10), U(3 << 11), ZERO, U(1 << 11), U(2 << 11)  # TUCMD of the context
PAYLEN_SHIFT = U(46)
ALL_FLAGS = U(0xFFF)  # of a segment that is first and last
HEADROOM = U(16)  # in front of the segment: room for a VLAN tag
LONGEST = U(SCRATCH_SIZE)


@kernel(inline=True)
def layers(out):
    """(offset of the IP header, of the L4 header, of the payload) that the context descriptor gives."""
    network = out.lengths >> U(9) & U(0x7F)
    transport = network + (out.lengths & U(0x1FF))
    return network, transport, transport + (out.tucmd >> U(40) & U(0xFF))


@kernel(inline=True)
def l4_kind(out):
    return out.tucmd & L4_TYPE


@kernel(inline=True)
def segment_size(out):
    return out.tucmd >> U(48)


@kernel(inline=True)
def segmented(out):
    return out.command & (DEXT | TSE) == DEXT | TSE


@kernel(inline=True)
def payload_size(out):
    """Bytes that go on the wire in pieces: the whole frame, or what follows the headers of a segmented one."""
    return out.length - layers(out)[2] if segmented(out) else out.length


@kernel
def possible(out):
    """Whether the offloads that the descriptors ask for fit the frame: a context that does not would hang hardware."""
    command, length = out.command, out.length
    if command & DEXT == ZERO:  # legacy: CSS and CSO
        start, field = command >> U(40) & U(0xFF), command >> U(16) & U(0xFF)
        return length <= LONGEST and (command & IC == ZERO or start < length and field + U(2) <= length)
    network, transport, payload = layers(out)
    if command & (OFFLOADS | TSE) and network < HEADER_SIZE or command & IPSEC:
        return False
    kind = l4_kind(out)
    needed = transport + (U(18) if kind == L4_TCP else U(12) if kind == L4_SCTP else U(8))
    if command & INSERT_IP and (network + U(20) > transport or transport > length):
        return False
    if command & INSERT_L4 and (needed > length or kind == L4_TYPE):
        return False
    if command & TSE == ZERO:
        return length <= LONGEST
    size = segment_size(out)
    if network + (U(20) if out.tucmd & IPV4 else U(40)) > transport:  # the IP header's length is written
        return False
    return (size > ZERO and needed <= payload <= length and payload + size <= LONGEST and kind != L4_SCTP
            and command & INSERT_L4 != ZERO and length - payload == command >> PAYLEN_SHIFT)


@kernel
def next_segment(device):
    """Make the next frame of device.outgoing in the segment buffer: (its address, its length, bytes of the outgoing).

    Length 0: the CRC that the driver brought is wrong.
    """
    out, start = device.outgoing, device.segment_at + HEADROOM
    if segmented(out):
        taken = _cut(device, start)
        length = layers(out)[2] + taken
    else:
        length = taken = out.length
        copy(start, device.tx_scratch_at, length)
    if out.command & DEXT == ZERO:
        if out.command & IC:
            _insert_legacy(start, length, out.command)
    elif out.command & OFFLOADS:
        insert(device, start, length)
    return _finish(device, start, length, taken)


@kernel
def _cut(device, start):
    """One segment of TCP or UDP with its headers brought in line; returns the bytes of payload in it. 7.2.4."""
    out = device.outgoing
    network, transport, payload = layers(out)
    size, sent = segment_size(out), out.sent
    taken = min(size, out.end - sent)
    copy(start, device.tx_scratch_at, payload)
    copy(start + payload, device.tx_scratch_at + payload + sent, taken)
    number, last = sent // size, sent + taken == out.end
    ip, l4, length = start + network, start + transport, payload + taken
    if out.tucmd & IPV4:
        store16(ip + U(2), swap16(length - network))
        store16(ip + U(4), swap16((swap16(load16(ip + U(4))) + number) & LOW16))
    else:
        store16(ip + U(4), swap16(length - network - U(40)))
    if l4_kind(out) == L4_UDP:
        store16(l4 + U(4), swap16(length - transport))
        return taken
    sequence = swap16(load16(l4 + U(4))) << U(16) | swap16(load16(l4 + U(6)))
    sequence = (sequence + sent) & LOW32
    store16(l4 + U(4), swap16(sequence >> U(16)))
    store16(l4 + U(6), swap16(sequence & LOW16))
    if last:
        kept = device.last_flags if number else ALL_FLAGS
    else:
        kept = device.middle_flags if number else device.first_flags
    store8(l4 + U(13), load8(l4 + U(13)) & kept & U(0xFF))
    return taken


@kernel
def insert(device, start, length):
    """The checksums that POPTS asks for, over the `length` bytes at `start`. 7.2.5.

    The driver has put the sum of the pseudo header into the L4 field; with segmentation, without the length in it.
    """
    out = device.outgoing
    network, transport, _ = layers(out)
    if out.command & INSERT_IP:
        store16(start + network + U(10), ZERO)
        store16(start + network + U(10), ~fold(words(start + network, transport - network)) & LOW16)
    if out.command & INSERT_L4 == ZERO:
        return
    l4, size, kind = start + transport, length - transport, l4_kind(out)
    if kind == L4_SCTP:
        store32(l4 + U(8), sctp_checksum(l4, size))
        return
    total = words(l4, size)
    if segmented(out):
        total += swap16(size)
    checksum = ~fold(total) & LOW16
    if kind == L4_UDP:
        store16(l4 + U(6), checksum if checksum else LOW16)  # 0 would mean "no checksum"
    else:
        store16(l4 + U(16), checksum)


@kernel
def _insert_legacy(start, length, command):
    """7.2.3.2.2: a checksum of all from CSS on, stored at CSO."""
    first, field = command >> U(40) & U(0xFF), command >> U(16) & U(0xFF)
    store16(start + field, ~fold(words(start + first, length - first)) & LOW16)


@kernel
def _finish(device, start, length, taken):
    """VLAN tag, padding and CRC; as `next_segment`."""
    out = device.outgoing
    if out.command & VLE:
        tag = out.lengths >> U(16) if out.command & DEXT else out.command >> U(48)
        first, second = load64(start), load32(start + U(8))
        start -= U(4)
        length += U(4)
        store64(start, first)
        store32(start + U(8), second)
        store16(start + U(12), swap16(device.tx_vlan_type))
        store16(start + U(14), swap16(tag & LOW16))
    if not (out.last & IFCS and device.tx_crc):  # the last four bytes are the driver's own CRC
        if length < HEADER_SIZE + CRC_SIZE or crc32(start, length - CRC_SIZE) != load32(start + length - CRC_SIZE):
            device.wire[MALFORMED] += ONE
            return start, ZERO, taken
        return start, length - CRC_SIZE, taken
    while device.tx_pad and HEADER_SIZE <= length < device.min_frame:
        store8(start + length, ZERO)
        length += ONE
    return start, length, taken
