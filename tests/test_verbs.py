"""The batch verbs against a reference in plain Python, on a NIC that moves only when a test says so."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinynic import DD, account, attach

from ixy_numba import (
    MAX_BATCH,
    Pool,
    alloc_batch,
    free_batch,
    resize,
    rx_batch,
    tx_batch,
)
from ixy_numba.core.jit import CHECKED, INTERPRETED

U = np.uint64
checked_only = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast does not check accesses")


class Reference:
    """What one device's verbs must do, in plain Python: only counts, order and who owns what."""

    def __init__(self, ring, free):
        self.ring, self.free = ring, free
        self.arrived = []  # frames in descriptors; None for one that makes no sense
        self.posted = self.on_wire = self.reclaimed = 0
        self.queue, self.errors, self.empty, self.bad = [], 0, 0, 0

    def rx(self, limit):
        got = []
        for _ in range(min(limit, MAX_BATCH)):
            if not self.arrived:
                break
            if not self.free:
                self.empty += 1
                break
            frame = self.arrived.pop(0)
            if frame is None:
                self.errors += 1
            else:
                self.free -= 1
                got.append(frame)
        return got

    def tx(self, packets, first, end):
        """`packets`: frames, None for handles that are no packets. Returns the index of the first one not taken."""
        while self.posted - self.reclaimed >= 32 and self.on_wire >= self.reclaimed + 32:
            self.reclaimed += 32
            self.free += 32
        space = self.ring - 1 - (self.posted - self.reclaimed)
        while first < min(end, MAX_BATCH) and space:
            if packets[first] is None:
                self.bad += 1
            else:
                self.posted += 1
                self.queue.append(packets[first])
                space -= 1
            first += 1
        return first

    def send(self, limit):
        frames, self.queue = self.queue[:limit], self.queue[limit:]
        self.on_wire += len(frames)
        return frames


VERBS = st.lists(st.one_of(
    st.tuples(st.just("arrive"), st.integers(0, 100), st.integers(0, 7)),
    st.tuples(st.just("rx"), st.sampled_from([0, 1, 2, 31, 32, 63, 64, 256, 257, 1 << 40]), st.just(0)),
    st.tuples(st.just("tx"), st.sampled_from([0, 1, 31, 32, 33, 64, 256]), st.integers(0, 9)),
    st.tuples(st.just("send"), st.sampled_from([1, 31, 32, 33, 500]), st.just(0)),
    st.tuples(st.just("alloc"), st.sampled_from([1, 32, 300]), st.integers(1, 2048)),
    st.tuples(st.just("free"), st.sampled_from([1, 32, 256]), st.just(0))), max_size=60)


@checked_only
@pytest.mark.parametrize("ring, buffers", [(64, 96), (64, 192), (512, 2304)])
def test_verbs_do_what_the_reference_does(ring, buffers):
    @settings(max_examples=8 if INTERPRETED else 40)
    @given(VERBS)
    def check(steps):
        pool = Pool(buffers)
        device, nic = attach(pool, ring)
        rxq, txq, table, batch = device.rx[0], device.tx[0], pool.view.table, pool.batch()
        model, numbers = Reference(ring, buffers - ring), itertools.count()
        held = []  # (handle, frame) in the application's hands
        stale = U(0xFFF0 << 48)

        def frame_of(handle):
            octets = pool.view.memory.buffer[int(handle) & 0xFFFFFFFF].octets
            return octets[: int(handle) >> 32 & 0xFFFF].tobytes()

        for what, count, extra in steps:
            if what == "arrive":
                for _ in range(count):
                    frame = next(numbers).to_bytes(8, "big") * 8
                    done = DD | len(frame) << 32 if next(numbers) % 16 == 2 * extra + 1 else None
                    if nic.receive(frame, done):
                        model.arrived.append(frame if done is None else None)
            elif what == "rx":
                expected = model.rx(count)
                handles = batch.packet[: int(rx_batch(rxq, batch, U(count)))].copy()
                assert [frame_of(handle) for handle in handles] == expected
                held += zip(handles, expected, strict=True)
            elif what == "tx":
                packets = held[:count]
                del held[:count]
                if extra and len(packets) < MAX_BATCH:  # a handle that is none, somewhere in between
                    packets.insert(len(packets) * extra // 9, (stale, None))
                batch.packet[: len(packets)] = [handle for handle, _ in packets]
                taken = int(tx_batch(txq, batch, U(0), U(len(packets))))
                assert taken == model.tx([frame for _, frame in packets], 0, len(packets))
                stale = next((handle for handle, frame in packets[:taken] if frame is not None), stale)
                held = [one for one in packets[taken:] if one[1] is not None] + held
                assert int(nic.words[0x6018 // 4]) == model.posted % ring == int(txq.state.tail)
            elif what == "send":
                assert nic.send(count) == model.send(count)
            elif what == "alloc":
                got = min(count, MAX_BATCH, model.free)
                model.free -= got
                model.empty += got < min(count, MAX_BATCH)
                assert alloc_batch(pool.view, batch, U(count)) == got
                for handle in batch.packet[:got]:
                    handle = resize(handle, U(extra))
                    held.append((handle, frame_of(handle)))
            else:
                packets = held[-count:]
                del held[-count:]
                batch.packet[: len(packets)] = [handle for handle, _ in packets]
                assert free_batch(pool.view, batch, U(0), U(len(packets))) == len(packets)
                model.free += len(packets)
                stale = packets[0][0] if packets else stale
            assert (pool.available, int(table.empty), int(table.bad_handles), int(rxq.state.errors)) == (
                model.free, model.empty, model.bad, model.errors)
            account(pool, [device], [handle for handle, _ in held])
        device.close()
        account(pool, [], [handle for handle, _ in held])

    check()


@checked_only
@pytest.mark.parametrize("length", [0, 2049, 0xFFFF])
def test_packets_of_no_length_are_not_sent(length):
    pool = Pool(192)
    device, nic = attach(pool)
    batch = pool.batch()
    alloc_batch(pool.view, batch, U(3))
    batch.packet[:3] = [handle | U(60 << 32) for handle in batch.packet[:3]]
    batch.packet[1] = (batch.packet[1] & ~U(0xFFFF << 32)) | U(length << 32)
    assert tx_batch(device.tx[0], batch, U(0), U(3)) == 3
    assert pool.view.table.bad_handles == 1 and len(nic.send()) == 2
    batch.packet[1] = batch.packet[1] & ~U(0xFFFF << 32)
    account(pool, [device], batch.packet[1:2])  # it is still the application's
    assert free_batch(pool.view, batch, U(1), U(2)) == 1
    device.close()


@pytest.mark.parametrize("first, end, taken", [(0, 300, 256), (200, 1 << 40, 256), (256, 300, 256), (9, 3, 9)])
def test_tx_stays_in_its_batch(first, end, taken):
    pool = Pool(2304)
    device, nic = attach(pool, 512)
    batch = pool.batch()
    alloc_batch(pool.view, batch, U(256))
    for k in range(256):
        batch.packet[k] = resize(batch.packet[k], U(60))
    assert tx_batch(device.tx[0], batch, U(first), U(end)) == taken
    sent = max(0, 256 - first) if end > first else 0
    assert len(nic.send()) == sent and pool.view.table.bad_handles == 0
    account(pool, [device], [*batch.packet[:first][: 256 if sent or first >= 256 else first],
                             *batch.packet[first if not sent else 256 :]])
    device.close()
