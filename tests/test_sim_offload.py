"""What the simulated 82599 computes for drivers: checksums both ways, segmentation, VLAN tags. Scapy is the judge."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.packet import Raw
from sim_rig import DD, EOP, MAC, PEER, TX_CONTEXT, TX_DATA, TX_DEXT, TX_EOP, TX_IFCS, TX_RS, TX_WHOLE, Rig, frame
from test_sim_receive import write_pcap
from test_sim_transmit import sent

from ixy_numba.core.jit import INTERPRETED
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.sim import regs as m

TSE, VLE, IXSM, TXSM, IC = 1 << 31, 1 << 30, 1 << 40, 1 << 41, 1 << 26
UDP_TYPE, TCP_TYPE, SCTP_TYPE, IPV4 = 0, 1 << 11, 2 << 11, 1 << 10
IPCS, L4CS, VP, IPE, L4E = 1 << 6, 1 << 5, 1 << 3, 1 << 31, 1 << 30
ETHER = Ether(dst=MAC.hex(":"), src=PEER.hex(":"))
V4, V6 = IP(src="10.0.0.1", dst="10.0.0.2", id=7), IPv6(src="fd00::1", dst="fd00::2")
JUMBO = 1 | 2 | 4 | 1 << 10


@pytest.fixture
def rig(tmp_path):
    rig = Rig(f"out={tmp_path / 'out.pcap'}", n=128)
    rig.path = tmp_path / "out.pcap"
    yield rig
    rig.close()


@pytest.fixture
def play(tmp_path):
    rigs = []

    def make(*packets):
        rigs.append(Rig(f"in={write_pcap(tmp_path / f'{len(rigs)}.pcap', [bytes(one) for one in packets])}"))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def context(rig, network=14, header=20, l4=20, kind=TCP_TYPE | IPV4, mss=0, vlan=0, index=0, q=0):
    """A context descriptor: where the headers are and what they are."""
    what = kind | index << 36 | l4 << 40 | mss << 48
    rig.queue_tx(header | network << 9 | vlan << 16, TX_CONTEXT | TX_DEXT | what, q)


def pseudo_sum(ip, protocol, length):
    """The folded sum of the pseudo header, as drivers put it into the checksum field."""
    ends = bytes(ip)[12:20] if ip.version == 4 else bytes(ip)[8:40]
    data = ends + protocol.to_bytes(2, "big") + length.to_bytes(2, "big")
    total = sum(int.from_bytes(data[k : k + 2], "big") for k in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def prepared(packet, layer, protocol, segmented=False):
    """A packet's bytes as a driver hands them over: no IP checksum, the pseudo header's sum in the L4 field."""
    packet = packet.copy()
    if IP in packet:
        packet[IP].chksum = 0
    length = 0 if segmented else len(packet[layer])
    packet[layer].chksum = 0
    built = Ether(bytes(packet))
    packet[layer].chksum = pseudo_sum(built[IP] if IP in built else built[IPv6], protocol, length)
    return bytes(packet)


PAYLOADS = [b"", b"x", b"even", bytes(range(256)) * 5]
CASES = [(V4, TCP, 6, TCP_TYPE | IPV4, 20), (V6, TCP, 6, TCP_TYPE, 40), (V4, UDP, 17, UDP_TYPE | IPV4, 20),
         (V6, UDP, 17, UDP_TYPE, 40)]


@pytest.mark.parametrize("payload", PAYLOADS, ids=len)
@pytest.mark.parametrize(("ip", "layer", "protocol", "kind", "header"), CASES)
def test_checksums_are_inserted(rig, ip, layer, protocol, kind, header, payload):
    right = ETHER / ip / layer(sport=1000, dport=2000) / Raw(payload)
    context(rig, header=header, kind=kind)
    rig.send(prepared(right, layer, protocol), command=TX_WHOLE | IXSM * (header == 20) | TXSM)
    rig.run()
    assert rig.wire("model_faults") == 0
    assert sent(rig) == [bytes(right)]


def test_only_the_ip_checksum_if_only_that_is_asked_for(rig):
    right = ETHER / V4 / UDP(sport=1, dport=2, chksum=0x1234) / Raw(b"abc")
    wrong = right.copy()
    wrong[IP].chksum = 0xFFFF
    context(rig, kind=UDP_TYPE | IPV4)
    rig.send(bytes(wrong), command=TX_WHOLE | IXSM)
    rig.run()
    assert sent(rig) == [bytes(right)]


def test_a_udp_checksum_of_zero_goes_out_as_ones(rig):
    packet = ETHER / V4 / UDP(sport=0, dport=0) / Raw(b"\0\0")
    rest = ~pseudo_sum(Ether(bytes(packet))[IP], 17, 10) - 10 & 0xFFFF  # what the payload must be for a sum of ones
    packet[Raw].load = (rest if rest >= 0 else rest + 0xFFFF).to_bytes(2, "big")
    context(rig, kind=UDP_TYPE | IPV4)
    rig.send(prepared(packet, UDP, 17), command=TX_WHOLE | TXSM | IXSM)
    rig.run()
    (out,) = sent(rig)
    assert out[40:42] == b"\xff\xff" and out == bytes(packet)


def test_sctp_gets_its_crc(rig):
    right = ETHER / V4 / SCTP(sport=1, dport=2) / SCTPChunkData(data=b"twelve bytes")
    wrong = right.copy()
    wrong[SCTP].chksum = 0
    context(rig, kind=SCTP_TYPE | IPV4)
    rig.send(bytes(wrong), command=TX_WHOLE | TXSM | IXSM)
    rig.run()
    assert sent(rig) == [bytes(right)]


def test_a_legacy_descriptor_inserts_one_checksum(rig):
    right = ETHER / V4 / UDP(sport=1, dport=2) / Raw(b"hello")
    data = prepared(right, UDP, 17)
    index = rig.queue_tx(rig.put(data), TX_EOP | TX_IFCS | TX_RS | IC | len(data) | 40 << 16 | 34 << 40)
    rig.doorbell()
    rig.run()
    assert rig.sent(index)
    assert sent(rig)[0][40:42] == bytes(right)[40:42]


def test_a_queue_remembers_two_contexts(rig):
    udp, tcp = ETHER / V4 / UDP(sport=1, dport=2) / Raw(b"1"), ETHER / V4 / TCP() / Raw(b"2")
    context(rig, kind=UDP_TYPE | IPV4, index=0)
    context(rig, kind=TCP_TYPE | IPV4, index=1)
    for packet, layer, protocol, index in ((tcp, TCP, 6, 1), (udp, UDP, 17, 0), (tcp, TCP, 6, 1)):
        rig.send(prepared(packet, layer, protocol), command=TX_WHOLE | TXSM | IXSM | index << 36)
    rig.run()
    assert sent(rig) == [bytes(tcp), bytes(udp), bytes(tcp)]


@pytest.mark.parametrize(("change", "extra"), [
    ({"network": 13}, 0), ({"network": 127}, 0), ({"header": 511}, 0), ({"header": 19}, 0), ({"kind": 3 << 11}, 0),
    ({"mss": 0}, TSE), ({"l4": 0, "mss": 10}, TSE), ({"l4": 255, "mss": 10}, TSE), ({"mss": 16384}, TSE),
    ({"kind": SCTP_TYPE, "mss": 10}, TSE), ({"mss": 10}, TSE)])  # the last: a payload length that is not the frame's
def test_a_context_that_does_not_fit_the_frame_is_counted_and_nothing_goes_out(rig, change, extra):
    data = bytes(ETHER / V4 / TCP() / Raw(b"payload"))
    context(rig, **change)
    bad = rig.send(data, command=TX_WHOLE | TX_RS | TXSM | IXSM | extra)
    rig.send(frame(60))
    rig.run()
    assert rig.wire("model_faults") == 1 and rig.sent(bad)
    assert sent(rig) == [frame(60)]


@pytest.mark.parametrize("header", [0, 39])
def test_an_ipv6_header_that_is_too_short_to_be_segmented_behind_is_counted(rig, header):
    context(rig, header=header, kind=UDP_TYPE, l4=8, mss=1)
    rig.send(bytes(14 + header + 8 + 1), command=TX_WHOLE | TX_RS | TXSM | TSE | 1 << 46)
    rig.run()
    assert rig.wire("model_faults") == 1 and sent(rig) == []


# Segmentation


def segment(rig, packet, layer, protocol, kind, header, mss, pieces=1, extra=0):
    """Queue a packet to be segmented, in `pieces` descriptors."""
    l4 = 20 if layer is TCP else 8
    context(rig, header=header, kind=kind, mss=mss, l4=l4)
    data = prepared(packet, layer, protocol, segmented=True)
    size = len(data) // pieces + 1
    parts = [data[k : k + size] for k in range(0, len(data), size)]
    for k, part in enumerate(parts):
        last = TX_EOP | TX_RS if k == len(parts) - 1 else 0
        index = rig.queue_tx(rig.put(part), TX_DATA | TX_DEXT | TX_IFCS | TSE | TXSM | IXSM * (header == 20) | last
                             | len(part) | len(data) - 14 - header - l4 << 46 | extra)
    rig.doorbell()
    return index


@pytest.mark.parametrize("flags", ["A", "PA", "FPA", "CA", "FPCEA"])
@pytest.mark.parametrize(("size", "mss"), [(1, 1460), (1460, 1460), (1461, 1460), (5000, 1000), (4999, 1000), (7, 1)])
@pytest.mark.parametrize(("ip", "kind", "header"), [(V4, TCP_TYPE | IPV4, 20), (V6, TCP_TYPE, 40)])
def test_tcp_is_segmented(rig, ip, kind, header, size, mss, flags):
    payload = bytes(k % 253 for k in range(size))
    start = 0xFFFFFF00
    packet = ETHER / ip / TCP(sport=5, dport=6, seq=start, flags=flags) / Raw(payload)
    index = segment(rig, packet, TCP, 6, kind, header, mss, pieces=3)
    rig.run()
    assert rig.sent(index) and rig.wire("model_faults") == 0
    cuts = range(0, size, mss)
    expected = []
    for number, at in enumerate(cuts):
        kept = set(flags)
        if at + mss < size:
            kept -= {"F", "P"}  # only the last one
        if number:
            kept -= {"C"}  # only the first one
        one = ETHER / ip.copy() / TCP(sport=5, dport=6, seq=start + at & 0xFFFFFFFF,
                                      flags="".join(c for c in "FSRPAUECN" if c in kept)) / Raw(payload[at : at + mss])
        if IP in one:
            one[IP].id = 7 + number
        expected.append(bytes(one))
    assert rig.read(m.ALL["GPTC"]) == len(expected) == rig.read(m.ALL["QPTC"][0])
    assert sent(rig) == expected


@pytest.mark.parametrize(("ip", "kind", "header"), [(V4, UDP_TYPE | IPV4, 20), (V6, UDP_TYPE, 40)])
def test_udp_is_segmented_into_datagrams(rig, ip, kind, header):
    payload = bytes(range(250)) * 4
    segment(rig, ETHER / ip / UDP(sport=5, dport=6) / Raw(payload), UDP, 17, kind, header, 300)
    rig.run()
    expected = []
    for number, at in enumerate(range(0, 1000, 300)):
        one = ETHER / ip.copy() / UDP(sport=5, dport=6) / Raw(payload[at : at + 300])
        if IP in one:
            one[IP].id = 7 + number
        expected.append(bytes(one))
    assert sent(rig) == expected


def test_a_whole_64_kib_goes_out_and_the_next_packet_after_it(rig):
    payload = bytes(k * 7 % 251 for k in range(65000))
    packet = Ether(bytes(ETHER / V4 / TCP(sport=5, dport=6, seq=1, flags="A") / Raw(payload)))
    segment(rig, packet, TCP, 6, TCP_TYPE | IPV4, 20, 1448, pieces=17)
    rig.send(frame(60))
    rig.run()
    out = sent(rig)
    assert b"".join(one[54:] for one in out[:-1]) == payload and out[-1] == frame(60)


def test_segments_wait_for_room_and_none_is_lost_or_sent_twice():
    """A cable whose other end does not listen is full after 1024 frames."""
    rig, other = Rig("link=full", n=128), Rig("link=full", n=128)
    payload = bytes(k * 11 % 251 for k in range(1100))
    segment(rig, ETHER / V4 / TCP(sport=5, dport=6, seq=1, flags="A") / Raw(payload), TCP, 6, TCP_TYPE | IPV4, 20, 1)
    index = rig.send(frame(61))
    rig.run()
    assert not rig.sent(index) and rig.read(r.TDH[0]) == 1  # the context only
    got, first = [], 0
    for _ in range(100):
        other.step()
        taken = other.take(first=first)
        first, got = first + len(taken), got + taken
        rig.step()
    assert b"".join(one[54:] for one in got[:-1]) == payload and got[-1] == frame(61)
    assert rig.sent(index) and len(got) == 1101
    rig.close()
    other.close()


def test_a_ring_that_is_unmapped_while_its_packet_waits_is_a_fault():
    rig, other = Rig("link=gone", n=128), Rig("link=gone", n=128)
    packet = ETHER / V4 / TCP(sport=5, dport=6, seq=1, flags="A") / Raw(bytes(1100))
    segment(rig, packet, TCP, 6, TCP_TYPE | IPV4, 20, 1)
    rig.run()
    rig.bus.unmap_dma(rig.rings)
    first = 0
    for _ in range(5):
        other.step()
        first += len(other.take(first=first))
        rig.step()
    assert rig.wire("dma_faults") == 1
    rig.bus.map_dma(rig.rings)
    rig.close()
    other.close()


def test_a_queue_that_is_switched_off_gives_up_its_half_sent_packet():
    rig, other = Rig("link=half", n=128), Rig("link=half", n=128)
    packet = ETHER / V4 / TCP(sport=5, dport=6, seq=1, flags="A") / Raw(bytes(1100))
    segment(rig, packet, TCP, 6, TCP_TYPE | IPV4, 20, 1)
    rig.run()
    rig.write(r.TXDCTL[0], 0)
    rig.write(r.TDH[0], rig.tx_tail[0])
    rig.write(r.TXDCTL[0], 1 << 25)
    index = rig.send(frame(60))
    first = 0
    for _ in range(100):
        other.step()
        first += len(other.take(first=first))
        rig.step()
    assert first == 1025 and rig.sent(index)
    rig.close()
    other.close()


@settings(max_examples=10 if INTERPRETED else 60)
@given(st.integers(1, 3000), st.integers(1, 1500), st.integers(1, 5), st.booleans(), st.integers(0, 4095))
def test_any_segmentation_adds_up(tmp_path_factory, size, mss, pieces, v6, vlan):
    folder = tmp_path_factory.mktemp("tso")
    rig = Rig(f"out={folder / 'out.pcap'}", n=4096 if size // mss > 60 else 128)
    rig.path = folder / "out.pcap"
    payload = bytes(k * 13 % 256 for k in range(size))
    packet = ETHER / (V6 if v6 else V4) / TCP(sport=5, dport=6, seq=99, flags="PA") / Raw(payload)
    segment(rig, packet, TCP, 6, TCP_TYPE | (0 if v6 else IPV4), 40 if v6 else 20, mss, pieces)
    rig.run()
    got = [Ether(one) for one in sent(rig)]
    assert b"".join(bytes(one[TCP].payload) for one in got) == payload
    for one in got:
        again = one.copy()
        del again[TCP].chksum
        if IP in again:
            del again[IP].chksum
        assert bytes(again) == bytes(one)
    rig.close()


# VLAN tags on the way out


def test_a_tag_is_inserted_from_the_context(rig):
    rig.write(r.DMATXCTL, 1 | 0x8100 << 16)
    right = ETHER / Dot1Q(vlan=5, prio=3) / V4 / UDP(sport=1, dport=2) / Raw(b"abc")
    plain = ETHER / V4 / UDP(sport=1, dport=2) / Raw(b"abc")
    context(rig, kind=UDP_TYPE | IPV4, vlan=3 << 13 | 5)
    rig.send(prepared(plain, UDP, 17), command=TX_WHOLE | IXSM | TXSM | VLE)
    rig.send(bytes(plain), command=TX_WHOLE | VLE)  # without a checksum
    rig.run()
    assert sent(rig) == [bytes(right)] * 2


def test_a_tag_is_inserted_from_a_legacy_descriptor_with_the_type_of_dmatxctl(rig):
    rig.write(r.DMATXCTL, 1 | 0x88A8 << 16)
    data = frame(60)
    rig.send(data, command=TX_EOP | TX_IFCS | VLE)
    index = rig.queue_tx(rig.put(data), TX_EOP | TX_IFCS | VLE | 60 | 0x6042 << 48)
    rig.doorbell()
    rig.run()
    assert index == 1
    assert sent(rig)[1] == data[:12] + b"\x88\xa8\x60\x42" + data[12:]


def test_every_segment_gets_the_tag(rig):
    rig.write(r.DMATXCTL, 1 | 0x8100 << 16)
    packet = ETHER / V4 / TCP(sport=5, dport=6, seq=1, flags="A") / Raw(bytes(300))
    data = prepared(packet, TCP, 6, segmented=True)
    context(rig, vlan=9, mss=100)
    rig.queue_tx(rig.put(data), TX_WHOLE | TSE | TXSM | IXSM | VLE | len(data) | 300 << 46)
    rig.doorbell()
    rig.run()
    out = [Ether(one) for one in sent(rig)]
    assert [one[Dot1Q].vlan for one in out] == [9] * 3 and [len(one) for one in out] == [158] * 3


# Receive: checksums


def status_of(rig, k=0):
    rig.run()
    return rig.status(0, k)[0]


@pytest.mark.parametrize("payload", PAYLOADS, ids=len)
@pytest.mark.parametrize(("ip", "layer", "protocol", "kind", "header"), CASES)
def test_right_checksums_are_reported(play, ip, layer, protocol, kind, header, payload):
    rig = play(ETHER / ip / layer(sport=1, dport=2) / Raw(payload))
    assert status_of(rig) == DD | EOP | L4CS | (IPCS if header == 20 else 0)
    assert rig.read(m.XEC) == 0


@pytest.mark.parametrize(("where", "error"), [(15, IPE), (24, IPE), (26, IPE | L4E), (34, L4E), (50, L4E), (-1, L4E)])
@pytest.mark.parametrize("layer", [TCP, UDP])
def test_every_damaged_byte_is_found(play, layer, where, error):
    data = bytearray(bytes(ETHER / V4 / layer(sport=1, dport=2) / Raw(b"some payload, odd")))
    data[where] ^= 0x10
    rig = play(data, ETHER / V4 / layer(sport=1, dport=2))
    assert status_of(rig) & 0xFFFFFFF0 == L4CS | IPCS | error
    assert rig.status(0, 1)[0] & 0xF0000000 == 0
    assert rig.read(m.XEC) == 1 and rig.read(m.XEC) == 0
    assert len(rig.received()) == 2  # it is delivered all the same


def test_sctps_crc_is_checked(play):
    right = bytes(ETHER / V4 / SCTP(sport=1, dport=2) / SCTPChunkData(data=b"twelve bytes"))
    wrong = right[:-3] + bytes([right[-3] ^ 1]) + right[-2:]
    rig = play(right, wrong)
    assert status_of(rig) == DD | EOP | IPCS | L4CS
    assert rig.status(0, 1)[0] == DD | EOP | IPCS | L4CS | L4E
    assert int(rig.rx[0, 0, 0]) & 0xFFF0 == 0x410  # SCTP over IPv4


@pytest.mark.parametrize(("packet", "expected"), [
    (ETHER / V4 / UDP(sport=1, dport=2, chksum=0) / Raw(b"none made"), IPCS),
    (ETHER / IP(src="10.0.0.1", dst="10.0.0.2", flags="MF") / UDP(sport=1, dport=2) / Raw(b"12345678"), IPCS),
    (ETHER / IP(src="10.0.0.1", dst="10.0.0.2", frag=3) / Raw(bytes(40)), IPCS),
    (ETHER / IP(src="10.0.0.1", dst="10.0.0.2", proto=1) / Raw(bytes(40)), IPCS),
    (ETHER / IP(src="10.0.0.1", dst="10.0.0.2", len=2000) / TCP(), IPCS),  # longer than the frame
    (ETHER / IP(src="10.0.0.1", dst="10.0.0.2", len=20) / TCP(), IPCS),
    (Ether(bytes(ETHER / V4 / TCP()) + bytes(6)), IPCS | L4CS),  # padded on the wire
    (ETHER / IP(src="10.0.0.1", dst="10.0.0.2", ihl=15) / Raw(bytes(10)), 0),
    (Ether(frame(100)), 0)])
def test_what_cannot_be_checked_is_not_reported(play, packet, expected):
    rig = play(packet)
    assert status_of(rig) == DD | EOP | expected


@settings(max_examples=20 if INTERPRETED else 150)
@given(st.binary(min_size=14, max_size=120), st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x81\x00", None]))
def test_no_frame_is_read_beyond_its_end(tmp_path_factory, data, kind):
    """Whatever a frame says about itself, what stands after it in memory changes nothing."""
    data = data if kind is None else data[:12] + kind + data[14:]
    folder = tmp_path_factory.mktemp("end")
    results = []
    for neighbour in (bytes(64), b"\xff" * 64):
        rig = Rig(f"in={write_pcap(folder / 'in.pcap', [data, neighbour])}", fctrl=0x702)
        rig.run()
        results.append((rig.rx[0, 0].tolist(), rig.received()[:1]))
        rig.close()
    assert results[0] == results[1]


# Receive: VLAN


VFE = 1 << 30


def tagged(vlan, prio=0):
    return ETHER / Dot1Q(vlan=vlan, prio=prio) / V4 / UDP(sport=1, dport=2) / Raw(b"payload")


def test_a_tag_is_stripped_into_the_descriptor(play):
    rig = play(tagged(5, 3), ETHER / V4 / UDP(sport=1, dport=2))
    rig.write(r.RXDCTL[0], 1 << 25 | 1 << 30)
    rig.run()
    plain = bytes(ETHER / V4 / UDP(sport=1, dport=2) / Raw(b"payload"))
    assert rig.received() == [plain, bytes(ETHER / V4 / UDP(sport=1, dport=2))]
    assert rig.status(0, 0) == (DD | EOP | VP | IPCS | L4CS, len(plain))
    assert int(rig.rx[0, 0, 1]) >> 48 == 3 << 13 | 5
    assert rig.status(0, 1)[0] & VP == 0 and int(rig.rx[0, 1, 1]) >> 48 == 0


def test_a_tag_stays_in_the_frame_without_vme(play):
    rig = play(tagged(5))
    rig.run()
    assert rig.received() == [bytes(tagged(5))]
    assert status_of(rig) == DD | EOP | IPCS | L4CS


def test_a_stripped_frame_can_keep_its_crc(play):
    rig = play(tagged(5))
    rig.write(r.HLREG0, 1)
    rig.write(r.RXDCTL[0], 1 << 25 | 1 << 30)
    rig.run()
    (got,) = rig.received()
    assert got[:-4] == bytes(ETHER / V4 / UDP(sport=1, dport=2) / Raw(b"payload"))


def test_a_legacy_descriptor_has_tag_and_checksums_too(play):
    wrong = tagged(5)
    wrong[UDP].chksum = 1
    rig = play(tagged(7), wrong)
    rig.write(r.SRRCTL[0], 2)
    rig.write(r.RXDCTL[0], 1 << 25 | 1 << 30)
    rig.run()
    words = [int(rig.rx[0, k, 1]) for k in range(2)]
    length = len(bytes(tagged(7))) - 4
    assert words[0] == length | (DD | EOP | VP | IPCS | L4CS) << 32 | 7 << 48
    assert words[1] == length | (DD | EOP | VP | IPCS | L4CS) << 32 | 1 << 46 | 5 << 48


def test_the_vlan_filter(play):
    rig = play(tagged(0), tagged(5), tagged(37), tagged(4095), ETHER / V4 / UDP(sport=1, dport=2))
    rig.write(m.VLNCTRL, 0x8100 | VFE)
    rig.write(m.VFTA[0], 1 << 5)
    rig.write(m.VFTA[127], 1 << 31)
    rig.run()
    assert [Ether(one).vlan if Dot1Q in Ether(one) else None for one in rig.received()] == [5, 4095, None]
    assert rig.wire("filtered") == 2


def test_the_vlan_filter_knows_only_tags_of_its_type(play):
    rig = play(tagged(5))
    rig.write(m.VLNCTRL, 0x88A8 | VFE)
    rig.run()
    assert len(rig.received()) == 1
