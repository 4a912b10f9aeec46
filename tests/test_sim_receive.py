"""The receive path of the simulated 82599: MAC rules, filters, RSS, descriptors, drops. Frames come from captures."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_rig import DD, ENABLE, EOP, MAC, RXE, TX_WHOLE, Rig, frame

from ixy_numba.core.jit import INTERPRETED
from ixy_numba.core.memory import DmaMemory
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.sim import regs as m

UPE, MPE, BAM, SBP = 1 << 9, 1 << 8, 1 << 10, 1 << 1
JUMBO, NO_STRIP = 1 | 2 | 4 | 1 << 10, 1 | 1 << 10
BROADCAST = b"\xff" * 6
CHECKSUMS_RIGHT = 3 << 5  # IPCS and L4CS


def write_pcap(path, frames):
    """A little-endian microsecond capture, by hand."""
    with open(path, "wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for k, data in enumerate(frames):
            file.write(struct.pack("<IIII", k, 0, len(data), len(data)) + data)
    return path


@pytest.fixture
def play(tmp_path):
    """play(frames, more keys, rig options): a rig whose wire brings these frames."""
    rigs = []

    def make(frames, text="", **more):
        path = write_pcap(tmp_path / f"{len(rigs)}.pcap", frames)
        rigs.append(Rig(f"in={path}" + (f",{text}" if text else ""), **more))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_one_frame_one_descriptor(play):
    rig = play([frame(100)])
    assert rig.step() == 1
    status, length = rig.status(0, 0)
    assert status == DD | EOP and length == 100
    assert rig.buffer(0, 0)[:100].tobytes() == frame(100)
    assert not rig.buffer(0, 0)[100:].any()
    assert rig.read(r.RDH[0]) == 1
    assert rig.status(0, 1)[0] == 0


def test_nothing_is_written_beyond_the_frame(play):
    rig = play([frame(length) for length in range(14, 200)], n=256)
    rig.rx_data.array[:] = 0xEE
    rig.step(200)
    for k, length in enumerate(range(14, 200)):
        assert rig.buffer(0, k)[:length].tobytes() == frame(length)
        assert (rig.buffer(0, k)[length:] == 0xEE).all()


@pytest.mark.parametrize(("length", "pieces"), [(1024, [1024]), (1025, [1024, 1]), (2048, [1024, 1024]),
                                                (9000, [1024] * 8 + [808])])
def test_a_frame_longer_than_the_buffer_spans_descriptors(play, length, pieces):
    rig = play([frame(length)], buffer_kib=1)
    rig.write(r.HLREG0, JUMBO)
    rig.write(r.MAXFRS, 9728 << 16)
    rig.step()
    found = [rig.status(0, k) for k in range(len(pieces))]
    assert [length for _, length in found] == pieces
    assert [status for status, _ in found] == [DD] * (len(pieces) - 1) + [DD | EOP]
    assert rig.received() == [frame(length)]
    assert rig.read(m.ALL["QPRC"][0]) == 1 and rig.read(r.RDH[0]) == len(pieces)


@pytest.mark.parametrize("kib", [1, 2, 4, 16])
def test_srrctl_sets_the_buffer_size(play, kib):
    rig = play([frame(9000)], buffer_kib=kib, n=64)
    rig.write(r.HLREG0, JUMBO)
    rig.write(r.MAXFRS, 9728 << 16)
    memory = DmaMemory(64 << 14)
    rig.bus.map_dma(memory)
    for k in range(64):
        rig.rx[0, k, 0] = memory.iova + (k << 14)
    rig.step()
    assert rig.status(0, 0)[1] == min(9000, kib << 10)
    rig.close()
    memory.close()


def test_the_ring_wraps(play):
    frames = [frame(60 + k % 40, fill=k & 255) for k in range(1000)]
    rig, got, first = play(frames, n=64), [], 0
    while len(got) < len(frames):
        assert rig.step(17) > 0
        taken = rig.take(first=first)
        first += len(taken)
        got += taken
    assert got == frames and rig.bus.finished


def test_a_legacy_queue_gets_legacy_write_backs(play):
    rig = play([frame(100)])
    rig.write(r.SRRCTL[0], 2)
    rig.step()
    assert int(rig.rx[0, 0, 1]) == 100 | (DD | EOP) << 32


def test_generated_frames_come_into_legacy_queues_too():
    rigs = [Rig("gen=line,size=200,frames=50") for _ in range(2)]
    rigs[1].write(r.SRRCTL[0], 2)
    before = rigs[1].rx[0].copy()
    for rig in rigs:
        while rig.step(7, elapsed_us=100) or rig.model.state.taken < 50:
            rig.write(r.RDT[0], rig.read(r.RDT[0]) ^ 1)  # the generator's clock starts with the first answer
    assert (rigs[1].rx[0, :, 0] == before[:, 0]).all()  # a legacy write-back leaves the buffer's address
    for k in range(50):
        assert int(rigs[1].rx[0, k, 1]) == 200 | (DD | EOP | CHECKSUMS_RIGHT) << 32
        assert rigs[0].buffer(0, k)[14:200].tobytes() == rigs[1].buffer(0, k)[14:200].tobytes()
    for rig in rigs:
        rig.close()


# Enables


@pytest.mark.parametrize("off", [lambda rig: rig.write(r.RXCTRL, 0), lambda rig: rig.write(r.RXDCTL[0], 0),
                                 lambda rig: rig.write(m.SECRXCTRL, 2)])
def test_nothing_arrives_while_receiving_is_off(play, off):
    rig = play([frame()])
    off(rig)
    assert rig.step() == 0 and rig.status(0, 0)[0] == 0
    assert rig.read(m.ALL["TPR"]) == 0


# Frame size and CRC rules


@pytest.mark.parametrize(("length", "kind", "good"), [(1514, b"\x08\x00", True), (1515, b"\x08\x00", False),
                                                      (1518, b"\x81\x00", True), (1519, b"\x81\x00", False)])
def test_the_longest_standard_frame_and_the_vlan_tag_on_top(play, length, kind, good):
    rig = play([frame(length, kind=kind)])
    rig.write(r.MAXFRS, 9728 << 16)  # counts only with JUMBOEN
    rig.step()
    assert len(rig.received()) == good
    assert rig.read(r.ROC) == (not good)


def test_maxfrs_limits_jumbo_frames(play):
    rig = play([frame(2996), frame(2997)], n=128)
    rig.write(r.HLREG0, JUMBO)
    rig.write(r.MAXFRS, 3000 << 16)
    rig.step()
    assert rig.received() == [frame(2996)] and rig.read(r.ROC) == 1


def test_short_frames_are_kept_by_default_and_runts_with_min_frame(play):
    rig = play([frame(14), frame(59)])
    rig.step()
    assert rig.received() == [frame(14), frame(59)]
    rig = play([frame(59), frame(60)], "min_frame=60")
    rig.step()
    assert rig.received() == [frame(60)] and rig.read(r.RUC) == 1 and rig.read(m.ALL["GPRC"]) == 1


def test_frames_that_cannot_be_are_left_out_with_a_warning(play, capsys):
    rig = play([frame(13), frame(60), b"", frame(17000)])
    assert "3 of 4 frames" in capsys.readouterr().err
    rig.step()
    assert rig.received() == [frame(60)] and rig.wire("malformed") == 3
    assert rig.bus.finished is False
    rig.give(0, 1)
    assert rig.bus.finished is True


def test_the_crc_is_delivered_where_it_is_not_stripped(play):
    data = frame(77)
    rig = play([data])
    rig.write(r.HLREG0, NO_STRIP)
    rig.step()
    assert rig.received() == [data + struct.pack("<I", zlib.crc32(data))]
    assert rig.read(m.ALL["GORCL"]) == 81


def test_damaged_frames_count_as_crc_errors_and_go_no_further(play):
    rig = play([frame(fill=k) for k in range(20)], "corrupt=1")
    rig.step()
    assert rig.received() == [] and rig.read(r.CRCERRS) == 20 and rig.wire("corrupted") == 20
    assert rig.read(m.ALL["GPRC"]) == 0 and rig.read(m.ALL["TPR"]) == 20


def test_store_bad_packets_delivers_them_marked_and_one_bit_off(play):
    rig = play([frame(fill=0)] * 20, "corrupt=1", fctrl=UPE | MPE | BAM | SBP)
    rig.step()
    assert all(rig.status(0, k)[0] == DD | EOP | RXE for k in range(20))
    for got in rig.received():
        different = int.from_bytes(got, "big") ^ int.from_bytes(frame(fill=0), "big")
        assert different.bit_count() == 1
    assert rig.read(m.ALL["GPRC"]) == 0


@pytest.mark.parametrize(("length", "register"), [(40, "RFC"), (1600, "RJC")])
def test_bad_size_and_bad_crc_have_counters_of_their_own(play, length, register):
    rig = play([frame(length)], "corrupt=1,min_frame=60")
    rig.step()
    assert rig.read(m.ALL[register]) == 1 and rig.read(r.CRCERRS) == rig.read(r.RUC) == rig.read(r.ROC) == 0


# Destination filters

OTHER, GROUP = bytes.fromhex("02aaaaaaaaaa"), bytes.fromhex("01005e0a0b0c")


@pytest.mark.parametrize(("target", "fctrl", "passes"), [
    (MAC, 0, True), (OTHER, 0, False), (OTHER, UPE, True), (OTHER, MPE | BAM, False),
    (GROUP, 0, False), (GROUP, UPE | BAM, False), (GROUP, MPE, True),
    (BROADCAST, 0, False), (BROADCAST, UPE | MPE, False), (BROADCAST, BAM, True)])
def test_who_gets_through(play, target, fctrl, passes):
    rig = play([frame(target=target)], fctrl=fctrl)
    rig.step()
    assert len(rig.received()) == passes
    assert rig.wire("filtered") == (not passes) and rig.read(m.ALL["GPRC"]) == passes
    assert rig.read(m.ALL["TPR"]) == 1


def test_every_receive_address_with_its_valid_bit_is_accepted(play):
    rig = play([frame(target=OTHER), frame(target=MAC)], fctrl=0)
    rig.write(r.RAL[127], int.from_bytes(OTHER[:4], "little"))
    rig.write(r.RAH[127], int.from_bytes(OTHER[4:], "little") | 1 << 31)
    rig.write(r.RAH[0], int.from_bytes(MAC[4:], "little"))  # no longer valid
    rig.step()
    assert rig.received() == [frame(target=OTHER)]


def multicast_vector(mac, offset):
    """The 12 bits as drivers compute them, from the fifth and sixth byte."""
    low, high = mac[4], mac[5]
    return (low >> 4 | high << 4, low >> 3 | high << 5, low >> 2 | high << 6, low | high << 8)[offset] & 0xFFF


@pytest.mark.parametrize("offset", range(4))
def test_the_multicast_table_is_indexed_by_12_bits_of_the_address(play, offset):
    rig = play([frame(target=GROUP), frame(target=GROUP[:5] + b"\xff")], fctrl=0)
    vector = multicast_vector(GROUP, offset)
    rig.write(r.MTA[vector >> 5], 1 << (vector & 31))
    rig.write(m.MCSTCTRL, offset | 4)
    rig.step()
    assert rig.received() == [frame(target=GROUP)] and rig.read(r.MPRC) == 1
    rig.write(m.MCSTCTRL, offset)  # the table counts only with MFE


def test_group_addresses_have_counters_of_their_own(play):
    rig = play([frame(target=target) for target in (MAC, GROUP, GROUP, BROADCAST)])
    rig.step()
    assert (rig.read(r.MPRC), rig.read(r.BPRC), rig.read(m.ALL["GPRC"])) == (2, 1, 4)


def test_frames_are_counted_by_size_with_crc(play):
    lengths = [60, 61, 123, 124, 251, 252, 507, 508, 1019, 1020, 1514]
    rig = play([frame(length) for length in lengths])
    rig.step()
    assert [rig.read(one) for one in m.PRC.each()] == [1, 2, 2, 2, 2, 2]
    assert rig.read(m.ALL["GORCL"]) == sum(lengths) + 4 * len(lengths)


# Drops


def test_a_capture_waits_for_descriptors(play):
    rig = play([frame(fill=k) for k in range(100)], n=32)
    assert rig.step(100) == 31 and rig.step(100) == 0
    assert rig.take() == [frame(fill=k) for k in range(31)]
    assert rig.step(100) == 31
    assert rig.read(r.MPC[0]) == rig.read(r.QPRDC[0]) == 0


def start_paced(rig):
    """The first frame in, its descriptor given back: now the wire's clock runs."""
    assert rig.step() == 1 and rig.step(elapsed_us=1000) == 0
    rig.give(0, 1)
    rig.step()


@pytest.mark.parametrize("text", ["gen=1e6,frames=2000", "gen=1e6,frames=2000,flows=7,loss=0.000000001"])
def test_drop_en_drops_what_finds_no_descriptor(text):
    rig = Rig(text, n=64)
    rig.write(r.SRRCTL[0], 2 | 1 << 25 | 1 << 28)
    start_paced(rig)
    rig.step(4000, elapsed_us=200)
    assert rig.wire("received") == 201 and rig.read(r.QPRDC[0]) == 201 - 64
    assert rig.read(m.ALL["QPRC"][0]) == 64 and rig.read(r.MPC[0]) == 0 and rig.read(r.RDH[0]) == 0
    rig.close()


@pytest.mark.parametrize("text", ["gen=1e6,frames=2000", "gen=1e6,frames=2000,flows=7,loss=0.000000001"])
def test_without_drop_en_the_packet_buffer_fills_first(text):
    rig = Rig(text, n=64)
    rig.write(r.RXPBSIZE[0], 2 << 10)  # 2 KiB: 32 frames of 64 bytes
    start_paced(rig)
    for _ in range(4):
        rig.step(4000, elapsed_us=50)
    assert rig.read(r.MPC[0]) == 201 - 64 - 32 and rig.read(r.QPRDC[0]) == 0
    rig.give(0, 63)
    rig.step(4000)
    assert rig.read(m.ALL["QPRC"][0]) == 64 + 32
    assert rig.read(m.ALL["GPRC"]) == 201, "missed frames count as good: they came through the filter"
    rig.close()


def test_a_frame_for_a_queue_that_is_off_is_lost(play):
    rig = play([frame()], queues=2)
    rig.write(r.RXDCTL[0], 0)
    rig.step()
    assert rig.wire("no_queue") == 1


def test_a_tail_outside_the_ring_gives_nothing(play):
    rig = play([frame()], enable=False)
    rig.write(r.RXDCTL[0], ENABLE)
    rig.write(r.RDT[0], 64)
    assert rig.step() == 0 and rig.wire("model_faults") > 0


def test_a_frame_that_no_ring_could_hold_does_not_block(play):
    rig = play([frame(9000), frame(60)], n=8, buffer_kib=1)
    rig.write(r.HLREG0, JUMBO)
    rig.write(r.MAXFRS, 9728 << 16)
    rig.step()
    assert rig.received() == [frame(60)] and rig.wire("model_faults") == 1


# DMA


def test_a_buffer_that_is_not_mapped_is_a_fault_and_nothing_else(play):
    rig = play([frame(fill=1), frame(fill=2)])
    rig.rx[0, 0, 0] = 0xDEAD0000
    rig.step()
    assert rig.wire("dma_faults") == 1
    assert rig.buffer(0, 1)[:60].tobytes() == frame(fill=2)


@pytest.mark.parametrize(("room", "fault"), [(100, 0), (99, 1), (1, 1)])
def test_a_frame_may_not_cross_the_end_of_a_mapping(play, room, fault):
    rig = play([frame(100)])
    memory = rig.tx_data
    rig.rx[0, 0, 0] = memory.iova + memory.size - room
    rig.step()
    assert rig.wire("dma_faults") == fault
    assert memory.array[-room:].tobytes() == frame(100)[:room]


@pytest.mark.parametrize("text", ["in=capture", "frames=1,size=100"])
def test_a_buffer_may_lie_in_two_mappings(play, text):
    """As behind an IOMMU, where each page may be one."""
    rig = play([frame(100)]) if text == "in=capture" else Rig(text)
    memory, here = rig.tx_data, np.zeros(4096, np.uint8)
    rig.bus.unmap_dma(memory)
    first, end = memory.array.ctypes.data, memory.iova + memory.size
    rig.model.map(memory.iova, memory.size, first)
    rig.model.map(end, len(here), here.ctypes.data)
    rig.rx[0, 0, 0] = end - 30
    rig.step()
    assert rig.wire("dma_faults") == 0
    received = memory.array[-30:].tobytes() + here[:70].tobytes()
    assert not here[70:].any() and received[12:14] == (b"\x88\xb5" if text == "in=capture" else b"\x08\x00")
    rig.tx[0, 0] = end - 30, TX_WHOLE | 100 | 100 << 46
    rig.write(r.TDT[0], 1)
    rig.step()
    assert rig.read(r.GPTC) == 1 and rig.wire("dma_faults") == 0


def test_unmapped_memory_is_out_of_reach_at_once(play):
    rig = play([frame(fill=1), frame(fill=2)])
    rig.step(1)
    rig.bus.unmap_dma(rig.rx_data)
    rig.step(1)
    assert rig.wire("dma_faults") == 1
    assert not rig.buffer(0, 1).any()


@pytest.mark.parametrize("text", ["frames=100", "frames=100,loss=0.000000001"])
def test_a_ring_that_is_not_mapped_stops_its_queue(text):
    rig = Rig(text)
    rig.step(3)
    rig.bus.unmap_dma(rig.rings)
    rig.step()
    assert rig.wire("dma_faults") == 1 and rig.model.state.rx[0].enabled == 0
    before = rig.rings.array.copy()
    rig.step()
    assert (rig.rings.array == before).all() and rig.wire("dma_faults") == 1
    rig.close()


@settings(max_examples=60 if not INTERPRETED else 10)
@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.booleans()), min_size=1, max_size=8), st.data())
def test_no_descriptor_makes_the_device_write_outside_the_map(words, data):
    """Descriptors full of garbage: faults are counted, memory that is mapped but not named stays as it was."""
    rig = Rig("frames=50")
    guard = rig.tx_data.array.copy()
    for k, (address, near) in enumerate(words):
        edge = rig.rx_data.iova + data.draw(st.sampled_from([0, rig.rx_data.size])) + address % 128 - 64
        rig.rx[0, k, 0] = edge if near else address
    rig.step()
    assert (rig.tx_data.array == guard).all()
    assert rig.wire("received") == 50
    rig.close()


# Receive side scaling, with Microsoft's verification suite: address, port, address, port, hash of addresses, with ports

KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
SUITE4 = [("161.142.100.80", 1766, "66.9.149.187", 2794, 0x323E8FC2, 0x51CCC178),
          ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xD718262A, 0xC626B0EA),
          ("12.22.207.184", 38024, "24.19.198.95", 12898, 0xD2D0A5DE, 0x5C2B394A),
          ("209.142.163.6", 2217, "38.27.205.30", 48228, 0x82989176, 0xAFC7327F),
          ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x5D1809C5, 0x10E828A2)]
SUITE6 = [("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x2CC18CD5, 0x40207D3D),
          ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0x0F0C461C, 0xDDE51BBF),
          ("fe80::200:f8ff:fe21:67cf", 38024, "3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, 0x4B61E985, 0x02D1FEEF)]
IP4, TCP4, UDP4, IP6, TCP6, UDP6 = 1 << 17, 1 << 16, 1 << 22, 1 << 20, 1 << 21, 1 << 23
ALL_HASHES = IP4 | TCP4 | UDP4 | IP6 | TCP6 | UDP6


def ip_frame(source, source_port, target, target_port, protocol, vlan=False, fragment=0):
    import ipaddress
    a, b = ipaddress.ip_address(source).packed, ipaddress.ip_address(target).packed
    payload = struct.pack(">HH", source_port, target_port) + bytes(30)
    if len(a) == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, 0) + a + b
        kind = b"\x08\x00"
    else:
        header = struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64) + a + b
        kind = b"\x86\xdd"
    return MAC + bytes(6) + (b"\x81\x00\x00\x05" if vlan else b"") + kind + header + payload


def use_rss(rig, fields=ALL_HASHES, entries=None):
    for k in range(10):
        rig.write(r.RSSRK[k], int.from_bytes(KEY[4 * k : 4 * k + 4], "little"))
    entries = entries or [k % 16 for k in range(128)]
    for k in range(32):
        rig.write(r.RETA[k], int.from_bytes(bytes(entries[4 * k : 4 * k + 4]), "little"))
    rig.write(r.MRQC, 1 | fields)


@pytest.mark.parametrize("vlan", [False, True])
@pytest.mark.parametrize(("suite", "protocol", "kind", "packet_type"), [
    (SUITE4, 6, 1, 0x110), (SUITE4, 17, 7, 0x210), (SUITE4, 1, 2, 0x10),
    (SUITE6, 6, 3, 0x140), (SUITE6, 17, 8, 0x240), (SUITE6, 58, 5, 0x40)])
def test_the_hash_of_microsofts_verification_suite(play, suite, protocol, kind, packet_type, vlan):
    # The suite's first column is the destination.
    frames = [ip_frame(b, q, a, p, protocol, vlan) for a, p, b, q, _, _ in suite]
    rig = play(frames, queues=16)
    use_rss(rig)
    assert rig.step() == len(frames)
    for data, (_, _, _, _, two, four) in zip(frames, suite, strict=True):
        expected = four if protocol in (6, 17) else two
        queue = expected % 16
        found = [int(word) for word in rig.rx[queue, :, 0] if int(word) >> 32 == expected]
        assert found == [expected << 32 | packet_type | kind]
        assert data in rig.received(queue)


@pytest.mark.parametrize(("fields", "kind"), [(IP4, 2), (TCP4, 0), (UDP4, 7), (UDP4 | IP4, 7), (0, 0)])
def test_mrqc_chooses_the_fields(play, fields, kind):
    rig = play([ip_frame("1.2.3.4", 5, "6.7.8.9", 10, 17)], queues=2)
    use_rss(rig, fields, [1] * 128)
    rig.step()
    queue = 1 if kind else 0
    assert int(rig.rx[queue, 0, 0]) & 15 == kind and rig.status(queue, 0)[0] & DD


@pytest.mark.parametrize("fragment", [0x2000, 0x0001])
def test_fragments_are_hashed_without_ports(play, fragment):
    a, p, b, q, two, _ = SUITE4[0]
    rig = play([ip_frame(b, q, a, p, 6, fragment=fragment)], queues=16)
    use_rss(rig)
    rig.step()
    assert int(rig.rx[two % 16, 0, 0]) == two << 32 | 0x12


def test_what_is_not_ip_goes_to_queue_0(play):
    rig = play([frame()], queues=2)
    use_rss(rig, entries=[1] * 128)
    rig.step()
    assert rig.received(0) == [frame()] and int(rig.rx[0, 0, 0]) == 0


def test_without_rss_all_goes_to_queue_0_with_its_packet_type(play):
    rig = play([ip_frame("1.2.3.4", 5, "6.7.8.9", 10, 6)], queues=2)
    rig.step()
    assert int(rig.rx[0, 0, 0]) == 0x110


def test_a_flow_keeps_its_queue_and_flows_spread():
    rig = Rig("frames=2000,flows=100", n=1024, queues=4)
    use_rss(rig, entries=[k % 4 for k in range(128)])
    rig.run(500)
    queues = {}
    for q in range(4):
        for data in rig.received(q):
            queues.setdefault(data[34:36], set()).add(q)
    assert len(queues) == 100 and all(len(where) == 1 for where in queues.values())
    assert {q for where in queues.values() for q in where} == {0, 1, 2, 3}
    rig.close()


# The short way of the generator must do what the long way does


@settings(max_examples=25 if not INTERPRETED else 4)
@given(st.integers(60, 300), st.integers(1, 70), st.lists(st.integers(1, 80), min_size=1, max_size=12))
def test_generated_frames_are_the_same_the_short_and_the_long_way(size, flows, steps):
    text = f"frames=400,size={size},flows={flows}"
    rigs = [Rig(text), Rig(f"{text},loss=0.0000000001")]
    first = 0
    for count in steps:
        assert len({rig.step(count) for rig in rigs}) == 1
        n = len(rigs[0].received(first=first))
        where = [(first + k) % rigs[0].n for k in range(n)]
        assert (rigs[0].rx[0, where] == rigs[1].rx[0, where]).all()
        frames = [rig.take(first=first) for rig in rigs]
        assert frames[0] == frames[1]
        first += n
    for register in (r.TABLE | m.TABLE).values():
        if register.at == "8.2.3.23":
            for one in register.each():
                assert rigs[0].read(one) == rigs[1].read(one), one
    for rig in rigs:
        rig.close()


def test_the_generator_takes_the_short_way():
    rig = Rig("frames=10")
    rig.step(1)
    assert rig.model.state.plain == 1
    rig.write(r.FCTRL, BAM)
    rig.write(r.RAH[0], 0)  # its address is no longer the device's: now it is filtered, the long way
    rig.step(4)
    assert rig.model.state.plain == 0 and rig.wire("filtered") == 4
    rig.close()
