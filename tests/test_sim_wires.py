"""What a simulated 82599 can be plugged into: generator, sink, captures, links, TAP, faults; and its own thread."""

import os
import socket
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from sim_rig import MAC, Rig, frame
from test_sim_receive import write_pcap

from ixy_numba.core.capture import Capture
from ixy_numba.core.errors import IxyError, UsageError
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.core.memory import new_record
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.sim import OPTIONS, open_bus
from ixy_numba.sim import regs as m
from ixy_numba.sim.engine import CONTROL, ENGINE, assign, serve

DEADLINE_S = 60.0


def wait_until(condition):
    """Poll a condition of a running device; the deadline is there for a broken one."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


# Generator


@settings(max_examples=40 if not INTERPRETED else 5)
@given(st.integers(60, 1514), st.integers(1, 300), st.integers(0, 1 << 61))
def test_generated_frames_have_right_checksums_and_count_up(size, flows, first):
    rig = Rig(f"frames=20,size={size},flows={flows}")
    rig.model.state.taken, rig.model.state.limit = first, first + 20
    rig.step()
    frames = rig.received()
    assert len(frames) == 20
    for k, data in enumerate(frames):
        assert len(data) == size and int.from_bytes(data[-8:], "big") == first + k
        packet = Ether(data)
        assert packet.dst == MAC.hex(":") and packet[IP].len == size - 14
        assert packet[UDP].dport == 9 and packet[UDP].sport == 1024 + k % flows
        rebuilt = packet.copy()
        del rebuilt[IP].chksum, rebuilt[UDP].chksum
        assert bytes(rebuilt) == data
    rig.close()


def test_a_zero_udp_checksum_is_sent_as_ones():
    rig = Rig("frames=1,flows=1")
    rig.step()
    data = bytearray(rig.received()[0])
    free = 0xFFFF - int.from_bytes(data[40:42], "big")  # raise the number by what is missing to a sum of 0xFFFF
    rig.close()
    rig = Rig("frames=1,flows=1")
    rig.model.state.taken, rig.model.state.limit = 0xFFFF - free, 0x10000
    rig.step()
    assert rig.received()[0][40:42] == b"\xff\xff"
    rig.close()


def test_a_given_number_of_frames_waits_for_descriptors_and_ends():
    rig = Rig("frames=200", n=32)
    got = []
    while len(got) < 200:
        assert rig.step() and not rig.bus.finished
        got += rig.take(first=len(got))
    assert [int.from_bytes(data[-8:], "big") for data in got] == list(range(200))
    assert rig.bus.finished and rig.bus.finite
    rig.close()


@pytest.mark.parametrize(("rate", "microseconds", "expected"), [("1e6", 10, 11), ("2.5M", 4, 11), ("line", 1, 15),
                                                                ("100k", 9, 1), ("100k", 10, 2)])
def test_a_rate_is_frames_a_second_of_the_models_time(rate, microseconds, expected):
    rig = Rig(f"gen={rate}")
    rig.step()
    rig.give(0, 1)
    rig.step()  # the clock starts
    rig.step(elapsed_us=microseconds)
    assert rig.wire("received") == expected
    rig.close()


def test_a_paced_source_waits_for_the_drivers_first_answer():
    rig = Rig("gen=1e6,frames=50")
    for _ in range(5):
        rig.step(elapsed_us=1e6)
    assert rig.wire("received") == 1
    rig.give(0, 1)
    rig.step()
    rig.step(elapsed_us=10)
    assert rig.wire("received") == 11
    rig.close()


def test_the_wires_clock_stands_still_while_the_model_is_not_stepped():
    rig = Rig("gen=1e6", n=1024)
    rig.step()
    rig.give(0, 1)
    rig.step()
    rig.step(5000, elapsed_us=1e6)
    assert 250 <= rig.wire("received") <= 260
    rig.close()


# Sink


def numbered(sequence, size=60, port=9):
    return frame(size)[:12] + bytes(Ether(src=MAC, dst=MAC) / IP() / UDP(dport=port))[12:42].ljust(size - 20, b"\0") + \
        struct.pack(">Q", sequence)


@pytest.mark.parametrize(("sequence", "checked", "errors", "gaps"), [
    ([0, 1, 2, 3], 4, 0, 0), ([7, 8, 9], 3, 0, 0), ([0, 1, 4, 9], 4, 0, 6), ([0, 2, 1, 3], 4, 1, 1),
    ([0, 1, 1, 2], 4, 1, 0), ([5, 4], 2, 1, 0), ([0, (1 << 63)], 2, 1, 0)])
def test_the_sink_catches_reordered_and_repeated_frames(sequence, checked, errors, gaps):
    rig = Rig()
    for number in sequence:
        rig.send(numbered(number))
    rig.step()
    assert rig.wire("sequence_checked") == checked and rig.wire("sequence_errors") == errors
    assert rig.wire("sequence_gaps") == gaps and rig.wire("sent") == len(sequence)
    rig.close()


@pytest.mark.parametrize("data", [frame(60), frame(1514), numbered(3, port=10), numbered(3)[:59], frame(14)])
def test_the_sink_leaves_other_frames_alone(data):
    rig = Rig()
    rig.send(data)
    rig.step()
    assert rig.wire("sent") == 1 and rig.wire("sequence_checked") == 0
    rig.close()


def test_each_transmit_queue_has_an_order_of_its_own():
    rig = Rig(queues=2)
    for number, q in ((5, 0), (6, 0), (0, 1), (1, 1)):
        rig.send(numbered(number), q=q)
    rig.step()
    assert rig.wire("sequence_checked") == 4 and rig.wire("sequence_errors") == 0
    rig.close()


# Captures


def test_what_comes_in_goes_out_byte_for_byte(tmp_path):
    frames = [frame(length, fill=length & 255) for length in range(14, 1500, 13)]
    rig = Rig(f"in={write_pcap(tmp_path / 'in.pcap', frames)},out={tmp_path / 'out.pcap'}", n=32)
    first = 0
    while first < len(frames):
        assert rig.step()
        for data in rig.take(first=first):
            rig.send(data)
            first += 1
    rig.run()
    assert rig.bus.finished
    rig.close()
    with Capture(tmp_path / "out.pcap") as capture:
        ends = capture.offsets + capture.lengths
        assert [capture.data[a:b].tobytes() for a, b in zip(capture.offsets, ends, strict=True)] == frames


def test_a_capture_can_be_played_again(tmp_path):
    frames = [frame(fill=1), frame(fill=2)]
    rig = Rig(f"in={write_pcap(tmp_path / 'in.pcap', frames)},loop=3")
    rig.step()
    assert rig.received() == frames * 3
    rig.close()


def test_a_capture_with_a_rate_loses_what_finds_no_descriptor(tmp_path):
    frames = [frame(fill=k) for k in range(100)]
    rig = Rig(f"in={write_pcap(tmp_path / 'in.pcap', frames)},rate=1e6", n=32)
    rig.write(r.SRRCTL[0], 2 | 1 << 25 | 1 << 28)
    rig.step()
    rig.give(0, 1)
    rig.step()
    rig.step(200, elapsed_us=99)
    assert rig.read(r.QPRDC[0]) == 100 - 32
    rig.close()


def test_an_empty_capture_is_finished_at_once(tmp_path):
    rig = Rig(f"in={write_pcap(tmp_path / 'in.pcap', [])}")
    assert rig.step() == 0 and rig.bus.finished
    rig.close()


def test_a_full_output_makes_transmission_wait_until_there_is_room(tmp_path):
    """The window is made tiny, so that the file has to grow between two visits."""
    rig = Rig(f"out={tmp_path / 'out.pcap'}")
    state = rig.model.state
    state.out.limit = state.out.position + np.uint64(2 * 76)
    state.out.margin = 0
    for k in range(5):
        rig.send(frame(fill=k))
    assert rig.step() == 2 and not rig.sent(2)
    assert rig.step() == 3 and rig.sent(4)
    rig.close()
    assert len(Capture(tmp_path / "out.pcap")) == 5


def test_an_output_that_cannot_grow_ends_with_an_error_and_a_valid_file(tmp_path):
    rig = Rig(f"out={tmp_path / 'out.pcap'}")

    def full():
        raise IxyError("out.pcap: No space left on device")

    rig.bus._writer.service = full
    rig.model.state.out.limit = rig.model.state.out.position + np.uint64(76)
    rig.send(frame(fill=1))
    rig.send(frame(fill=2))
    rig.step()
    with pytest.raises(IxyError, match="No space left"):
        rig.bus.check()
    assert rig.step() == 1 and rig.wire("refused") == 1, "the driver is not held up"
    rig.close()
    assert len(Capture(tmp_path / "out.pcap")) == 1


# Links


def test_a_link_carries_frames_both_ways_in_order():
    a, b = Rig("link=x"), Rig("link=x", mac=False)
    mine, other = [frame(60 + k, fill=k) for k in range(40)], [frame(1514 - k, fill=k) for k in range(30)]
    for rig, frames in ((a, mine), (b, other)):
        for data in frames:
            rig.send(data)
    for rig in (a, b, a, b):
        rig.step()
    assert b.received() == mine and a.received() == other
    a.close()
    b.close()


def test_a_link_loses_nothing_when_the_other_end_is_slow():
    a, b = Rig("link=y", n=2048), Rig("link=y", n=32)
    sent = [frame(60, fill=k & 255) for k in range(1500)]
    for data in sent:
        a.send(data)
    a.run()
    assert a.read(r.TDH[0]) == 1024, "the cable holds 1024 frames"
    got = []
    while len(got) < 1500:
        assert b.step()
        got += b.take(first=len(got))
        a.step()
    assert got == sent and b.wire("lost") == 0
    a.close()
    b.close()


def test_frames_too_long_for_a_link_are_refused_and_counted():
    a, b = Rig("link=z"), Rig("link=z")
    for length in (2032, 2033):
        a.send(frame(length))
    a.step()
    assert a.wire("refused") == 1 and a.wire("sent") == 1
    a.close()
    b.close()


def test_a_pulled_link_loses_frames_and_blocks_nobody():
    a, b = Rig("link=w"), Rig("link=w")
    b.close()
    for _ in range(60):
        a.send(frame())
    assert a.step() == 60 and a.wire("refused") == 60 and not a.bus.finished
    again = Rig("link=w")  # the name is free: a cable of its own
    assert again.step() == 0
    again.close()
    a.close()


def test_a_link_has_two_ends():
    a, b = Rig("link=v"), Rig("link=v")
    with pytest.raises(UsageError, match="two ends already"):
        Rig("link=v")
    a.close()
    b.close()


# Faults


def fates(text, count=400):
    rig = Rig(f"frames={count},{text}", n=1024)
    rig.run(100)
    got = [int.from_bytes(data[-8:], "big") for data in rig.received()]
    summary = rig.bus.summary()
    rig.close()
    return got, summary


def test_loss_is_reproducible_and_depends_on_the_seed():
    one, summary = fates("loss=0.3,seed=1")
    assert one == fates("loss=0.3,seed=1")[0]
    assert one != fates("loss=0.3,seed=2")[0]
    assert one == sorted(set(one)) and len(one) + summary["lost"] == 400
    assert 60 < summary["lost"] < 180


@pytest.mark.parametrize(("loss", "kept"), [("0", 400), ("1", 0), ("1e-9", 400)])
def test_loss_at_its_limits(loss, kept):
    assert len(fates(f"loss={loss}")[0]) == kept


def test_corruption_is_reproducible_and_shows_as_crc_errors():
    one, summary = fates("corrupt=0.25,seed=5")
    assert one == fates("corrupt=0.25,seed=5")[0]
    assert len(one) + summary["corrupted"] == 400 and 50 < summary["corrupted"] < 150


@pytest.mark.parametrize("source", ["frames=10", "gen=1e6"])
def test_delay_holds_the_source_back(source):
    rig = Rig(f"{source},delay=100")
    assert rig.step() == 0 and rig.step(elapsed_us=99) == 0
    assert rig.step(elapsed_us=1) > 0
    rig.close()


def test_delay_holds_every_frame_of_a_link_back():
    a, b = Rig("link=d"), Rig("link=d,delay=50")
    a.send(frame(fill=1))
    a.step(elapsed_us=10)
    b.step(elapsed_us=10)
    a.send(frame(fill=2))
    a.step(elapsed_us=20)
    assert b.step(elapsed_us=49) == 0
    assert b.step(elapsed_us=1) == 1 and b.received() == [frame(fill=1)]
    assert b.step(elapsed_us=19) == 0 and b.step(elapsed_us=1) == 1
    a.close()
    b.close()


# TAP


def tap_is_allowed():
    return os.path.exists("/dev/net/tun") and os.geteuid() == 0


needs_tap = pytest.mark.skipif(not tap_is_allowed(), reason="needs root and /dev/net/tun")


@pytest.fixture
def tap():
    name = f"ixy{os.getpid() % 100000}"
    rig = Rig(f"tap={name}")
    peer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
    peer.bind((name, 0))
    peer.settimeout(DEADLINE_S)
    yield rig, peer, name
    peer.close()
    rig.close()


@needs_tap
def test_frames_pass_a_tap_both_ways(tap):
    rig, peer, _ = tap
    rig.send(frame(100, fill=1))
    rig.send(frame(1514, fill=2))
    rig.step()
    assert peer.recv(2048) == frame(100, fill=1) and peer.recv(2048) == frame(1514, fill=2)
    peer.send(frame(200, fill=3))
    wait_until(lambda: rig.step() and frame(200, fill=3) in rig.received())


@needs_tap
def test_a_tap_that_is_down_loses_frames_like_a_pulled_cable(tap):
    rig, _, name = tap
    os.system(f"ip link set {name} down")
    rig.send(frame())
    rig.step()
    assert rig.wire("refused") == 1 and rig.wire("sent") == 0
    rig.bus.check()


@needs_tap
def test_a_tap_in_use_is_refused(tap):
    _, _, name = tap
    with pytest.raises(IxyError, match="in use"):
        Rig(f"tap={name}")


@needs_tap
def test_a_removed_tap_is_an_error(tap):
    rig, _, name = tap
    os.system(f"ip link delete {name}")
    rig.send(frame())
    rig.step()
    with pytest.raises(IxyError, match="TAP interface"):
        rig.bus.check()


# On its own thread


def running(text, **more):
    rig = Rig(text, **more)
    rig.bus.manual = False
    rig.bus.start()
    return rig


def test_a_running_device_receives_by_itself_and_stops():
    rig = running("frames=63")
    wait_until(lambda: len(rig.received()) == 63)
    rig.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("82599")]


def test_registers_and_engine_do_not_disturb_each_other():
    """A device that is counted, reset and set up while it runs: nothing is lost between two reads of a counter."""
    rig = running("frames=5000,flows=3", n=128)
    total = taken = 0
    deadline = time.monotonic() + DEADLINE_S
    while taken < 5000:
        frames = rig.take(first=taken)
        assert [int.from_bytes(data[-8:], "big") for data in frames] == list(range(taken, taken + len(frames)))
        taken += len(frames)
        total += rig.read(m.ALL["GPRC"])
        rig.write(r.MTA[3], taken)
        rig.write(r.FCTRL, 0x700)
        assert time.monotonic() < deadline
    assert total + rig.read(m.ALL["GPRC"]) == 5000
    wait_until(lambda: rig.bus.finished)
    rig.close()


def test_devices_come_and_go_while_others_run():
    steady = running("gen=1000", n=64)
    for _ in range(3):
        guests = [running("frames=20") for _ in range(3)]
        for guest in guests:
            wait_until(lambda guest=guest: len(guest.received()) == 20)
        for guest in guests:
            guest.close()
    taken = 0

    def served():
        nonlocal taken
        taken += len(steady.take(first=taken))
        return taken > 3

    wait_until(served)
    steady.close()


def test_a_running_link_carries_everything():
    a, b = running("link=t", n=64), running("link=t", n=64)
    sent, got, deadline = 0, [], time.monotonic() + DEADLINE_S
    while len(got) < 500:
        assert time.monotonic() < deadline
        while sent < 500 and (sent - a.read(r.TDH[0])) % 64 < 63 and a.free_tx < (1 << 20) - 4096:
            a.send(frame(60 + sent % 50, fill=sent & 255))
            sent += 1
        got += b.take(first=len(got))
    assert got == [frame(60 + k % 50, fill=k & 255) for k in range(500)]
    a.close()
    b.close()


def test_a_device_that_fails_does_not_take_those_of_its_worker_with_it(monkeypatch):
    monkeypatch.setattr(ENGINE, "_divide_processors", lambda: sorted(os.sched_getaffinity(0))[-1:])
    broken, sound = (open_bus("sim:gen=line", "gen=line") for _ in range(2))
    for bus in (broken, sound):
        bus.start()
    with broken.model.held() as state:  # a queue such as only a fault of the model could make
        queue = state.tx[0]
        queue.ring, queue.length, queue.head, queue.enabled = (1 << 64) - 16, 64, 8, 1
        broken.bar0.view("<u4")[r.TDT[0].offset // 4] = 9
        state.tx_enabled[0], state.tx_queues, state.tx_on = 0, 1, 1
    wait_until(lambda: ENGINE.failed(broken.model.slot))
    with pytest.raises(IxyError, match="the simulated device failed: .*overflow"):
        broken.check()
    broken.close()
    now = int(sound.model.state.now)
    wait_until(lambda: int(sound.model.state.now) > now)
    sound.check()
    sound.close()


def test_a_device_that_always_wants_attention_leaves_the_others_their_turn():
    buses = [open_bus("sim", "", manual=True) for _ in range(2)]
    greedy, other = sorted((bus.model for bus in buses), key=lambda model: model.slot)
    control = new_record(CONTROL)
    control.worker, control.slice, control.slots = 1 << 32, 1 << 60, other.slot + 1
    for model in (greedy, other):
        assign(model.state, np.uint64(1 << 32))
    greedy.state.armed = greedy.state.happened = 1
    serve(control, ENGINE.devices, ENGINE.clock.record)
    assert greedy.state.attention and other.state.now
    for bus in buses:
        assign(bus.model.state, np.uint64(0))
        bus.close()


def test_the_engine_makes_room_in_the_output_by_itself(tmp_path):
    rig = running(f"out={tmp_path / 'out.pcap'}")
    with rig.model.held() as state:
        state.out.limit = state.out.position + np.uint64(76)
    for k in range(10):
        rig.send(frame(fill=k))
    wait_until(lambda: rig.bus.finished)
    rig.close()
    assert len(Capture(tmp_path / "out.pcap")) == 10


def test_too_many_devices_are_refused_and_closing_makes_room():
    buses, free = [], len(ENGINE._free)
    try:
        with pytest.raises(UsageError, match="64 devices"):
            for _ in range(100):
                buses.append(open_bus("sim", "", manual=True))
    finally:
        for bus in buses:
            bus.close()
    open_bus("sim", "", manual=True).close()
    assert len(ENGINE._free) == free


# Specs


def refuse(text, pattern):
    with pytest.raises(UsageError, match=pattern):
        open_bus(f"sim:{text}", text, manual=True)


@pytest.mark.parametrize(("text", "pattern"), [
    ("speed=1", "unknown key 'speed': expected one of gen, frames"),
    ("gen=fast", "gen=fast: expected a number of frames a second"), ("gen=0", "gen=0"), ("gen=-1", "gen=-1"),
    ("gen=nan", "gen=nan"), ("gen=1e12", "at most 1e9"), ("frames=0", "from 1"), ("frames=1.5", "whole number"),
    ("frames=many", "whole number"), ("gen=1,size=59", "from 60 to 1514"), ("gen=1,size=1515", "from 60 to 1514"),
    ("gen=1,flows=0", "from 1 to 60000"), ("frames=1,loss=1.1", "from 0 to 1"), ("frames=1,corrupt=-1", "from 0 to 1"),
    ("frames=1,delay=x", "delay=x"), ("frames=1,seed=0", "from 1"), ("mac=1:2:3", "six bytes"),
    ("mac=01:00:00:00:00:00", "one station"), ("mac=00:00:00:00:00:00", "one station"), ("device=xyz", "hexadecimal"),
    ("device=10fb0", "four digits"), ("min_frame=13", "from 14 to 60"), ("tap=a/b", "interface name"),
    ("tap=abcdefghijklmnop", "1 to 15"), ("size=100", "size= needs gen="), ("flows=2", "flows= needs"),
    ("rate=5", "rate= needs in="), ("loop=2", "loop= needs in="), ("loss=0.1", "needs a source"),
    ("gen=1,in=x", "in= .*cannot be combined|cannot be combined"), ("in=x,tap=y", "cannot be combined"),
    ("tap=y,link=z", "cannot be combined"), ("out=x,link=z", "each says where it sends to"),
    ("frames=1,link=z", "each says what it receives"), ("out=x,tap=y", "cannot be combined")])
def test_a_spec_that_cannot_be_is_refused_by_name(text, pattern):
    refuse(text, pattern)


def test_every_key_is_documented_and_parsed():
    from ixy_numba.sim import spec

    assert set(OPTIONS) == set(spec._PARSERS)
    assert all(line and len(line) < 110 for line in OPTIONS.values())


@pytest.mark.parametrize("text", ["in=/nonexistent.pcap", "out=/nonexistent/x.pcap", "in=/tmp"])
def test_files_that_cannot_be_opened_are_one_error_and_leave_nothing(text):
    free = len(ENGINE._free)
    with pytest.raises(IxyError):
        open_bus("sim", text, manual=True)
    assert len(ENGINE._free) == free


@pytest.mark.parametrize(("text", "expected"), [("1000000", 1e6), ("1e6", 1e6), ("2.5M", 2.5e6), ("1k", 1e3),
                                                ("line", 10e9 / 8 / 84)])
def test_rates(text, expected):
    from ixy_numba.sim.spec import parse

    assert parse("sim", {"gen": text}).rate == pytest.approx(expected)


def test_identity():
    bus = open_bus("sim", "device=1528,mac=02:00:00:00:00:55", manual=True)
    assert (bus.vendor, bus.device, bus.simulated, bus.name) == (0x8086, 0x1528, True, "sim")
    assert bus.read32(0xA204) >> 8 & 0xFF == 0x55 and bus.bar0.shape == (0x20000,)
    bus.close()
    bus.close()
