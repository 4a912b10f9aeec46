"""Packet buffers against a plain-Python model: who owns each, which handles are good, and pools of several devices."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinynic import TinyNic, account, attach

from ixy_numba import alloc_batch, free_batch, packet, resize, rx_batch, tx_batch
from ixy_numba.core import pool as pool_module
from ixy_numba.core.errors import ClosedError, DmaError, IxyError, RegisterTimeout, UsageError
from ixy_numba.core.jit import CHECKED, INTERPRETED
from ixy_numba.core.memory import PAGE, DmaMemory
from ixy_numba.core.pool import ADDRESS_SHIFT, BUFFER_SIZE, BUFFER_STRIDE, MAX_BATCH, Pool
from ixy_numba.core.registers import Registers
from ixy_numba.device import _attach
from ixy_numba.drivers import ixgbe

U = np.uint64
checked_only = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast does not check handles")


def ready(count=64):
    """A pool that a device can reach."""
    pool = Pool(count)
    pool.map(TinyNic())
    return pool


def alloc(pool, n):
    batch = pool.batch()
    return [int(handle) for handle in batch.packet[: int(alloc_batch(pool.view, batch, U(n)))]]


def free(pool, handles):
    batch = pool.batch()
    batch.packet[: len(handles)] = handles
    return int(free_batch(pool.view, batch, U(0), U(len(handles))))


class Model:
    """The pool's contract in plain Python."""

    def __init__(self, pool):
        self.count, self.tag = pool.count, pool.id
        self.free = list(range(pool.count))[::-1]
        self.generation = [pool.id] * pool.count
        self.held, self.bad_handles, self.empty = set(), 0, 0

    def handle(self, index):
        return index | self.generation[index] << 48

    def alloc(self, n):
        got = min(n, MAX_BATCH, len(self.free))
        self.empty += got < min(n, MAX_BATCH)
        handles = [self.handle(self.free.pop()) for _ in range(got)]
        self.held |= set(handles)
        return handles

    def give_back(self, handles):
        freed = 0
        for handle in handles:
            if handle & 0xFFFF0000FFFFFFFF in self.held:
                self.held.remove(handle & 0xFFFF0000FFFFFFFF)
                index = handle & 0xFFFFFFFF
                self.generation[index] = (self.generation[index] + 16) & 0xFFFF
                self.free.append(index)
                freed += 1
            else:
                self.bad_handles += 1
        return freed

    def check(self, pool):
        table = pool.view.table
        assert table.free[: int(table.top)].tolist() == self.free
        assert (table.word & U(0xFFFF)).tolist() == self.generation
        assert pool.outstanding().tolist() == sorted(handle & 0xFFFFFFFF for handle in self.held)
        assert (int(table.bad_handles), int(table.empty)) == (self.bad_handles, self.empty)
        account(pool, [], self.held)


PICKS = st.lists(st.integers(0, 1 << 30), max_size=20)
OPERATIONS = st.lists(st.one_of(
    st.tuples(st.just("alloc"), st.sampled_from([0, 1, 2, 7, 30, 64, 256, 300])),
    st.tuples(st.just("free"), PICKS),  # of all handles ever seen: live ones, stale ones, the same one twice
    st.tuples(st.just("forge"), st.lists(st.integers(0, (1 << 64) - 1), max_size=5)),
    st.tuples(st.just("alter"), st.tuples(st.integers(0, 1 << 30), st.integers(0, 63)))), max_size=30)


@checked_only
@pytest.mark.safety("packet_use_after_free")
@settings(max_examples=30 if INTERPRETED else 100)
@given(OPERATIONS)
def test_every_buffer_is_accounted_for(operations):
    pool = ready()
    model, seen = Model(pool), [0]
    for what, argument in operations:
        if what == "alloc":
            handles = alloc(pool, argument)
            assert handles == model.alloc(argument)
            seen += handles
        else:
            if what == "free":
                handles = [seen[pick % len(seen)] for pick in argument]
            elif what == "alter":
                handles = [seen[argument[0] % len(seen)] ^ 1 << argument[1]]
            else:
                handles = argument + [model.handle(index) for index in range(0, pool.count, 7)]  # of free ones as well
            assert free(pool, handles) == model.give_back(handles)
        model.check(pool)
    assert pool.recover() == len(model.held)
    account(pool, [])
    assert free(pool, sorted(model.held)) == 0


@pytest.mark.parametrize("limit, got, short", [(0, 0, 0), (1, 1, 0), (256, 256, 0), (257, 256, 0), (1 << 63, 256, 0)])
def test_a_batch_is_at_most_256(limit, got, short):
    pool = ready(512)
    handles = alloc(pool, limit)
    assert handles == [k | pool.id << 48 for k in range(got)]  # the lowest first, empty packets
    assert int(pool.view.table.empty) == short
    assert pool.available == 512 - got


def test_an_empty_pool_gives_fewer_and_counts_it():
    pool = ready(64)
    assert len(alloc(pool, 60)) == 60 and pool.view.table.empty == 0
    assert len(alloc(pool, 5)) == 4 and pool.view.table.empty == 1
    assert alloc(pool, 1) == [] and pool.view.table.empty == 2
    assert alloc(pool, 0) == [] and pool.view.table.empty == 2
    account(pool, [], range(64))


@pytest.mark.parametrize("first, end, freed", [
    (0, 256, 256), (0, 300, 256), (250, 1 << 40, 6), (256, 300, 0), (9, 3, 0)])
def test_free_stays_in_its_batch(first, end, freed):
    pool = ready(512)
    batch = pool.batch()
    alloc_batch(pool.view, batch, U(256))
    assert free_batch(pool.view, batch, U(first), U(end)) == freed
    assert pool.available == 256 + freed and pool.view.table.bad_handles == 0


@checked_only
def test_generations_wrap_and_keep_the_pools_id():
    pool = ready(64)
    first = alloc(pool, 1)
    free(pool, first)
    for _ in range(4095):
        handle = alloc(pool, 1)
        assert handle != first and handle[0] >> 48 & 15 == pool.id
        free(pool, handle)
    assert alloc(pool, 1) == first  # the reach of the check: 4096 uses of a buffer
    assert pool.view.table.bad_handles == 0


@checked_only
@pytest.mark.safety("packet_use_after_free")
def test_a_handle_of_another_pool_is_refused():
    pools = [ready(64) for _ in range(15)]
    handles = [alloc(pool, 1)[0] for pool in pools]
    assert len(set(handles)) == 15
    for pool, own in zip(pools, handles, strict=True):
        assert free(pool, handles) == 1
        assert pool.view.table.bad_handles == 14
        assert free(pool, [own]) == 0


@checked_only
@pytest.mark.safety("packet_use_after_free")
def test_packet_gives_its_bytes_to_the_owner_only():
    pool = ready(64)
    handle = int(resize(U(alloc(pool, 1)[0]), U(60)))
    bytes_of = [int(length_of(pool.view, U(handle)))]
    free(pool, [handle])
    for wrong in (handle, 64, (1 << 64) - 1, handle ^ 1 << 53, handle | BUFFER_SIZE + 1 << 32):
        with pytest.raises(IndexError, match="this handle is no packet of the application's"):
            length_of(pool.view, U(wrong))
    assert bytes_of == [60]


@pool_module.kernel
def length_of(pool, handle):
    return len(packet(pool, handle))


@checked_only
def test_a_length_that_no_buffer_has_is_refused():
    pool = ready(64)
    handle = U(alloc(pool, 1)[0])
    assert length_of(pool.view, resize(handle, U(2048))) == 2048
    with pytest.raises(IndexError, match="no packet of the application's"):
        length_of(pool.view, handle | U(2049 << 32))
    with pytest.raises(IndexError, match="at most 2048 bytes"):
        resize(handle, U(2049))


@pytest.mark.parametrize("count", [0, 63, 262145, -1])
def test_sizes_that_cannot_be(count):
    with pytest.raises(UsageError, match=f"pool of {count} buffers: expected 64 to 262144"):
        Pool(count)


def test_before_any_device_there_is_nothing_to_hand_out():
    pool = Pool(64)
    assert pool.available == 0 and alloc(pool, 5) == []


def test_reserve_more_than_there_is():
    pool = ready(64)
    assert pool.reserve(60).tolist() == list(range(60))[::-1]
    with pytest.raises(DmaError, match="a pool with 4 free buffers of 64: 5 needed; make a larger one"):
        pool.reserve(5)
    assert pool.available == 4


# ---- pages

@pytest.mark.parametrize("order", [np.arange, lambda n: np.arange(n)[::-1], lambda n: np.arange(n) * 2,
                                   lambda n: np.arange(n) ^ 1])
def test_buffers_are_contiguous_for_the_device(monkeypatch, order):
    """Those that lie across two pages which the device does not see side by side are never handed out."""
    monkeypatch.setattr(pool_module, "DmaMemory", OrdinaryPages)
    pool, nic = Pool(256), TinyNic(order=order)
    pool.map(nic)
    place = order(-(-pool.memory.size // PAGE))
    usable = set()
    for index in range(256):
        start, last = index * BUFFER_STRIDE, (index + 1) * BUFFER_STRIDE - 1
        if start // PAGE == last // PAGE or place[last // PAGE] == place[start // PAGE] + 1:
            usable.add(index)
    assert 0 < pool.usable == len(usable) and (len(usable) == 256) == (order is np.arange)
    handles = alloc(pool, 256)
    assert {handle & 0xFFFFFFFF for handle in handles} == usable
    for index in usable:
        pool.view.memory.buffer[index].octets[:BUFFER_SIZE] = index & 0xFF
        address = int(pool.view.table.word[index]) >> int(ADDRESS_SHIFT)
        assert (nic.dma(address, BUFFER_SIZE) == index & 0xFF).all()


class OrdinaryPages(DmaMemory):
    """DMA memory in 4 KiB pages, also on a machine with huge ones."""

    def __init__(self, size, *how):
        super().__init__(size, *how)
        self.size = -(-size // PAGE) * PAGE
        self.page_size = PAGE


@pytest.mark.parametrize("a, b", [(0, 1), (5, 6), (14, 15), (30, 31)])
def test_a_ring_must_be_contiguous(monkeypatch, a, b):
    """Wherever the gap is: the first and the last page of a ring may still look right."""
    monkeypatch.setattr(ixgbe, "DmaMemory", OrdinaryPages)

    def order(n):
        places = np.arange(n)
        if n == 32:  # two rings of 4096 descriptors
            places[[a, b]] = places[[b, a]]
        return places

    pool = Pool(4096)
    with pytest.raises(DmaError, match="a ring of 4096 descriptors is not contiguous for the device; choose a smaller"):
        attach(pool, 4096, order=order)
    account(pool, [])


# ---- devices

def test_received_here_and_sent_there_returns_to_its_pool():
    pool = Pool(512)
    (one, wire_one), (two, wire_two) = attach(pool), attach(pool)
    batch = pool.batch()
    for turn in range(20):
        frames = [bytes([turn, k]) * 30 for k in range(32)]
        assert all(map(wire_one.receive, frames))
        assert rx_batch(one.rx[0], batch, U(256)) == 32
        account(pool, [one, two], batch.packet[:32])
        assert tx_batch(two.tx[0], batch, U(0), U(32)) == 32
        account(pool, [one, two])
        assert wire_two.send() == frames
    one.close()
    two.close()
    assert pool.available == 512 and pool.view.table.bad_handles == 0
    assert wire_one.pages == wire_two.pages == {} and wire_one.closed and wire_two.closed


def test_close_gives_back_what_the_rings_held():
    pool = Pool(256)
    device, wire = attach(pool)
    batch = pool.batch()
    for k in range(10):
        wire.receive(bytes([k]) * 60)
    rx_batch(device.rx[0], batch, U(10))
    tx_batch(device.tx[0], batch, U(0), U(7))  # not sent yet
    account(pool, [device], batch.packet[7:10])
    device.close()
    account(pool, [], batch.packet[7:10])
    device.close()
    assert free_batch(pool.view, batch, U(7), U(10)) == 3 and pool.available == 256


@pytest.mark.parametrize("offset, name", [(0x010E8, "RXDCTL[3]"), (0x060A8, "TXDCTL[2]"), (0x02F00, "RDRXCTL")])
def test_a_device_that_does_not_come_up_leaves_the_pools_as_they_were(monkeypatch, offset, name):
    patient = Registers.wait
    monkeypatch.setattr(Registers, "wait", lambda *args, **more: patient(*args, **{**more, "timeout_s": 0.01}))
    pools = [Pool(64 + 64 * k) for k in range(4)]
    for _ in range(3):
        nic = TinyNic(answers={offset: 0})
        with pytest.raises(RegisterTimeout, match=name.replace("[", r"\[")):
            attach_to(nic, pools)
        assert nic.pages == {}
        for pool in pools:
            account(pool, [])
            assert pool.available == pool.count
    attach_to(TinyNic(), pools).close()


def attach_to(nic, pools):
    return _attach(nic, len(pools), 64, pools)


def test_a_pool_too_small_for_its_rings():
    pool = Pool(64)
    device, _ = attach(pool)
    nic = TinyNic("second")
    with pytest.raises(DmaError, match="a pool with 0 free buffers of 64: 64 needed; make a larger one"):
        attach_to(nic, [pool])
    assert nic.pages == {}
    account(pool, [device])
    device.close()
    assert pool.available == 64


def test_a_transient_pool_ends_with_its_last_device():
    pool = Pool(512, transient=True)
    (one, _), (two, _) = attach(pool), attach(pool)
    one.close()
    assert not pool.memory.closed
    two.close()
    assert pool.memory.closed
    with pytest.raises(ClosedError, match="this pool is closed; make another"):
        attach(pool)


def test_a_pool_of_the_users_own_outlives_its_devices():
    pool = Pool(128)
    attach(pool)[0].close()
    device, wire = attach(pool)
    assert wire.receive(b"x" * 60) and rx_batch(device.rx[0], pool.batch(), U(1)) == 1
    device.close()
    pool.close()
    pool.close()
    with pytest.raises(ClosedError):
        pool.map(TinyNic())


def test_devices_that_see_the_pool_elsewhere_are_refused():
    pool = Pool(4096)
    device, _ = attach(pool)
    nic = TinyNic(order=lambda n: np.arange(n) + 1)
    with pytest.raises(DmaError, match="different addresses; give each a pool of its own"):
        attach_to(nic, [pool])
    assert nic.pages == {}
    account(pool, [device])
    device.close()


def test_hundreds_of_devices_one_after_the_other():
    pool = Pool(64)
    for _ in range(600):  # more than there are device addresses
        device, _ = attach(pool)
        device.close()
    gc.collect()
    assert pool.available == 64


def test_errors_of_pools_are_errors_of_the_project():
    assert issubclass(DmaError, IxyError) and issubclass(ClosedError, IxyError)
