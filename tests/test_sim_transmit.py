"""The transmit path of the simulated 82599: descriptors of every kind, status reports, padding, CRC, back-pressure."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_rig import ENABLE, TX_CONTEXT, TX_DATA, TX_DEXT, TX_EOP, TX_IFCS, TX_RS, TX_WHOLE, Rig, frame

from ixy_numba.core.capture import Capture
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.sim import regs as m

GROUP, BROADCAST = bytes.fromhex("01005e0a0b0c"), b"\xff" * 6
TSE, VLE, CHECKSUM = 1 << 31, 1 << 30, 1 << 41


@pytest.fixture
def rig(tmp_path):
    """A device that writes what it sends to `rig.path`."""
    rig = Rig(f"out={tmp_path / 'out.pcap'}")
    rig.path = tmp_path / "out.pcap"
    yield rig
    rig.close()


def sent(rig):
    """The frames that went out; closes the device."""
    rig.close()
    with Capture(rig.path) as capture:
        return [capture.data[start : start + length].tobytes()
                for start, length in zip(capture.offsets.tolist(), capture.lengths.tolist(), strict=True)]


def pieces(rig, data, cuts, last=TX_WHOLE | TX_RS):
    """Queue `data` cut into several descriptors; returns their indices."""
    edges = [0, *cuts, len(data)]
    parts = [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    indices = []
    for k, part in enumerate(parts):
        command = last if k == len(parts) - 1 else TX_DEXT | TX_DATA | TX_IFCS
        indices.append(rig.queue_tx(rig.put(part), command | len(part) | len(data) << 46))
    rig.doorbell()
    return indices


def test_a_frame_goes_out_and_is_reported(rig):
    index = rig.send(frame(100))
    assert not rig.sent(index)
    assert rig.step() == 1
    assert rig.sent(index) and rig.read(r.TDH[0]) == 1
    assert sent(rig) == [frame(100)]


def test_status_is_reported_only_where_asked_for(rig):
    quiet = rig.send(frame(60), command=TX_WHOLE)
    loud = rig.send(frame(60))
    before = int(rig.tx[0, quiet, 1])
    rig.step()
    assert int(rig.tx[0, quiet, 1]) == before and rig.sent(loud)


def test_nothing_moves_before_the_doorbell(rig):
    rig.queue_tx(rig.put(frame()), TX_WHOLE | 60)
    assert rig.step() == 0 and rig.read(r.TDH[0]) == 0
    rig.doorbell()
    assert rig.step() == 1


@pytest.mark.parametrize("off", [lambda rig: rig.write(r.DMATXCTL, 0), lambda rig: rig.write(r.TXDCTL[0], 0),
                                 lambda rig: rig.write(r.CTRL, r.CTRL.MASTER_DISABLE)])
def test_nothing_goes_out_while_transmission_is_off(rig, off):
    index = rig.send(frame())
    off(rig)
    assert rig.step() == 0 and not rig.sent(index)


def test_the_ring_wraps(rig):
    frames = [frame(60 + k % 100, fill=k & 255) for k in range(300)]
    for start in range(0, 300, 50):
        for data in frames[start : start + 50]:
            rig.send(data)
        while rig.read(r.TDH[0]) != rig.read(r.TDT[0]):
            assert rig.step(7) > 0
    assert rig.read(r.TDH[0]) == 300 % rig.n
    assert sent(rig) == frames


@pytest.mark.parametrize("cuts", [[1], [14, 15], [100, 200, 300, 400], list(range(1, 40))])
def test_a_frame_in_several_descriptors(rig, cuts):
    data = frame(600)
    indices = pieces(rig, data, cuts)
    rig.step(1)
    assert rig.read(r.TDH[0]) == len(indices)
    assert [rig.sent(k) for k in indices] == [False] * len(cuts) + [True]
    assert sent(rig) == [data]


def test_a_frame_without_its_end_waits(rig):
    data = frame(100)
    rig.queue_tx(rig.put(data[:40]), TX_DEXT | TX_DATA | TX_IFCS | 40)
    rig.doorbell()
    assert rig.step() == 0
    rig.queue_tx(rig.put(data[40:]), TX_WHOLE | 60)
    rig.doorbell()
    assert rig.step() == 2
    assert sent(rig) == [data]


def test_a_ring_full_of_pieces_without_an_end_is_given_up(rig):
    address = rig.put(bytes(10))
    for _ in range(rig.n - 1):
        rig.queue_tx(address, TX_DEXT | TX_DATA | TX_IFCS | 10)
    rig.doorbell()
    rig.step()
    assert rig.read(r.TDH[0]) == rig.n - 1 and rig.wire("model_faults") == 1


@pytest.mark.parametrize(("low", "high", "length", "control"), [
    (r.TDBAL, r.TDBAH, r.TDLEN, r.TXDCTL), (r.RDBAL, r.RDBAH, r.RDLEN, r.RXDCTL)])
def test_a_ring_beyond_the_last_address_is_not_switched_on(rig, low, high, length, control):
    rig.write(control[0], 0)
    rig.write(low[0], 0xFFFFFF80)
    rig.write(high[0], 0xFFFFFFFF)
    rig.write(length[0], 128)  # ends at 2**64
    rig.write(control[0], ENABLE)
    assert rig.wire("model_faults") == 0
    rig.write(control[0], 0)
    rig.write(length[0], 256)
    rig.write(control[0], ENABLE)
    rig.step()
    assert rig.wire("model_faults") == 1


def test_context_descriptors_are_passed_over_and_reported(rig):
    silent = rig.queue_tx(0x1234, TX_CONTEXT | TX_DEXT)
    loud = rig.queue_tx(0, TX_CONTEXT | TX_DEXT | TX_RS)
    data = rig.send(frame())
    rig.step()
    assert not rig.sent(silent) and rig.sent(loud) and rig.sent(data)
    assert rig.wire("model_faults") == rig.wire("dma_faults") == 0
    assert sent(rig) == [frame()]


def test_legacy_descriptors_are_accepted(rig):
    index = rig.send(frame(80), command=TX_EOP | TX_IFCS | TX_RS)
    rig.step()
    assert rig.sent(index) and sent(rig) == [frame(80)]


def test_a_null_descriptor_sends_nothing_and_is_reported(rig):
    first = rig.queue_tx(0, TX_EOP | TX_IFCS)
    second = rig.queue_tx(0xBAD, TX_EOP | TX_IFCS | TX_RS)
    rig.send(frame(60))
    rig.step()
    assert rig.wire("model_faults") == rig.wire("dma_faults") == 0 and not rig.sent(first) and rig.sent(second)
    assert rig.read(m.ALL["GPTC"]) == 1 and sent(rig) == [frame(60)]


def head_write_back(rig, iova):
    """Switch it on; the queue takes it over when it is enabled."""
    rig.write(r.TXDCTL[0], 0)
    rig.write(r.TDWBAH[0], iova >> 32)
    rig.write(r.TDWBAL[0], iova & 0xFFFFFFFF | 1)
    rig.write(r.TXDCTL[0], ENABLE)


def test_head_write_back_says_how_far_the_queue_is_and_leaves_descriptors_alone(rig):
    where = rig.put(b"\xff" * 16) - rig.tx_data.iova
    head_write_back(rig, rig.tx_data.iova + where)
    for k, (command, head) in enumerate([(TX_WHOLE, 0xFFFFFFFF), (TX_WHOLE | TX_RS, 2), (TX_EOP | TX_IFCS | TX_RS, 3),
                                         (TX_EOP | TX_IFCS, 3)]):
        index = rig.send(frame(60 + k), command=command)
        before = rig.tx[0, index].copy()
        rig.step()
        assert rig.tx_data.array[where : where + 16].view("<u4").tolist() == [head] + [0xFFFFFFFF] * 3
        assert (rig.tx[0, index] == before).all()
    rig.queue_tx(0, TX_EOP | TX_RS)
    rig.doorbell()
    rig.step()
    assert rig.tx_data.array[where : where + 4].view("<u4") == 5  # a null descriptor reports too
    for k in range(rig.n - 5):
        rig.send(frame(), command=TX_WHOLE | (TX_RS if k == rig.n - 6 else 0))
    rig.step()
    assert rig.tx_data.array[where : where + 4].view("<u4") == 0  # the ring begins anew
    assert len(sent(rig)) == rig.n - 1


def test_a_head_that_cannot_be_written_is_counted(rig):
    head_write_back(rig, 0x10)
    rig.send(frame())
    rig.step()
    assert rig.wire("dma_faults") == 1 and sent(rig) == [frame()]


@pytest.mark.parametrize("command", [
    TX_WHOLE | 0, TX_WHOLE | 13, TX_WHOLE | 0x4001, TX_EOP | TX_DEXT | 60, TX_EOP | TX_DEXT | 5 << 20 | 60,
    TX_WHOLE | TSE | 60, TX_WHOLE | CHECKSUM | 60])
def test_a_descriptor_that_makes_no_sense_is_counted_and_passed_over(rig, command):
    address = rig.put(frame(200))
    bad = rig.queue_tx(address, command | TX_RS)
    rig.send(frame(60))
    rig.step()
    assert rig.wire("model_faults") == 1 and rig.sent(bad)
    assert rig.read(m.ALL["GPTC"]) == 1
    assert sent(rig) == [frame(60)]


def test_a_tail_outside_the_ring_stops_the_queue(rig):
    rig.send(frame())
    rig.write(r.TDT[0], rig.n)
    assert rig.step() == 0 and rig.wire("model_faults") == 1
    assert rig.step() == 0 and rig.wire("model_faults") == 1


def test_the_longest_frame_is_16_kib(rig):
    rig.send(frame(16384))
    rig.step()
    assert sent(rig) == [frame(16384)]


# Padding and CRC


@pytest.mark.parametrize(("text", "length", "expected"), [("", 14, 14), (",min_frame=60", 14, 60),
                                                          (",min_frame=60", 59, 60), (",min_frame=60", 60, 60)])
def test_short_frames_are_padded_to_the_shortest_legal_one(tmp_path, text, length, expected):
    rig = Rig(f"out={tmp_path / 'out.pcap'}{text}")
    rig.path = tmp_path / "out.pcap"
    rig.tx_data.array[:] = 0xEE
    rig.send(frame(length))
    rig.step()
    assert rig.read(m.ALL["GOTCL"]) == expected + 4
    assert sent(rig) == [frame(length).ljust(expected, b"\0")]


def test_without_txpaden_nothing_is_padded(tmp_path):
    rig = Rig(f"out={tmp_path / 'out.pcap'},min_frame=60")
    rig.path = tmp_path / "out.pcap"
    rig.write(r.HLREG0, 3)
    rig.send(frame(20))
    rig.step()
    assert sent(rig) == [frame(20)]


@pytest.mark.parametrize("how", ["descriptor", "register"])
def test_a_frame_may_bring_its_own_crc(rig, how):
    data = frame(80)
    with_crc = data + struct.pack("<I", zlib.crc32(data))
    command = TX_WHOLE | TX_RS
    if how == "register":
        rig.write(r.HLREG0, 2)
    else:
        command &= ~TX_IFCS
    rig.send(with_crc, command=command)
    rig.send(with_crc[:-1] + b"\0", command=command)
    rig.step()
    assert rig.wire("malformed") == 1
    assert sent(rig) == [data]


# Statistics


def test_statistics_count_frames_octets_sizes_and_groups(rig):
    lengths = [60, 61, 124, 252, 508, 1020, 1514]
    for length in lengths:
        rig.send(frame(length))
    rig.send(frame(60, target=GROUP))
    pieces(rig, frame(60, target=BROADCAST), [20])
    rig.step()
    total = sum(lengths) + 120 + 4 * 9
    assert rig.read(m.ALL["GPTC"]) == rig.read(m.ALL["TPT"]) == 9
    assert rig.read(m.ALL["GOTCL"]) == total and rig.read(m.ALL["GOTCH"]) == 0
    assert [rig.read(one) for one in m.PTC.each()] == [3, 1, 1, 1, 1, 2]
    assert rig.read(m.ALL["MPTC"]) == rig.read(m.ALL["BPTC"]) == 1
    assert rig.read(m.ALL["QPTC"][0]) == 9 and rig.read(m.ALL["QBTC_L"][0]) == total - 36
    assert rig.read(m.ALL["GPTC"]) == 0


# DMA


@pytest.mark.parametrize("kind", [TX_WHOLE, TX_EOP | TX_IFCS])
def test_data_that_is_not_mapped_stops_the_queue(rig, kind):
    good = rig.send(frame())
    bad = rig.queue_tx(0xBAD0000, kind | TX_RS | 60)
    rig.doorbell()
    rig.step()
    assert rig.sent(good) and not rig.sent(bad)
    assert rig.wire("dma_faults") == 1 and rig.step() == 0 and rig.wire("dma_faults") == 1
    assert rig.read(r.TDH[0]) == 1
    rig.tx[0, bad, 0] = rig.put(frame(fill=9))
    rig.write(r.TXDCTL[0], 0)
    rig.write(r.TXDCTL[0], ENABLE)  # enabled again, it goes on from TDH
    rig.step()
    assert sent(rig) == [frame(), frame(fill=9)]


@pytest.mark.parametrize(("room", "fault"), [(60, 0), (59, 1)])
def test_a_frame_may_not_be_read_across_the_end_of_a_mapping(rig, room, fault):
    rig.queue_tx(rig.tx_data.iova + rig.tx_data.size - room, TX_WHOLE | 60)
    rig.doorbell()
    rig.step()
    assert rig.wire("dma_faults") == fault and len(sent(rig)) == (not fault)


def test_a_frame_is_read_over_two_mappings_that_touch(rig):
    """Neighbours for the device may be strangers in memory: pages behind an IOMMU."""
    data = frame(60)
    a, b = np.frombuffer(data, np.uint8).copy(), np.full(4096, 7, np.uint8)
    base = 1 << 50
    rig.model.map(base, 60, a.ctypes.data)
    rig.model.map(base + 60, 4096, b.ctypes.data)
    rig.queue_tx(base, TX_WHOLE | 60)
    rig.queue_tx(base, TX_WHOLE | 61)
    rig.doorbell()
    rig.step()
    assert rig.wire("dma_faults") == 0
    assert sent(rig) == [data, data + b"\x07"]


def test_a_ring_that_is_not_mapped_stops_its_queue(rig):
    rig.send(frame())
    rig.bus.unmap_dma(rig.rings)
    rig.step()
    assert rig.wire("dma_faults") == 1 and rig.step() == 0 and rig.wire("dma_faults") == 1


@settings(max_examples=80 if not INTERPRETED else 10)
@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1),
                          st.sampled_from([0, TX_WHOLE, TX_DEXT | TX_DATA, TX_EOP])), min_size=1, max_size=20))
def test_garbage_in_descriptors_is_counted_and_never_hangs(words):
    rig = Rig()
    for address, command, more in words:
        near = rig.tx_data.iova + address % (rig.tx_data.size + 100)
        rig.queue_tx(near if address & 1 else address, command | more)
    rig.doorbell()
    for _ in range(40):
        rig.step()
    head, enabled = rig.read(r.TDH[0]), int(rig.model.state.tx[0].enabled)
    assert not enabled or head <= len(words)
    assert rig.wire("dma_faults") <= 1
    assert rig.step() == 0
    rig.close()


# Random bursts against a plain list of what must come out

DESCRIPTORS = st.lists(st.tuples(st.integers(14, 400), st.integers(1, 4), st.booleans()), max_size=30)


@settings(max_examples=60 if not INTERPRETED else 8)
@given(bursts=st.lists(st.tuples(DESCRIPTORS, st.integers(1, 80)), min_size=1, max_size=6))
def test_random_bursts_come_out_whole_and_in_order(tmp_path_factory, bursts):
    path = tmp_path_factory.mktemp("bursts") / "out.pcap"
    rig = Rig(f"out={path}")
    rig.path = path
    expected, free, given_out = [], rig.n - 1, 0
    for burst, budget in bursts:
        for length, parts, report in burst:
            data = frame(length, fill=len(expected) & 255)
            cuts = sorted({length * k // parts for k in range(1, parts)} - {0, length})
            if len(cuts) + 1 > free:
                break
            pieces(rig, data, cuts, TX_WHOLE | (TX_RS if report else 0))
            expected.append(data)
            free -= len(cuts) + 1
        rig.step(budget)
        head = rig.read(r.TDH[0])
        free += (head - given_out) % rig.n
        given_out = head
    rig.run()
    assert rig.read(r.TDH[0]) == rig.read(r.TDT[0]) and rig.bus.finished
    assert rig.wire("model_faults") == rig.wire("dma_faults") == 0
    assert sent(rig) == expected
