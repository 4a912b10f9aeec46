"""The virtio driver against a device that does what each test says; vhost-user against a back-end of our own."""

import errno
import os
import socket
import struct

import numpy as np
import pytest
from virtio_peer import (
    ANY_LAYOUT,
    EVENT_IDX,
    MAC,
    MQ,
    MRG_RXBUF,
    PROTOCOL,
    STATUS,
    VERSION_1,
    Backend,
    Loop,
    attach,
    reply,
    silence,
    wait_for,
)

from ixy_numba.bus import vhost_user
from ixy_numba.core.errors import IxyError, UsageError
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.core.pool import U, alloc_batch, free_batch
from ixy_numba.datapath import DROP, Lane, forward_round, handler, new_control, rx_batch, tx_batch
from ixy_numba.device import open_device, open_devices
from ixy_numba.drivers.virtio import Virtio
from ixy_numba.forwarder import Forwarder

RING = 64
WRAP = pytest.mark.parametrize("first", [0, 65530])  # the position at which the rings begin
FEATURES = pytest.mark.parametrize("features", [
    VERSION_1 | MRG_RXBUF, VERSION_1, ANY_LAYOUT | MRG_RXBUF, ANY_LAYOUT, VERSION_1 | MRG_RXBUF | EVENT_IDX])


def frame(k, length=60):
    return np.random.default_rng(k).integers(0, 256, length, np.uint8).tobytes()


def receive(device, limit=32, k=0):
    """Frames that `rx_batch` brings, their buffers freed."""
    pool, batch = device.pools[k], device.pools[k].batch()
    n = int(rx_batch(device.rx[k], batch, U(limit)))
    frames = [contents(pool, handle) for handle in batch.packet[:n]]
    assert free_batch(pool.view, batch, U(0), U(n)) == n
    return frames


def contents(pool, handle):
    return pool.view.memory.buffer[int(handle) & 0xFFFFFFFF].octets[: int(handle) >> 32 & 0xFFFF].tobytes()


def send(device, frames, k=0):
    """How many of them `tx_batch` takes; the rest is freed."""
    pool, batch = device.pools[k], device.pools[k].batch()
    assert alloc_batch(pool.view, batch, U(len(frames))) == len(frames)
    for j, data in enumerate(frames):
        index = int(batch.packet[j]) & 0xFFFFFFFF
        pool.view.memory.buffer[index].headroom[:] = U(0xAAAAAAAAAAAAAAAA)  # a header that must not be sent
        pool.view.memory.buffer[index].octets[: len(data)] = np.frombuffer(data, np.uint8)
        batch.packet[j] |= U(len(data) << 32)
    n = int(tx_batch(device.tx[k], batch, U(0), U(len(frames))))
    free_batch(pool.view, batch, U(n), U(len(frames)))
    return n


def close(device):
    """With every buffer back in its pool."""
    counts = [(pool, pool.count) for pool in device.pools]
    for pool in device.pools:
        pool.transient = False
    device.close()
    for pool, count in counts:
        assert pool.available == count == len(set(pool.view.table.free[:count].tolist()))
        pool.close()


@pytest.fixture
def loop(request, monkeypatch):
    """(bus, device), with the parameters `features` and `first` of the test, if it has them."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    monkeypatch.setattr(Virtio, "FIRST", parameters.get("first", 0))
    bus = Loop(parameters.get("features", VERSION_1 | MRG_RXBUF) | PROTOCOL)
    device = attach(bus, ring_size=RING)
    yield bus, device
    close(device)
    assert bus.stopped and bus.faults == 0


# ---- frames


@WRAP
@FEATURES
def test_received_frames_are_what_the_device_wrote(loop, first, features):
    bus, device = loop
    lengths = [1, 14, 60, 64, 1514, 2047, 2048]
    for turn in range(2 * RING // 7 + 2):  # more than once around
        sent = [frame(100 * turn + k, length) for k, length in enumerate(lengths)]
        assert [bus.deliver(data) for data in sent] == [1] * 7
        assert receive(device) == sent
    stats = device.stats()
    assert (stats.rx_packets, stats.rx_bytes, stats.rx_errors) == (7 * (turn + 1), sum(lengths) * (turn + 1), 0)


@WRAP
@FEATURES
def test_sent_frames_arrive_behind_a_header_of_zeros(loop, first, features):
    bus, device = loop
    for turn in range(5):
        frames = [frame(100 * turn + k, length) for k, length in enumerate([1, 60, 64, 1514, 2048] * 8)]
        assert send(device, frames) == 40
        assert bus.collect() == frames
    stats = device.stats()
    assert (stats.tx_packets, stats.tx_bytes) == (200, 5 * 8 * 3687)


def test_a_full_ring_takes_no_more_and_loses_nothing(loop):
    bus, device = loop
    frames = [frame(k) for k in range(RING + 10)]
    assert send(device, frames) == RING
    assert send(device, frames[RING:]) == 0
    assert bus.collect() == frames[:RING]
    assert send(device, frames[RING:]) == 10
    assert bus.collect() == frames[RING:]


def test_a_full_receive_ring_holds_on_to_what_is_there(loop):
    bus, device = loop
    frames = [frame(k) for k in range(RING)]
    assert [bus.deliver(data) for data in frames] == [1] * RING
    assert bus.deliver(frame(99)) == 0
    assert receive(device, 40) + receive(device, 40) == frames


def test_an_empty_pool_ends_the_batch_and_is_counted(loop):
    bus, device = loop
    pool = device.pools[0]
    kept = pool.reserve(pool.available - 3)
    for k in range(5):
        bus.deliver(frame(k))
    batch = pool.batch()
    assert rx_batch(device.rx[0], batch, U(32)) == 3 and pool.view.table.empty == 1
    assert free_batch(pool.view, batch, U(0), U(3)) == 3
    assert receive(device) == [frame(3), frame(4)]
    pool.restore(kept)


@WRAP
def test_descriptors_may_come_back_in_any_order(loop, first):
    bus, device = loop
    order = np.random.default_rng(1)
    for turn in range(8):
        frames = [frame(100 * turn + k) for k in range(40)]
        assert send(device, frames) == 40
        taken = bus.take(1, 40)
        assert [bus.read(one) for one in taken] == frames
        for one in order.permutation(taken):
            bus.use(int(one))
        taken = bus.take(0, 40)
        expected = []
        for one in order.permutation(taken):
            data = bytes([int(one)]) * 60
            bus.bytes(device.rx[0].ring.desc[one]["addr"], 72)[12:] = one
            bus.use(int(one), 72, 0)
            expected.append(data)
        assert receive(device, 64) == expected
    assert device.stats().rx_errors == 0


def test_a_frame_over_several_buffers_is_dropped_and_counted_once(loop):
    bus, device = loop
    for length, buffers in ((2049, 2), (3000, 2), (2048 + 2060, 2), (6000, 3)):
        before = device.stats()
        assert bus.deliver(frame(1)) == 1 and bus.deliver(frame(2, length)) == buffers and bus.deliver(frame(3)) == 1
        assert receive(device) + receive(device) == [frame(1), frame(3)]
        after = device.stats() - before
        assert (after.rx_packets, after.rx_bytes, after.rx_errors) == (2, 120, 1)
    for _ in range(RING):  # all buffers are still posted
        assert bus.deliver(frame(5)) == 1 and receive(device) == [frame(5)]


def test_a_frame_whose_buffers_come_one_by_one(loop):
    bus, device = loop
    first, second = bus.take(0, 2)
    bus.bytes(device.rx[0].ring.desc[first]["addr"], 12)[10:] = 2, 0  # num_buffers
    bus.use(first, 2060, 0)
    assert receive(device) == []
    bus.use(second, 500, 0)
    assert receive(device) == [] and device.stats().rx_errors == 1
    bus.deliver(frame(7))
    assert receive(device) == [frame(7)]


# ---- what a device may get wrong


@pytest.mark.parametrize("length", [0, 11, 12, 2061, 4096, 0xFFFFFFFF])
def test_lengths_that_cannot_be_are_counted_and_the_buffer_serves_again(loop, length):
    bus, device = loop
    taken, = bus.take(0, 1)
    bus.use(taken, length, 0)
    bus.deliver(frame(1))
    assert receive(device) == [frame(1)]
    stats = device.stats()
    assert (stats.rx_packets, stats.rx_bytes, stats.rx_errors) == (1, 60, 1)


@pytest.mark.parametrize("wrong", [RING, 0x10000, 0xFFFFFFFF])
def test_ids_out_of_range_are_counted(loop, wrong):
    bus, device = loop
    bus.take(0, 1)
    bus.use(wrong, 72, 0)
    assert receive(device) == [] and device.stats().rx_errors == 1
    assert send(device, [frame(1)] * 40) == 40
    bus.take(1, 40)
    for _ in range(40):
        bus.use(wrong)
    assert send(device, [frame(1)]) == 1 and device.stats().rx_errors == 41


def test_an_id_that_is_not_outstanding_is_counted(loop):
    bus, device = loop
    assert send(device, [frame(1)] * 40) == 40
    bus.take(1, 40)
    for _ in range(40):
        bus.use(7)
    assert send(device, [frame(1)]) == 1 and device.stats().rx_errors == 39


@pytest.mark.parametrize("number", [0, 1])
def test_a_used_index_that_jumps_ends_the_device(loop, number):
    bus, device = loop
    device.check()
    queue = device.rx[0] if number == 0 else device.tx[0]
    if number:
        send(device, [frame(1)] * 40)
    queue.ring.used_idx += 65
    assert receive(device) == []
    send(device, [frame(1)])
    with pytest.raises(IxyError, match=f"loop: queue {number} is broken: its used index jumped to 65"):
        device.check()
    queue.ring.used_idx -= 65


# ---- notifications


def test_the_device_is_notified_unless_it_says_that_it_need_not(loop):
    bus, device = loop
    assert send(device, [frame(1)] * 3) == 3 and bus.kicks(1) == 1
    device.tx[0].ring.used_flags = device.rx[0].ring.used_flags = 1
    assert send(device, [frame(1)]) == 1 and bus.kicks(1) == 0
    bus.deliver(frame(1))
    assert receive(device) == [frame(1)] and bus.kicks(0) == 0
    device.rx[0].ring.used_flags = 0
    bus.deliver(frame(1))
    assert receive(device) == [frame(1)] and bus.kicks(0) == 1
    assert (device.rx[0].ring.avail_flags, device.tx[0].ring.avail_flags) == (1, 1)  # it polls


@pytest.mark.parametrize("features", [VERSION_1 | EVENT_IDX])
@WRAP
def test_the_device_is_notified_when_its_event_index_is_passed(loop, features, first):
    bus, device = loop
    ring = device.tx[0].ring
    for event, sent, expected in ((0, 1, 1), (3, 2, 0), (3, 1, 1), (3, 5, 0), (20, 10, 0), (20, 2, 1)):
        ring.avail_event = (first + event) & 0xFFFF
        assert send(device, [frame(1)] * sent) == sent
        assert bus.kicks(1) == expected, event
    assert ring.avail_flags == 0 and ring.used_event == (first - 1) & 0xFFFF


# ---- what is negotiated


def test_what_the_device_says_about_itself():
    config = bytes.fromhex("525400123456") + struct.pack("<HHH", 1, 4, 1500)
    bus = Loop(VERSION_1 | MAC | STATUS | 0x3FF << 7, config)  # with every offload there is
    device = attach(bus)
    assert bus.accepted == VERSION_1 | MAC | STATUS | MRG_RXBUF and device.header_size == 12
    assert device.mac == config[:6] and device.link_mbit == 10000
    device.set_mac(b"\x02\0\0\0\0\1")
    assert device.mac == b"\x02\0\0\0\0\1"
    with pytest.raises(UsageError, match="expected 6 bytes, no group address"):
        device.set_mac(b"\x03\0\0\0\0\1")
    bus.config = config[:6] + bytes(6)
    assert device.link_mbit == 0
    close(device)


def test_a_device_without_an_address_gets_a_local_one():
    devices = [attach(Loop()) for _ in range(2)]
    assert devices[0].mac != devices[1].mac and all(device.mac[0] == 2 for device in devices)
    for device in devices:
        close(device)


@pytest.mark.parametrize(("bus", "queues", "pattern"), [
    (Loop(0), 1, "neither VERSION_1 nor ANY_LAYOUT; it is too old"),
    (Loop(VERSION_1), 2, "2 queues: the device has one pair"),
    (Loop(VERSION_1 | MQ), 5, "5 queues: the device has 4"),
    (Loop(), 129, "129 queues: expected 1 to 128")])
def test_devices_that_cannot_be_used_as_asked(bus, queues, pattern):
    with pytest.raises(IxyError, match=pattern):
        attach(bus, queues)


def test_a_virtio_device_on_a_bus_without_a_transport():
    from ixy_numba.sim import open_bus

    bus = open_bus("sim", "", manual=True)
    bus.vendor, bus.device = 0x1AF4, 0x1041
    with pytest.raises(UsageError, match="on a bus that this driver does not know"):
        attach(bus)
    bus.close()


# ---- the loop


@handler
def bounce(packet):
    if packet[0] == 0:
        return DROP
    packet[1] = 0x42
    return packet.port


def test_the_forwarding_loop_runs_on_it(loop):
    bus, device = loop
    control = new_control(1, 32)
    for _ in range(6):
        frames = [bytes([k % 3]) + frame(k, 70 + k) for k in range(20)]
        for data in frames:
            bus.deliver(data)
        bus.deliver(frame(1, 3000))
        while forward_round((device.rx[0],), (device.tx[0],), Lane(bounce, None, control), 0):
            pass
        assert bus.collect() == [data[:1] + b"\x42" + data[2:] for data in frames if data[0]]
    stats = device.stats()
    assert (stats.rx_packets, stats.rx_errors, stats.tx_packets) == (120, 6, 13 * 6)
    assert control.dropped == 6 * (7 + 1)


# ---- vhost-user


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a=b:c.sock"


@pytest.mark.parametrize(("more", "options", "features", "protocol"), [
    ({}, "", 1 << 3 | MRG_RXBUF | EVENT_IDX | VERSION_1 | PROTOCOL, 0x19),
    ({"protocol": 0}, ",mrg_rxbuf=off,event_idx=off", 1 << 3 | VERSION_1 | PROTOCOL, 0),
    ({"protocol": None, "features": VERSION_1}, "", VERSION_1, None)])
def test_a_back_end_is_set_up_and_left_in_order(path, more, options, features, protocol):
    with Backend(path, **more) as backend:
        device = open_device(f"vhost-user:{path}{options}", ring_size=RING)
        if protocol is not None:
            backend.wait_ready()
        else:
            wait_for(lambda: backend.log.count(12) == 2)
        assert backend.values[2] == features and backend.values.get(16) == protocol
        assert backend.values.get(20) == (2034 if protocol else None)  # the MTU
        base = int(backend.memory.gpa[0])
        assert all(not start <= base < start + size for start, size, _ in backend._regions)  # neither our addresses
        assert send(device, [frame(1)]) == 1
        wait_for(lambda: backend.collect() == [frame(1)])
        backend.deliver(frame(2))
        assert receive(device) == [frame(2)]
        close(device)
        wait_for(lambda: backend.log.count(11) == 2)
        assert not backend.enabled and backend.faults == 0
        assert backend.log.index(5) < backend.log.index(8) < backend.log.index(12)


def test_pairs_of_queues_each_with_a_pool(path):
    with Backend(path) as backend:
        device = open_device(f"vhost-user:{path}", queues=3, ring_size=RING)
        backend.wait_ready()
        for k in range(3):
            assert send(device, [frame(k)], k) == 1
            wait_for(lambda k=k: backend.collect(2 * k + 1) == [frame(k)])
            backend.deliver(frame(10 + k), 2 * k)
            assert receive(device, k=k) == [frame(10 + k)]
        close(device)
        with pytest.raises(UsageError, match="8 queues: the device has 4"):
            open_device(f"vhost-user:{path}", queues=8)
    with Backend(path, pairs=128) as backend, pytest.raises(UsageError, match="use at most 7 queues"):
        open_device(f"vhost-user:{path}", queues=8, ring_size=RING)


def test_traffic_resumes_when_the_back_end_comes_back(path):
    with Backend(path) as backend:
        device = open_device(f"vhost-user:{path}", ring_size=RING)
        backend.wait_ready()
        backend.deliver(frame(1))
        assert send(device, [frame(k) for k in range(40)]) == 40
        taken = backend.take(1, 40)  # of which it hands back 10
        for one in taken[:10]:
            backend.use(one)
    wait_for(lambda: not device.link_mbit)
    assert receive(device) == [frame(1)]
    for _ in range(3):
        device.check()  # away is no failure
        with Backend(path) as backend:
            backend.wait_ready()
            wait_for(lambda: device.link_mbit)
            sent = backend.collect()
            assert sent[:30] == [frame(k) for k in range(10, 40)] or sent == []
            for k in range(RING + 3):
                assert backend.deliver(frame(k)) == 1 and receive(device) == [frame(k)]
        wait_for(lambda: not device.link_mbit)
    assert device.bus.summary() == {"connected": False, "reconnects": 3}
    assert device.stats().rx_errors == 0
    close(device)


def test_every_queue_is_kicked_when_it_is_handed_over(path):
    """As a back-end may start it only then."""
    with Backend(path) as backend:
        device = open_device(f"vhost-user:{path}", queues=2, ring_size=RING)
        for number in range(4):
            wait_for(lambda k=number: backend.kicks(k))
    with Backend(path) as backend:
        backend.wait_ready()
        for number in range(4):
            wait_for(lambda k=number: backend.kicks(k))
    close(device)


def test_closing_ends_the_wait_for_a_back_end_that_is_slow_to_come_back(path):
    with Backend(path):
        device = open_device(f"vhost-user:{path}", ring_size=RING)
    with Backend(path, override={1: silence}) as backend:
        wait_for(lambda: 1 in backend.log)
        close(device)
        assert not device.bus._watcher.is_alive() and device.bus._failure is None  # not that no answer came in time


def test_no_file_descriptor_left_to_reconnect_with_is_a_failure(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Backend(path):
        device = open_device(f"vhost-user:{path}", ring_size=RING)
    monkeypatch.setattr(socket, "socket", refuse)
    wait_for(lambda: device.bus._failure)
    with pytest.raises(IxyError, match="cannot connect to .*: Too many open files"):
        device.check()
    close(device)


def test_a_back_end_that_comes_back_with_less_is_a_failure(path):
    with Backend(path):
        device = open_device(f"vhost-user:{path}", ring_size=RING)
    wait_for(lambda: not device.link_mbit)
    with Backend(path, features=VERSION_1):
        wait_for(lambda: device.bus._failure)
        with pytest.raises(IxyError, match="came back with 4 queue pairs and without the features 0x20008008 in use"):
            device.check()
    close(device)


def test_a_back_end_that_speaks_unasked_is_a_failure(path):
    def answer_and_more(connection, payload):  # to the last message, which enables queue 1
        connection.sendall(struct.pack("<IIIQ", 18, 5, 8, 0) + b"more" * payload[0])

    with Backend(path, override={18: answer_and_more}):
        device = open_device(f"vhost-user:{path}", ring_size=RING)
        wait_for(lambda: device.bus._failure)
        with pytest.raises(IxyError, match="sent 6d 6f 72 65… without being asked"):
            device.check()
        with pytest.raises(IxyError, match="it did not become quiet"):
            device.close()


@pytest.mark.parametrize(("override", "pattern"), [
    ({1: reply(1, bytes(4))}, "answers GET_FEATURES with message 1, flags 0x5, 4 bytes; expected 1 with 8 bytes"),
    ({1: reply(1, bytes(1 << 10))}, "1024 bytes; expected 1 with 8"),
    ({1: reply(2, bytes(8))}, "answers GET_FEATURES with message 2"),
    ({1: reply(1, bytes(8), flags=1)}, "flags 0x1"),
    ({15: reply(15, bytes(8), flags=6)}, "answers GET_PROTOCOL_FEATURES with message 15, flags 0x6"),
    ({1: reply(1, bytes(8), fds=[0])}, "answers GET_FEATURES with file descriptors"),
    ({1: reply(1, bytes(8), fds=[0] * 60)}, "answers GET_FEATURES with file descriptors"),
    ({5: reply(5, struct.pack("<Q", 1))}, "the back-end refuses SET_MEM_TABLE"),
    ({9: silence}, "no answer to SET_VRING_ADDR within 0.3 s"),
    ({1: silence}, "no answer to GET_FEATURES within 0.3 s"),
    ({1: lambda connection, _: connection.sendall(b"SSH")}, "no answer to GET_FEATURES within 0.3 s"),
    ({12: lambda connection, _: connection.shutdown(socket.SHUT_RDWR)}, "the back-end is gone")])
def test_back_ends_that_make_no_sense(path, monkeypatch, override, pattern):
    monkeypatch.setattr(vhost_user, "MESSAGE_TIMEOUT_S", 0.3)
    before = len(os.listdir("/proc/self/fd"))
    with Backend(path, override=override), pytest.raises(IxyError, match=pattern):
        open_device(f"vhost-user:{path},wait=0", ring_size=RING)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_where_nobody_listens(path):
    with pytest.raises(IxyError, match=r"there is no such socket; start the back-end first \(waited 0.1 s\)"):
        open_device(f"vhost-user:{path},wait=0.1")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    with pytest.raises(IxyError, match="nobody listens there"):
        open_device(f"vhost-user:{path},wait=0")
    listener.close()
    with pytest.raises(IxyError, match="cannot connect to /dev/null/x: Not a directory"):
        open_device("vhost-user:/dev/null/x,wait=0")


@pytest.mark.parametrize(("text", "pattern"), [
    ("", "expected vhost-user:PATH"), (",wait=1", "expected vhost-user:PATH"), ("a,x=1", "unknown key 'x'"),
    ("a,wait", "expected KEY=VALUE"), ("a,wait=x", "wait=x: expected seconds"), ("a,wait=-1", "expected seconds"),
    ("a,mrg_rxbuf=1", "mrg_rxbuf=1: expected on or off"), ("x" * 108, "at most 107 bytes, this one has 108")])
def test_specs_that_say_nothing(text, pattern):
    with pytest.raises(UsageError, match=pattern):
        open_device(f"vhost-user:{text}")


def test_it_cannot_forward_in_place(path):
    with Backend(path), pytest.raises(UsageError, match="virtio devices cannot forward in place; do without it"):
        open_devices([f"vhost-user:{path}"] * 2, in_place=True)


@pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")
def test_forwarding_between_a_back_end_and_the_simulation(path):
    """Devices of two kinds share a pool: frames that the simulation generates come back from the back-end to it."""
    with Backend(path) as backend:
        devices = open_devices([f"vhost-user:{path}", "sim:frames=5000,size=100"], ring_size=256)
        backend.wait_ready()
        assert backend.echo() == 0  # compiled before there is traffic: a ring that stands still for long is given up
        with Forwarder(devices, other) as forwarder:
            wait_for(lambda: forwarder.began or forwarder.check(), 300)  # compiled
            wait_for(lambda: backend.echo() + 1 and devices[1].stats().tx_packets == 5000, 60)
            forwarder.check()
        assert devices[1].bus.summary()["sequence_errors"] == 0 and backend.faults == 0
        for device in devices:
            device.close()


@handler
def other(packet):
    return 1 - packet.port
