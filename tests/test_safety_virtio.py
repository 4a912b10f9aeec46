"""A hostile virtio device: whatever it writes into shared memory, nothing outside is touched and no buffer is lost."""

import time

import numpy as np
import pytest
from virtio_peer import EVENT_IDX, MRG_RXBUF, PROTOCOL, VERSION_1, Backend, Loop, attach, available, use, wait_for

from ixy_numba.bus import vhost_user
from ixy_numba.core import pool as pool_module
from ixy_numba.core.jit import INTERPRETED, kernel
from ixy_numba.core.memory import new_record, record
from ixy_numba.core.pool import HEADROOM, U, free_batch
from ixy_numba.core.raw import load16, store8, store16
from ixy_numba.core.thread import KernelThread
from ixy_numba.datapath import Lane, forward_round, handler, new_control, rx_batch, tx_batch
from ixy_numba.device import open_device
from ixy_numba.drivers import virtio
from ixy_numba.forwarder import Forwarder

CANARY, GUARD, RING = 0xA5, 4096, 64
CORRUPTIONS = 2_000 if INTERPRETED else 1_000_000
ZERO, ONE, LOW32 = U(0), U(1), U(0xFFFFFFFF)
ATTACK = np.dtype([("random", "u8"), ("corruptions", "u8"), ("jumps", "u8"), ("stop", "u8"),
                   ("ring", "u8"), ("ring_bytes", "u8"), ("pool", "u8"), ("stride", "u8"), ("buffers", "u8")])


@kernel
def draw(attack):
    """The next random number (xorshift)."""
    x = attack.random
    x ^= (x & U((1 << 51) - 1)) << U(13)
    x ^= x >> U(7)
    x ^= (x & U((1 << 47) - 1)) << U(17)
    attack.random = x
    return x


@kernel
def lie(attack, queue):
    """Hand some descriptors back that may not be there, with lengths that may not be true."""
    for _ in range(min(available_less_used(queue), draw(attack) & U(7))):
        kind = draw(attack)
        taken = U(load16(queue.avail + U(4) + U(2) * (queue.used_idx & (queue.slots - ONE))))
        if kind & U(3) == ONE:
            taken = kind >> U(8) & (queue.slots - ONE)  # perhaps outstanding, perhaps repeated
        elif kind & U(3) == U(2):
            taken = kind >> U(8) & LOW32
        length = U(72)
        if kind & U(0x30) == U(0x10):
            length = kind >> U(40) & U(4095)
        elif kind & U(0x30) == U(0x20):
            length = kind >> U(32)
        elif kind & U(0x30) == U(0x30):
            length = U(2060)  # full: whether the frame goes on is for its header to say
        use(queue, taken, length)
        attack.corruptions += ONE if kind & U(3) in (ONE, U(2)) or kind & U(0x30) else ZERO


@kernel
def available_less_used(queue):
    return (load16(queue.avail + U(2)) + U(0x10000) - queue.used_idx) & U(0xFFFF)


@kernel
def scribble(attack, queue):
    """Write anything anywhere that is shared: rings, headers, flags; now and then a used index that cannot be."""
    kind, where = draw(attack), draw(attack)
    header = attack.pool + attack.stride * (where % attack.buffers) - U(16)
    for k in range(16):
        store8(header + U(k), draw(attack) & U(0xFF))
    store16(queue.used, kind >> U(16) & U(0xFFFF))
    store16(queue.used + U(4) + U(8) * queue.slots, kind >> U(32) & U(0xFFFF))
    at = where % attack.ring_bytes
    store8(attack.ring + at, kind & U(0xFF))
    if kind >> U(56) == ZERO:
        store16(queue.used + U(2), where >> U(40) & U(0xFFFF))


@kernel
def survive(device, attack, receive, transmit, batch):
    """Attack and forward in turns, until enough was corrupted."""
    rxq, txq, lane, goal = device
    while attack.corruptions < goal:
        for _ in range(4):
            lie(attack, receive)
            lie(attack, transmit)
            store16(receive.used + U(2), receive.used_idx)  # what scribble may have changed
            store16(transmit.used + U(2), transmit.used_idx)
            forward_round((rxq,), (txq,), lane, 0)
        n = rx_batch(rxq, batch, U(32))
        sent = tx_batch(txq, batch, ZERO, n)
        free_batch(rxq.pool, batch, sent, n)
        scribble(attack, receive)
        scribble(attack, transmit)
        rx_batch(rxq, batch, ZERO)
        forward_round((rxq,), (txq,), lane, 0)
        attack.jumps += rxq.state.broken + txq.state.broken
        rxq.state.broken = txq.state.broken = ZERO
        receive.used_idx, transmit.used_idx = rxq.state.ready & U(0xFFFF), txq.state.ready & U(0xFFFF)


@kernel
def harass(attack, receive, transmit):
    """Attack without pause, from another thread: what was checked may have changed when it is used."""
    while attack.stop == ZERO and attack.corruptions < U(1 << 40):
        lie(attack, receive)
        lie(attack, transmit)
        scribble(attack, receive)
        store16(receive.used + U(2), receive.used_idx)
        store16(transmit.used + U(2), transmit.used_idx)
        attack.stop = attack.stop


@handler
def edit(packet):
    packet[0] = packet[len(packet) - 1]
    packet[len(packet) - 1] = 0x42
    return 0 if packet[0] & 3 else -1


class Fenced:
    """A device whose private records, headrooms and spare memory are full of canaries."""

    def __init__(self, features, monkeypatch):
        self.fences = []
        monkeypatch.setattr(virtio, "new_record", self.record)
        monkeypatch.setattr(pool_module, "new_record", self.record)
        self.bus = Loop(features | PROTOCOL)
        self.device = attach(self.bus, ring_size=RING)
        self.rxq, self.txq, pool = self.device.rx[0], self.device.tx[0], self.device.pools[0]
        self.buffers = pool.view.memory.buffer
        self.buffers["headroom"][:, : HEADROOM // 8 - 2] = U(0xA5A5A5A5A5A5A5A5)
        memory = self.device._memory
        self.spare = memory.array[memory._taken :]
        self.spare[:] = CANARY
        self.attack = new_record(ATTACK)
        self.attack.random = 0x9E3779B97F4A7C15
        self.attack.ring, self.attack.ring_bytes = memory.virtual_address, memory._taken
        self.attack.pool, self.attack.buffers = pool.memory.virtual_address + HEADROOM, pool.count
        self.attack.stride = self.buffers.dtype.itemsize

    def record(self, dtype):
        """What `new_record` makes, between two fences."""
        raw = np.full(dtype.itemsize + 2 * GUARD + 64, CANARY, np.uint8)
        start = GUARD + -(raw.ctypes.data + GUARD) % 64
        self.fences += [raw[:start], raw[start + dtype.itemsize :]]
        raw[start : start + dtype.itemsize] = 0
        return record(raw[start : start + dtype.itemsize], dtype)

    def check(self):
        assert all((fence == CANARY).all() for fence in [*self.fences, self.spare])
        assert (self.buffers["headroom"][:, : HEADROOM // 8 - 2] == U(0xA5A5A5A5A5A5A5A5)).all()
        state, table = self.txq.state, self.device.pools[0].view.table
        waiting = np.arange(int(state.clean), int(state.tail)) % RING
        places = [table.free[: int(table.top)], self.rxq.state.held, state.held[waiting]]
        assert sorted(np.concatenate(places).tolist()) == list(range(self.device.pools[0].count))
        for queue in (self.rxq, self.txq):
            ids = queue.state.posted
            assert sorted(ids.tolist()) == list(range(RING)) and (queue.state.slot_of[ids] == np.arange(RING)).all()


FEATURES = pytest.mark.parametrize("features", [VERSION_1 | MRG_RXBUF, VERSION_1 | MRG_RXBUF | EVENT_IDX, VERSION_1])


@FEATURES
def test_safety_of_a_million_corruptions(features, monkeypatch):
    fenced = Fenced(features, monkeypatch)
    control, batch = new_control(1, 32), fenced.device.pools[0].batch()
    for part in range(1, 11):
        goal = U(CORRUPTIONS * part // 10)
        survive((fenced.rxq, fenced.txq, Lane(edit, None, control), goal), fenced.attack,
                fenced.bus.queues[0], fenced.bus.queues[1], batch)
        fenced.check()
    stats, errors = fenced.device.stats(), int(fenced.rxq.state.errors) + int(fenced.txq.state.errors)
    assert fenced.attack.corruptions >= CORRUPTIONS and control.failed == 0
    assert stats.rx_errors == errors > CORRUPTIONS // 4
    assert stats.rx_packets > 0 and stats.tx_packets > 0 and (INTERPRETED or fenced.attack.jumps > 100)
    fenced.device.close()


@pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: no two kernels run at once")
def test_safety_while_the_device_writes_at_the_same_time(monkeypatch):
    fenced = Fenced(VERSION_1 | MRG_RXBUF, monkeypatch)
    enemy = KernelThread(harass, fenced.attack, fenced.bus.queues[0], fenced.bus.queues[1])
    with Forwarder([fenced.device], edit) as forwarder:
        monkeypatch.setattr(fenced.device, "check", lambda: None)  # that it is broken is soon true: it must go on
        wait_for(lambda: forwarder.began or forwarder.check(), 300)  # compiled
        enemy.start()
        wait_for(lambda: fenced.attack.corruptions > CORRUPTIONS and forwarder.count("passes") > 10_000, 120)
        fenced.attack.stop = 1
        enemy.join(10)
    assert enemy.error is None and not enemy.is_alive()
    fenced.check()
    fenced.device.close()


def test_safety_of_the_processor_when_the_back_end_is_gone(tmp_path, monkeypatch):
    """It is looked for now and then, not all the time."""
    attempts, real = [], vhost_user.Channel

    def counted(name, path, stopping):
        attempts.extend([path] * (path == str(tmp_path / "s")))
        return real(name, path, stopping)

    monkeypatch.setattr(vhost_user, "Channel", counted)
    with Backend(tmp_path / "s") as backend:
        device = open_device(f"vhost-user:{tmp_path / 's'}", ring_size=RING)
        backend.wait_ready()
        assert available(backend.queues[0]) == RING
        began = time.monotonic()
    time.sleep(0.5)
    assert len(attempts) <= 2 + (time.monotonic() - began) / vhost_user.RETRY_S
    device.check()
    device.close()
