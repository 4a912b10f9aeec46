"""Forwarding in place, on the simulated NIC step by step and through `fwd`: against plain lists of what must come."""

import json
import random
import struct
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ixy_numba import DROP, Forwarder, UsageError, handler, open_devices
from ixy_numba import device as device_module
from ixy_numba.core.capture import Capture
from ixy_numba.core.errors import DmaError, IxyError
from ixy_numba.core.jit import CHECKED, INTERPRETED
from ixy_numba.core.pool import BUFFER_STRIDE
from ixy_numba.datapath import Lane, new_control
from ixy_numba.drivers.ixgbe import in_place as driver
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.drivers.ixgbe import setup
from ixy_numba.fwd import forward
from ixy_numba.in_place import in_place_pass
from ixy_numba.sim import open_bus as open_sim

LIMIT_S = 300
PASSES, DROPS, RAISES, HOME, HIGH, LOW = range(6)
FAILURES = (RAISES, HOME, HIGH, LOW) if CHECKED else (HOME, HIGH, LOW)  # unchecked, no access raises
RS, ONE_BUFFER = 1 << 27, 3 << 24
checked_only = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast does not check accesses")


@handler
def steer(packet, state):
    """Byte 6 says where the packet goes, or what goes wrong; byte 7 is written."""
    wish = packet[6]
    packet[7] = packet.port + 1
    state[0] += 1
    if wish == DROPS:
        return DROP
    if wish == RAISES:
        return np.int64(packet[5000])
    if wish == HOME:
        return packet.port
    if wish == HIGH:
        return np.int64(1000)
    if wish == LOW:
        return np.int64(-1000)
    return 1 - packet.port


def frame(number, length=60, wish=PASSES):
    return (bytes([2, 0, 0, 0, 0, 1, wish, 0, 2, 2, 2, 2, 0x88, 0xB5]) + struct.pack(">I", number)
            + random.Random(number).randbytes(length))[:length]


def write_capture(path, frames):
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + b"".join(
        struct.pack("<4I", 1, 0, len(data), len(data)) + data for data in frames))
    return path


def read_capture(path):
    with Capture(path) as capture:
        return [capture.data[start : start + length].tobytes()
                for start, length in zip(capture.offsets.tolist(), capture.lengths.tolist(), strict=True)]


class Rig:
    """Two devices that move only when told; `arrivals[p]` come in on port p. `chosen` is the handler."""

    def __init__(self, path, arrivals, ring=64, batch=32, budget=None, chosen=steer):
        self.paths = [path / f"out{p}.pcap" for p in range(2)]
        inputs = [write_capture(path / f"in{p}.pcap", arrivals[p]) for p in range(2)]
        specs = [f"sim:in={source},out={target}" for source, target in zip(inputs, self.paths, strict=True)]
        with mock.patch.object(device_module, "open_bus", manual):
            self.devices = open_devices(specs, ring_size=ring, in_place=True)
        self.rx = [device.rx[0] for device in self.devices]
        self.tx = [device.tx[0] for device in self.devices]
        self.state, self.control = np.zeros(1, np.int64), new_control(2, batch, budget)
        self.lane = Lane(chosen, self.state if chosen.takes_state else None, self.control)
        self.addresses = [rxq.line.desc["addr"].copy() for rxq in self.rx]

    def step(self, port, frames=64):
        return self.devices[port].bus.step(frames)

    def take(self, port):
        """One pass over what arrived on `port`; returns how many packets it dealt with."""
        return int(in_place_pass(self.rx[port], self.tx[1 - port], self.lane, port))

    def register(self, port, register):
        return self.devices[port].regs.read(register[0])

    def words(self, port):
        return self.rx[port].line.desc["word"]

    def run(self):
        """Until nothing moves any more."""
        for _ in range(10_000):
            if not sum([self.step(0), self.step(1), self.take(0), self.take(1)]):
                return
        raise AssertionError("it does not come to rest")

    def close(self):
        """What each port sent. Every buffer must still be in its own descriptor, and nothing have gone astray."""
        for rxq, before in zip(self.rx, self.addresses, strict=True):
            assert (rxq.line.desc["addr"] == before).all() and (np.diff(before.astype(np.int64)) == BUFFER_STRIDE).all()
        for device in self.devices:
            summary = device.bus.summary()
            assert summary["model_faults"] == summary["dma_faults"] == 0
            device.close()
        return [read_capture(path) for path in self.paths]


def manual(spec, unbind):
    return open_sim(spec, spec.partition(":")[2], manual=True)


def expected(arrivals, port):
    """What `steer` makes of what arrived on `port`: what leaves on the other one."""
    return [data[:7] + bytes([port + 1]) + data[8:] for data in arrivals if data[6] == PASSES]


# ---- a pass, step by step


def test_packets_go_both_ways_through_many_laps_of_the_ring(tmp_path):
    arrivals = [[frame(k, 14 + (k * 37 + port) % 1500) for k in range(500)] for port in range(2)]
    rig = Rig(tmp_path, arrivals)
    rig.run()
    assert all(device.bus.finished for device in rig.devices)
    stats = [device.stats() for device in rig.devices]
    assert rig.control.forwarded == rig.state[0] == 1000 and rig.control.dropped == rig.control.failed == 0
    assert rig.close() == [expected(arrivals[1], 1), expected(arrivals[0], 0)]
    assert [(s.rx_packets, s.tx_packets, s.rx_errors, s.tx_dropped) for s in stats] == [(500, 500, 0, 0)] * 2


MIX = st.lists(st.tuples(st.integers(14, 400), st.sampled_from((PASSES, PASSES, DROPS, *FAILURES))), max_size=150)


@settings(max_examples=30 if not INTERPRETED else 4, deadline=None)
@given(mixes=st.tuples(MIX, MIX), batch=st.sampled_from((1, 2, 32, 63, 64, 256)), seed=st.integers(0, 1 << 32))
def test_whatever_the_order_of_events_nothing_is_lost_or_mixed_up(tmp_path_factory, mixes, batch, seed):
    arrivals = [[frame(k, length, wish) for k, (length, wish) in enumerate(mix)] for mix in mixes]
    rig, chance = Rig(tmp_path_factory.mktemp("mix"), arrivals, batch=batch), random.Random(seed)
    for _ in range(30):
        for _ in range(chance.randrange(4)):
            rig.step(chance.randrange(2), chance.randrange(1, 40))
        rig.take(chance.randrange(2))
    rig.run()
    assert all(device.bus.finished for device in rig.devices)
    wishes = [wish for mix in mixes for _, wish in mix]
    control = rig.control
    assert rig.state[0] == len(wishes) and control.forwarded == wishes.count(PASSES)
    assert control.dropped == len(wishes) - wishes.count(PASSES)
    assert control.failed == sum(wishes.count(wish) for wish in FAILURES)
    assert rig.close() == [expected(arrivals[1], 1), expected(arrivals[0], 0)]


@pytest.mark.parametrize("wish", [pytest.param(RAISES, marks=checked_only), HOME, HIGH, LOW])
def test_a_failure_is_counted_and_the_first_is_kept(tmp_path, wish):
    rig = Rig(tmp_path, [[frame(1), frame(2, 77, wish), frame(3, 80, wish), frame(4)], []])
    rig.run()
    control = rig.control
    assert (control.forwarded, control.dropped, control.failed) == (2, 2, 2)
    assert control.sample_port == 0 and control.sample_length == 77
    assert control.sample[:77].tobytes() == expected([frame(2, 77)], 0)[0].replace(
        frame(2, 77)[:7], frame(2, 77, wish)[:7])
    assert rig.close()[1] == expected([frame(1), frame(4)], 0)


@pytest.mark.parametrize(("word", "sent"), [
    (1 << 32 | 60, False),  # no end of packet
    (3 << 32 | 0, False), (3 << 32 | 0xABCD << 16, False),  # no data, without and with a checksum of it
    (3 << 32 | 2049, False), (3 << 32 | 0xFFFF, False),  # more than the buffer holds
    (3 << 32 | 1 << 40 | 60, False),  # a MAC error
    (3 << 32 | 2048, True), (3 << 32 | 14, True), (3 << 32 | 0xFFFF << 16 | 60, True),
    (3 << 32 | 0xC0 << 40 | 60, True),  # TCP and IP checksum errors are the sender's affair
    (0xFFFF << 48 | 3 << 32 | 60, True)])
def test_what_is_no_sound_frame_is_counted_and_sends_nothing(tmp_path, word, sent):
    rig = Rig(tmp_path, [[frame(1), frame(2), frame(3)], []])
    rig.step(0)
    rig.words(0)[1] = word
    assert rig.take(0) == 3
    assert rig.words(0)[1] == (word & 0xFFFF if sent else 0) | ONE_BUFFER
    assert int(rig.rx[0].state.errors) == rig.control.dropped == (not sent)
    assert rig.control.forwarded == rig.state[0] == 2 + sent and rig.control.failed == 0
    rig.run()
    left = rig.close()[1]
    assert len(left) == 2 + sent and [left[0], left[-1]] == expected([frame(1), frame(3)], 0)


@settings(max_examples=300 if not INTERPRETED else 50)
@given(st.integers(0, (1 << 64) - 1) | st.builds(lambda high, low: high << 32 | low, st.integers(0, 0x1FF),
                                                 st.integers(0, 4096) | st.integers(0, (1 << 32) - 1)))
def test_a_sound_write_back_is_told_in_one_comparison(word):
    status, length = word >> 32, word & 0xFFFF
    assert bool(driver.sound(np.uint64(word))) == (status & 0x103 == 3 and 1 <= length <= 2048)


def test_a_full_output_brings_the_input_to_rest(tmp_path):
    arrivals = [[frame(k) for k in range(200)], []]
    rig = Rig(tmp_path, arrivals)
    for _ in range(20):
        rig.step(0)  # port 1 sends nothing meanwhile
        rig.take(0)
    assert rig.control.forwarded == 63 and rig.register(0, r.RDT) == 63 == rig.register(0, r.RDH)
    assert rig.step(0) == 0 and rig.take(0) == 0
    rig.step(1, 32)  # it has room again
    assert rig.take(0) == 0 and rig.step(0) == 32 and rig.take(0) == 32
    rig.run()
    assert rig.close()[1] == expected(arrivals[0], 0)


@pytest.mark.parametrize("budget", [0, 1, 31, 32, 33, 100])
def test_the_budget_is_exact(tmp_path, budget):
    arrivals = [frame(k, wish=DROPS if k % 2 else PASSES) for k in range(400)]
    rig = Rig(tmp_path, [arrivals, []], budget=budget)
    rig.run()
    assert rig.control.forwarded == budget and rig.take(0) == 0
    assert rig.close()[1] == expected(arrivals, 0)[:budget]


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 63, 64, 65])
def test_once_nothing_more_comes_every_descriptor_is_given_back(tmp_path, count, batch):
    rig = Rig(tmp_path, [[frame(k) for k in range(count)], []], batch=batch)
    rig.run()
    assert rig.register(0, r.RDH) == count % 64 and rig.register(0, r.RDT) == (count - 1) % 64
    rig.close()


def test_status_is_asked_for_once_a_block_while_more_waits(tmp_path):
    rig = Rig(tmp_path, [[frame(k) for k in range(200)], []], ring=256, batch=100)
    for _ in range(4):
        rig.step(0)
    assert rig.take(0) == 100
    assert np.flatnonzero(rig.words(0)[:100] & np.uint64(RS)).tolist() == [31, 63, 95]
    assert rig.take(0) == 100
    assert np.flatnonzero(rig.words(0)[:200] & np.uint64(RS)).tolist() == [31, 63, 95, 127, 159, 191, 199]
    assert rig.register(0, r.RDT) == 255 and rig.take(0) == 0 and rig.register(0, r.RDT) == 255  # nothing is sent yet
    rig.step(1, 40)
    assert rig.take(0) == 0 and rig.register(0, r.RDT) == 31  # of 40 that are sent, 32 are reported
    rig.run()
    rig.close()


@checked_only
def test_a_handler_sees_the_packets_bytes_and_no_more(tmp_path):
    rig = Rig(tmp_path, [[frame(k, length) for k, length in enumerate((14, 100, 1514))], []], chosen=last_and_next)
    rig.run()
    assert rig.control.failed == 3
    rig.close()


@handler
def last_and_next(packet):
    """Touches the last byte, then the one behind it."""
    packet[len(packet) - 1] = 0
    packet[len(packet)] = 0
    return 1 - packet.port


# ---- set-up and its end


def test_registers_after_set_up(tmp_path):
    rig = Rig(tmp_path, [[], []], ring=128)
    for port, device in enumerate(rig.devices):
        regs, lines = device.regs, device.pools[0]
        assert r.SRRCTL.DESCTYPE.get(regs.read(r.SRRCTL[0])) == 0
        assert regs.read(r.RDBAL[0]) | regs.read(r.RDBAH[0]) << 32 == lines.addresses[port]
        assert regs.read(r.TDBAL[0]) | regs.read(r.TDBAH[0]) << 32 == lines.addresses[1 - port]
        head = regs.read(r.TDWBAL[0]) | regs.read(r.TDWBAH[0]) << 32
        assert head == lines.addresses[1 - port] + 128 * 16 + 1 and head % 16 == 1
        assert regs.read(r.RDLEN[0]) == regs.read(r.TDLEN[0]) == 128 * 16 and regs.read(r.RDT[0]) == 127
    rig.close()


def test_a_head_that_hardware_would_not_write_is_refused():
    with pytest.raises(IxyError, match="head write-back to 0x1008: expected a multiple of 16"):
        setup.enable_head_write_back(None, 0, 0x1008)


@pytest.mark.parametrize("first", [0, 1])
def test_memory_goes_back_with_the_last_device(tmp_path, first):
    rig = Rig(tmp_path, [[frame(1)], []])
    memories = [memory for pool in rig.devices[0].pools for memory in pool._memories]
    assert len(memories) == 2
    rig.devices[first].close()
    assert not any(memory.closed for memory in memories)
    rig.step(1 - first)  # the other one's rings are still there
    assert rig.devices[1 - first].bus.summary()["dma_faults"] == 0
    rig.devices[1 - first].close()
    assert all(memory.closed for memory in memories)


def test_devices_that_see_memory_differently_are_refused():
    class Elsewhere:
        name = "elsewhere"

        def __init__(self, start):
            self.start, self.mapped = np.uint64(start), []

        def map_dma(self, memory):
            self.mapped.append(memory)
            return np.arange(memory.size // memory.page_size, dtype=np.uint64) * memory.page_size + self.start

        def unmap_dma(self, memory):
            self.mapped.remove(memory)

    lines, (a, b) = driver.Lines(64, "any pages"), (Elsewhere(1 << 30), Elsewhere(1 << 31))
    lines.map(a)
    with pytest.raises(DmaError, match="elsewhere and elsewhere see memory at different addresses"):
        lines.map(b)
    assert not b.mapped
    lines.unmap(a)
    assert not a.mapped


def test_scattered_memory_is_refused():
    class Scattered:
        """The second piece of memory lies backwards for it."""

        name = "scattered"

        def __init__(self):
            self.mapped = []

        def map_dma(self, memory):
            self.mapped.append(memory)
            order = 1 if len(self.mapped) == 1 else -1
            return np.arange(memory.size // memory.page_size, dtype=np.uint64)[::order] * memory.page_size

        def unmap_dma(self, memory):
            self.mapped.remove(memory)

    lines, bus = driver.Lines(4096, "any pages"), Scattered()
    with pytest.raises(DmaError, match="not contiguous for the device; choose a smaller ring size"):
        lines.map(bus)
    assert not bus.mapped


@pytest.mark.parametrize("count", [0, 1, 3])
def test_in_place_is_between_two_devices(count):
    with pytest.raises(UsageError, match=f"{count} device.*expected two"):
        open_devices(["sim"] * count, in_place=True)


def test_opened_and_used_in_place_or_neither():
    for opened in (False, True):
        devices = open_devices(["sim", "sim"], ring_size=64, in_place=opened)
        with pytest.raises(UsageError, match="in_place=True"):
            Forwarder(devices, forward, in_place=not opened)
        for device in devices:
            device.close()


def test_the_explanation_names_the_one_port_there_is(tmp_path):
    devices = open_devices(["sim", "sim"], ring_size=64, in_place=True)
    forwarder = Forwarder(devices, steer, state=np.zeros(1, np.int64), in_place=True)
    control, data = forwarder.controls[0], frame(1, wish=HOME)
    control.failed, control.sample_length, control.sample_port = 1, len(data), 0
    control.sample[: len(data)] = np.frombuffer(data, np.uint8)
    assert forwarder.explain_failure().endswith("returned 0; expected port 1, or DROP")
    for device in devices:
        device.close()


# ---- the app


def fwd(*args, code=0):
    done = subprocess.run([sys.executable, "-m", "ixy_numba.fwd", "--in-place", *map(str, args)], text=True,
                          timeout=LIMIT_S, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if "--json" in args else done


@pytest.mark.parametrize(("batch_size", "ring_size"), [(1, 512), (32, 64), (256, 4096), (256, 64)])
def test_fwd_copies_captures_both_ways_byte_for_byte(tmp_path, batch_size, ring_size):
    ways = [[frame(k, 14 + k * step % 1501) for k in range(2000 + step)] for step in (37, 211)]
    inputs = [write_capture(tmp_path / f"in{p}.pcap", frames) for p, frames in enumerate(ways)]
    outputs = [tmp_path / f"out{p}.pcap" for p in range(2)]
    result = fwd("--json", "--no-touch", "--batch-size", batch_size, "--ring-size", ring_size,
                 *(f"sim:in={source},out={target}" for source, target in zip(inputs, outputs, strict=True)))
    assert result["in_place"] is True and result["forwarded_packets"] == sum(map(len, ways))
    for frames, target in zip(ways, reversed(outputs), strict=True):
        assert read_capture(target) == frames
    assert [port["rx_packets"] for port in result["ports"]] == [len(frames) for frames in ways]


def test_fwd_touches_byte_1(tmp_path):
    source, target = write_capture(tmp_path / "in.pcap", [frame(k) for k in range(100)]), tmp_path / "out.pcap"
    fwd(f"sim:in={source}", f"sim:out={target}")
    assert read_capture(target) == [data[:1] + b"\x01" + data[2:] for data in read_capture(source)]


def test_fwd_stops_after_exactly_n_packets():
    result = fwd("--packets", 12345, "--json")
    assert result["forwarded_packets"] == 12345
    assert all(port["sequence_errors"] == 0 for port in result["ports"])


def test_fwd_stops_after_its_duration_and_sends_in_order():
    result = fwd("--duration", 1, "--json")
    assert result["forwarded_packets"] > 1000 and result["seconds"] >= 1
    assert all(port["tx_packets"] > 0 and port["sequence_errors"] == 0 for port in result["ports"])


def test_fwd_with_several_queues(tmp_path):
    out = tmp_path / "out.pcap"
    result = fwd("--queues", 3, "--json", "sim:gen=200000,frames=20000", f"sim:out={out}")
    assert result["forwarded_packets"] == result["ports"][1]["tx_packets"] == len(read_capture(out)) > 0


@pytest.mark.parametrize("args", [("sim",), ("sim", "sim", "sim"), ("--ring-size", 100), ("--queues", 65)])
def test_fwd_refuses_what_cannot_be(args):
    assert fwd(*args, code=2).stderr.count("error: ") == 1
