"""Packets outside of their bytes or after they were given away: refused and attributed; no buffer is lost."""

import traceback
from pathlib import Path

import numpy as np
import pytest
from tinynic import TinyNic, account, attach
from unprotected import outcomes, outcomes_without

from ixy_numba import (
    DROP,
    DmaError,
    Forwarder,
    Pool,
    alloc_batch,
    free_batch,
    handler,
    packet,
    resize,
    rx_batch,
    tx_batch,
)
from ixy_numba.core.jit import CHECKED, INTERPRETED, kernel
from ixy_numba.core.memory import new_record
from ixy_numba.core.pool import ADDRESS_SHIFT, KEPT, U
from ixy_numba.datapath import Lane, forward_round, new_control

BOUNDS, AFTER_FREE = "packet_bounds", "packet_use_after_free"
pytestmark = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast checks nothing")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")


# ---- bounds: what a handler does outside of its packet is refused, counted, and named


@handler
def reach(packet, where):
    """One access of kind where[0] at offset where[1]."""
    kind, offset = where[0], where[1]
    if kind == 0:
        return DROP if packet[offset] else DROP
    if kind == 1:
        packet[offset] = 1
    elif kind == 2:
        return DROP if packet.be16(offset) else DROP
    elif kind == 3:
        packet.set_be16(offset, 1)
    elif kind == 4:
        return DROP if packet.be32(offset) else DROP
    elif kind == 5:
        packet.set_be32(offset, 1)
    elif kind == 6:
        return DROP if packet.be64(offset) else DROP
    elif kind == 7:
        packet.set_be64(offset, 1)
    elif kind == 8:
        return DROP if len(packet[offset : offset + 1]) else DROP
    elif kind == 9:
        packet[offset : offset + 1] = packet[0:1]
    return DROP


SIZES = (1, 1, 2, 2, 4, 4, 8, 8, 1, 1)
PLACES = {length: [-1, -2, -8, -length, length, length + 1, 2047, 2048, 4096, 1 << 40]
          for length in (60, 1514, 2047, 2048)}


@pytest.fixture(scope="module")
def lane():
    pool = Pool(256)
    device, nic = attach(pool)
    control = new_control(1, 32)
    yield device, nic, Lane(reach, np.zeros(2, np.int64), control)
    device.close()
    account(pool, [])


@pytest.mark.safety(BOUNDS)
@pytest.mark.parametrize("length", PLACES)
@pytest.mark.parametrize("kind", range(len(SIZES)))
def test_a_handler_reaches_its_packet_and_no_further(lane, kind, length):
    device, nic, work = lane
    last = length - SIZES[kind]
    for offset in [0, last, last + 1, *PLACES[length]]:
        work.state[:] = kind, offset
        before = int(work.control.failed)
        nic.receive(b"\x5a" * length)
        forward_round((device.rx[0],), (device.tx[0],), work, 0)
        assert int(work.control.failed) - before == (not 0 <= offset <= last), offset
        account(device.pools[0], [device])


@pytest.mark.safety(BOUNDS)
@pytest.mark.parametrize("kind, offset, words", [
    (0, 60, r"1 byte(s) at offset 60 of 60"), (1, -1, "1 byte(s) at offset -1 of 60"),
    (3, 59, "2 byte(s) at offset 59 of 60"), (6, 2048, "8 byte(s) at offset 2048 of 60"),
    (8, 60, "[60:61] of 60 bytes")])
def test_the_failure_is_explained_by_handler_line_and_offset(kind, offset, words):
    pool = Pool(256)
    device, nic = attach(pool)
    forwarder = Forwarder([device], reach, state=np.array([kind, offset], np.int64))
    nic.receive(b"\x5a" * 60)
    forward_round((device.rx[0],), (device.tx[0],), Lane(reach, forwarder.states[0], forwarder.controls[0]), 0)
    explained = forwarder.explain_failure()
    assert explained.startswith(f"{__file__}:") and "handler reach: IndexError: " in explained and words in explained
    device.close()


@kernel
def peek(pool, handle, offset):
    return packet(pool, handle)[offset]


@compiled_only
@pytest.mark.safety(BOUNDS)
def test_a_kernel_on_the_verbs_is_named_with_its_line():
    pool = ready()
    batch = pool.batch()
    alloc_batch(pool.view, batch, U(1))
    with pytest.raises(IndexError, match="access outside the packet") as caught:
        peek(pool.view, resize(batch.packet[0], U(60)), 60)
    where = [(Path(frame.filename).name, frame.name) for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert (Path(__file__).name, "peek") in where


# ---- use after free: every handle that is not, or no longer, the application's


def ready(count=64):
    pool = Pool(count)
    pool.map(TinyNic())
    return pool


@kernel
def look(pool, handle):
    return len(packet(pool, handle))


class Held:
    """A device with packets in the application's hands: `batch.packet[0:4]`, of 60 bytes."""

    def __init__(self):
        self.pool = Pool(256)
        self.device, self.nic = attach(self.pool)
        self.batch = self.pool.batch()
        for k in range(4):
            self.nic.receive(bytes([k]) * 60)
        assert rx_batch(self.device.rx[0], self.batch, U(4)) == 4
        self.handles = [U(handle) for handle in self.batch.packet[:4]]

    def send(self, *handles):
        self.batch.packet[: len(handles)] = handles
        return int(tx_batch(self.device.tx[0], self.batch, U(0), U(len(handles))))

    def free(self, *handles):
        self.batch.packet[: len(handles)] = handles
        return int(free_batch(self.pool.view, self.batch, U(0), U(len(handles))))

    @property
    def refused(self):
        return int(self.pool.view.table.bad_handles)

    def check(self, held, refused):
        assert self.refused == refused
        account(self.pool, [self.device], held)
        assert self.pool.outstanding().tolist() == sorted(int(handle) & 0xFFFFFFFF for handle in held)
        self.device.close()
        account(self.pool, [], held)
        assert self.free(*held) == len(held) and self.pool.available == self.pool.usable


@pytest.mark.safety(AFTER_FREE)
@pytest.mark.parametrize("give_away", [Held.send, Held.free])
@pytest.mark.parametrize("use", [Held.send, Held.free])
def test_sent_or_freed_twice_or_either_way_round(give_away, use):
    app = Held()
    give_away(app, app.handles[0])
    use(app, app.handles[0], app.handles[0])
    assert len(app.nic.send()) == (give_away is Held.send)  # once
    app.check(app.handles[1:], refused=2)


@pytest.mark.safety(AFTER_FREE)
@pytest.mark.parametrize("give_away", [Held.send, Held.free])
def test_read_after_it_was_sent_or_freed(give_away):
    app = Held()
    assert look(app.pool.view, app.handles[0]) == 60
    give_away(app, app.handles[0])
    with pytest.raises(IndexError, match="no packet of the application's: sent, freed, of another pool or forged"):
        look(app.pool.view, app.handles[0])
    app.check(app.handles[1:], refused=0)


@pytest.mark.safety(AFTER_FREE)
def test_twice_in_one_batch():
    app = Held()
    first, second, third, fourth = app.handles
    assert app.send(first, second, first, third) == 4 and app.free(fourth, fourth) == 1
    assert [frame[0] for frame in app.nic.send()] == [0, 1, 2]
    app.check([], refused=2)


@pytest.mark.safety(AFTER_FREE)
def test_forged_with_the_very_generation_of_a_buffer_that_is_not_the_applications():
    """In the receive ring, in the transmit ring, and free: as its word has it, with every bit around it, too."""
    app = Held()
    app.send(*app.handles[:2])
    table, refused = app.pool.view.table, 0
    targets = [int(app.device.rx[0].state.held[5]), int(app.handles[0]) & 0xFFFFFFFF, int(table.free[0])]
    for index in targets:
        word = int(table.word[index])
        assert word & int(KEPT)
        for generation in (word & 0xFFFF, word + 16 & 0xFFFF, word - 16 & 0xFFFF):
            forged = U(index | 60 << 32 | generation << 48)
            assert app.free(forged) == 0 and app.send(forged) == 1
            with pytest.raises(IndexError):
                look(app.pool.view, forged)
            refused += 2
    assert len(app.nic.send()) == 2
    app.check(app.handles[2:], refused)


@pytest.mark.safety(AFTER_FREE)
@pytest.mark.parametrize("index", [256, 1 << 20, (1 << 32) - 1])
def test_forged_with_an_index_beyond_the_pool(index):
    app = Held()
    forged = app.handles[0] & ~U(0xFFFFFFFF) | U(index)
    alias = app.handles[0] + U(256)  # the same place of the table, under its mask
    assert app.free(forged, alias) == 0 and app.send(forged, alias) == 2
    app.check(app.handles, refused=4)


@pytest.mark.safety(AFTER_FREE)
def test_a_length_that_was_forged_is_not_sent():
    app = Held()
    long, none = app.handles[0] | U(0xFFFF << 32), app.handles[1] & ~U(0xFFFF << 32)
    assert app.send(long, none) == 2 and app.nic.send() == []
    app.check(app.handles, refused=2)


# ---- what a violation leaves behind


@kernel
def fails_at(rxq, txq, batch, at):
    """An application that stops in mid-batch by its own fault."""
    n = rx_batch(rxq, batch, U(32))
    for k in range(n):
        if packet(rxq.pool, batch.packet[k])[U(0)] == at:
            packet(rxq.pool, batch.packet[k])[60] = 1
        tx_batch(txq, batch, k, k + U(1))
    return n


@pytest.mark.safety(BOUNDS, AFTER_FREE)
@pytest.mark.parametrize("at", [0, 7, 15])
def test_a_kernel_that_raises_in_mid_batch_still_holds_the_rest_and_they_can_be_taken_back(at):
    pool = Pool(256)
    device, nic = attach(pool)
    batch = pool.batch()
    for turn in range(40):
        for k in range(16):
            nic.receive(bytes([k]) * 60)
        with pytest.raises(IndexError):
            fails_at(device.rx[0], device.tx[0], batch, at)
        assert len(nic.send()) == at
        rest = [int(handle) for handle in batch.packet[at:16]]
        account(pool, [device], rest)
        assert sorted(index for index in pool.outstanding()) == sorted(handle & 0xFFFFFFFF for handle in rest)
        if turn % 2:
            assert pool.recover() == 16 - at
            batch.packet[: 16 - at] = rest
            assert free_batch(pool.view, batch, U(0), U(16 - at)) == 0
        else:
            batch.packet[: 16 - at] = rest
            assert free_batch(pool.view, batch, U(0), U(16 - at)) == 16 - at
        account(pool, [device])
    device.close()
    assert pool.available == pool.usable


@pytest.mark.safety("memory_bounds")
def test_a_batch_of_the_users_own_takes_as_many_as_it_holds():
    """Smaller than the limit that is asked for: no verb may stop half-way through."""
    small = new_record(np.dtype([("packet", "u8", (3,))]))
    app = Held()
    app.free(*app.handles)
    for _ in range(8):
        app.nic.receive(b"s" * 60)
    assert rx_batch(app.device.rx[0], small, U(8)) == 3
    account(app.pool, [app.device], small.packet)
    assert tx_batch(app.device.tx[0], small, U(0), U(8)) == 3 and len(app.nic.send()) == 3
    assert alloc_batch(app.pool.view, small, U(8)) == 3
    assert free_batch(app.pool.view, small, U(0), U(8)) == 3
    app.check([], refused=0)


def test_addresses_that_a_word_has_no_room_for_are_refused():
    limit = 1 << 64 - int(ADDRESS_SHIFT)
    pool = Pool(64)
    nic = TinyNic(order=lambda n: limit // 4096 + np.arange(n))
    with pytest.raises(DmaError, match=r"expected addresses below 2\*\*47"):
        pool.map(nic)
    assert nic.pages == {}


# ---- the protection is the cause: the same without it goes unseen


def behind():
    pool = ready()
    batch = pool.batch()
    alloc_batch(pool.view, batch, U(2))
    pool.view.memory.buffer[0].octets[60] = 0x77
    return int(peek(pool.view, resize(batch.packet[0], U(60)), 60))


def after_free():
    pool = ready()
    batch = pool.batch()
    alloc_batch(pool.view, batch, U(2))
    handle = resize(batch.packet[0], U(60))
    free_batch(pool.view, batch, U(0), U(1))
    return int(look(pool.view, handle))


def free_twice():
    """An error if the pool has as many free buffers as before: one of the two is still the application's."""
    pool = ready()
    batch = pool.batch()
    alloc_batch(pool.view, batch, U(2))
    freed = [int(free_batch(pool.view, batch, U(0), U(1))) for _ in range(2)]
    if freed != [1, 1]:
        raise ValueError("refused")
    return pool.available


VIOLATIONS = {"behind": behind, "after free": after_free, "free twice": free_twice}


@pytest.mark.safety(BOUNDS, AFTER_FREE)
def test_the_violations_are_refused():
    assert outcomes(VIOLATIONS) == {"behind": "IndexError", "after free": "IndexError", "free twice": "ValueError"}


@compiled_only
@pytest.mark.safety(BOUNDS)
def test_without_packet_bounds_a_byte_behind_the_packet_is_read():
    assert outcomes_without("test_safety_packet", BOUNDS)["behind"] == "119"


@pytest.mark.safety(AFTER_FREE)
def test_without_generations_a_freed_packet_is_read_and_freed_again():
    found = outcomes_without("test_safety_packet", AFTER_FREE)
    assert (found["after free"], found["free twice"]) == ("60", "64")
