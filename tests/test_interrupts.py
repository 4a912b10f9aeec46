"""Sleeping until an interrupt: no packet is slept on, nothing is lost at the switch, an idle loop costs little."""

import contextlib
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tinynic import TinyNic
from virtio_card import Card
from virtio_peer import EVENT_IDX, MQ, MRG_RXBUF, VERSION_1, Backend, Loop, wait_for

from ixy_numba import (
    Forwarder,
    IxyError,
    Pool,
    UsageError,
    alloc_batch,
    free_batch,
    handler,
    kernel,
    open_device,
    open_devices,
    packet,
    resize,
)
from ixy_numba import device as device_module
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.core.pool import ONE, ZERO, U
from ixy_numba.datapath import new_control, rx_batch, tx_batch
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.drivers.ixgbe.setup import THROTTLE_US
from ixy_numba.fwd import forward
from ixy_numba.sim import open_bus as open_sim
from ixy_numba.sim import regs as m
from ixy_numba.waiting import BUSY, SILENCE, prepare, rest, rx_arm, rx_disarm


@handler
def send_back(packet):
    return packet.port


FOREVER_MS = 10**7  # a wake-up that is lost becomes a failure, not a delay
_names = map("cable{}".format, itertools.count())


def attach(bus, queues=1, interrupts=True, pools=None):
    return device_module._attach(bus, queues, 64, pools, interrupts=interrupts)


def raised(event):
    """How often an eventfd was raised since the last look."""
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


# The 82599, step by step


@contextlib.contextmanager
def stepped(text="frames=1000", queues=1):
    """A device on a simulation that moves only by `device.bus.step`; each step is long enough for the moderation."""
    device = attach(open_sim(f"sim:{text}", text, manual=True), queues)
    try:
        yield device
    finally:
        device.close()


def step(device, frames=1, elapsed_us=1000):
    return device.bus.step(frames, elapsed_us)


def test_a_packet_that_arrives_before_arming_is_told_of():
    with stepped() as device:
        step(device)
        assert rx_arm(device.rx[0])


def test_a_packet_that_arrives_after_arming_raises_the_event():
    with stepped() as device:
        assert not rx_arm(device.rx[0])
        assert not select.select(device.events, [], [], 0)[0]
        step(device)
        assert raised(device.events[0]) == 1


def test_a_packet_between_the_last_look_and_the_devices_notice_of_arming_raises_the_event():
    with stepped() as device:
        rxq = device.rx[0]
        rxq.mask.EIMS = rxq.state.vector  # as rx_arm does, but the packet arrives before it looks again
        device.bus.model.state.rx_on, on = 0, device.bus.model.state.rx_on
        step(device)  # the device takes note of it with nothing there
        device.bus.model.state.rx_on = on
        step(device)
        assert raised(device.events[0]) == 1
        assert rx_arm(rxq)


def test_an_event_is_raised_once_until_armed_again():
    with stepped() as device:
        rxq, batch = device.rx[0], device.pools[0].batch()
        for _ in range(3):
            rx_arm(rxq)
            for _ in range(4):
                step(device)
            assert raised(device.events[0]) == 1
            free_batch(rxq.pool, batch, U(0), rx_batch(rxq, batch, U(64)))
        step(device)
        assert raised(device.events[0]) == 0, "it masked itself"


def test_nothing_is_raised_while_polling():
    with stepped() as device:
        for _ in range(5):
            step(device, 8)
        assert raised(device.events[0]) == 0


def test_moderation_holds_an_event_back_and_does_not_lose_it():
    with stepped() as device:
        rxq = device.rx[0]
        rx_arm(rxq)
        step(device)
        assert raised(device.events[0]) == 1
        rx_arm(rxq)
        for _ in range(THROTTLE_US - 1):
            step(device, 1, 1)
            assert raised(device.events[0]) == 0
        step(device, 0, 1)
        assert raised(device.events[0]) == 1


def test_two_threads_that_arm_their_queues_at_the_same_time_are_both_heard():
    with stepped("frames=1000,flows=64", queues=3) as device:
        assert not any(rx_arm(rxq) for rxq in device.rx)
        step(device, 64)
        assert [raised(event) for event in device.events] == [1, 1, 1]


@pytest.mark.parametrize("vector", [0, 15, 16, 23, 24, 31, 32, 39])
def test_every_vector_is_armed_masks_itself_and_is_moderated(vector):
    with stepped(queues=40) as device:
        def cause():
            device.bus.write32(m.EICS_EX[vector // 32].offset, 1 << vector % 32)

        rx_arm(device.rx[vector])
        cause()
        step(device, 0)
        assert raised(device.events[vector]) == 1
        cause()
        step(device, 0, 0)
        assert raised(device.events[vector]) == 0, "it masked itself"
        rx_arm(device.rx[vector])
        step(device, 0, THROTTLE_US - 1)
        assert raised(device.events[vector]) == 0, "too early"
        step(device, 0, 1)
        assert raised(device.events[vector]) == 1
        rx_arm(device.rx[vector])
        step(device, 0)
        cause()  # by the registers' side of the model, not the engine's
        assert [k for k, event in enumerate(device.events) if raised(event)] == [vector]


def test_registers_with_and_without_interrupts():
    registers = [r.GPIE, r.EIAC, r.EIAM_EX[0], r.EIAM_EX[1], r.IVAR[0], r.IVAR[1], r.EITR[0], r.EITR[2]]
    set_up = [0xC0000030, 0xFFFF, 7, 0, 0x00810080, 0x00000082, 10 << 3, 10 << 3]
    for interrupts, expected in ((False, [0] * 8), (True, set_up)):
        device = attach(open_sim("sim", "", manual=True), 3, interrupts)
        assert [device.regs.read(register) for register in registers] == expected
        assert device.regs.read(r.EIMS_EX[0]) == 0, "all are masked until a loop sleeps"
        device.close()


def test_closing_masks_everything_and_closes_the_eventfds():
    trace = []
    device = device_module._attach(open_sim("sim", "", manual=True), 1, 64, None, interrupts=True,
                                   trace=lambda way, register, value: trace.append((way, register.name, value)))
    event = device.events[0]
    rx_arm(device.rx[0])
    trace.clear()
    device.close()
    assert [access[1:] for access in trace if access[0] == "W"][:3] == [
        ("EIMC", 0x7FFFFFFF), ("EIMC_EX[0]", 0xFFFFFFFF), ("EIMC_EX[1]", 0xFFFFFFFF)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(event)
    device.close()


# Loops that sleep


@contextlib.contextmanager
def forwarding(specs, timeout_ms=FOREVER_MS, **more):
    """A Forwarder between devices, asleep but for what happens."""
    in_place = more.pop("in_place", False)
    devices = open_devices(specs, interrupts=True, ring_size=64, in_place=in_place, **more)
    try:
        forwarder = Forwarder(devices, forward, interrupts=True, in_place=in_place)
        for control in forwarder.controls:
            control.timeout_ms = timeout_ms
        with forwarder:
            wait_for(lambda: forwarder.began, 120)
            yield forwarder
    finally:
        for device in devices:
            device.close()


POLL = {"7", "271", "73"}  # poll on x86-64, and ppoll there and on aarch64


def asleep(forwarder):
    """Wait until all its threads are inside of poll()."""
    for thread in forwarder._threads:
        path = Path(f"/proc/self/task/{thread.native_id}/syscall")
        wait_for(lambda path=path: path.read_text().split()[0] in POLL, 60)


@kernel
def number(pool, batch, count, first):
    """Make `count` buffers in hand packets with the numbers from `first` on."""
    for k in range(count):
        batch.packet[k] = resize(batch.packet[k], U(60))
        packet(pool, batch.packet[k]).set_be32(20, np.int64(first + k))


@kernel
def in_order(pool, batch, count, first):
    for k in range(count):
        if U(packet(pool, batch.packet[k]).be32(20)) != first + k:
            return False
    return True


class Station:
    """The far end of a cable: sends numbered frames, and expects the other end's in order."""

    def __init__(self, spec):
        self.device = open_device(spec, ring_size=512)
        self.pool, self.batch = self.device.pool, self.device.pools[0].batch()
        self.sent = self.received = 0

    def send(self, n):
        while n:
            count = int(alloc_batch(self.pool, self.batch, U(min(n, 32))))
            number(self.pool, self.batch, U(count), U(self.sent))
            first = 0
            while first < count:
                first = int(tx_batch(self.device.tx[0], self.batch, U(first), U(count)))
            self.sent, n = self.sent + count, n - count

    def receive(self):
        n = int(rx_batch(self.device.rx[0], self.batch, U(64)))
        assert in_order(self.pool, self.batch, U(n), U(self.received))
        self.received += n
        free_batch(self.pool, self.batch, U(0), U(n))
        return self.received


@contextlib.contextmanager
def stations(**more):
    cables = [next(_names), next(_names)]
    with contextlib.ExitStack() as stack:
        ends = [Station(f"sim:link={name}") for name in cables]
        for end in ends:
            stack.callback(end.device.close)
        yield ends, stack.enter_context(forwarding([f"sim:link={name}" for name in cables], **more))


def all_arrives(ends):
    """What was sent at one end comes out of the other."""
    for here, there in (ends, ends[::-1]):
        wait_for(lambda here=here, there=there: there.receive() == here.sent, 60)


FORMS = pytest.mark.parametrize("in_place", [False, True])


@FORMS
def test_nothing_is_lost_or_slept_on_in_bursts_and_pauses(in_place):
    chance = random.Random(5)
    with stations(in_place=in_place) as (ends, forwarder):
        for _ in range(150 if not INTERPRETED else 20):
            for end in ends:
                if chance.random() < 0.7:
                    end.send(chance.choice((1, 1, 2, 31, 32, 33, 63, 64, 65, 500)))
            pause = chance.choice((0, 0, 1e-5, 1e-4, 1e-3, None))
            if pause is None:
                all_arrives(ends)
                asleep(forwarder)
            else:
                time.sleep(pause)
            for end in ends:
                end.receive()
        all_arrives(ends)
        assert forwarder.count("sleeps") > 5 and forwarder.count("forwarded") == sum(end.sent for end in ends)


@FORMS
def test_one_packet_after_a_pause_comes_out_without_another(in_place):
    with stations(in_place=in_place) as (ends, forwarder):
        for n in range(1, 6):
            asleep(forwarder)
            ends[n % 2].send(1)
            all_arrives(ends)


def test_each_queue_wakes_its_own_thread():
    specs = ["sim:gen=2000,frames=200,flows=64,size=64", "sim:gen=2000,frames=200,flows=64"]
    with forwarding(specs, queues=3) as forwarder:
        wait_for(lambda: forwarder.count("forwarded") == 400, 60)
        asleep(forwarder)
        assert all(control.forwarded and control.sleeps for control in forwarder.controls)


class Deaf(TinyNic):
    """A NIC whose eventfds are never written."""

    events = ()

    def enable_interrupts(self, vectors):
        self.events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(vectors)]
        return self.events

    def disable_interrupts(self):
        while self.events:
            os.close(self.events.pop())


@contextlib.contextmanager
def deaf(interrupts=True, **more):
    """(forwarder, nic): what the NIC receives is to be sent back."""
    nic = Deaf()
    device = attach(nic, pools=[Pool(256)])
    try:
        with Forwarder([device], send_back, interrupts=interrupts, **more) as forwarder:
            wait_for(lambda: forwarder.began, 120)
            yield forwarder, nic
    finally:
        device.close()


def test_without_an_interrupt_a_packet_is_out_after_the_time_out():
    with deaf(timeout_ms=20) as (forwarder, nic):
        wait_for(lambda: forwarder.count("sleeps") > 3, 60)  # wakes and sleeps again
        nic.receive(bytes(60))
        wait_for(nic.send, 60)


def share_of_a_core(forwarder, seconds=1.0):
    """The share of that time that the loop's thread ran."""
    clock = time.pthread_getcpuclockid(forwarder._threads[0].ident)
    began, used = time.monotonic(), time.clock_gettime(clock)
    time.sleep(seconds)
    return (time.clock_gettime(clock) - used) / (time.monotonic() - began)


def test_an_idle_loop_takes_less_than_a_fiftieth_of_a_core():
    with deaf() as (forwarder, _):
        wait_for(lambda: forwarder.count("sleeps") > 1, 60)
        assert share_of_a_core(forwarder) < 0.02
    with deaf(interrupts=False) as (forwarder, _):
        wait_for(lambda: share_of_a_core(forwarder) > 0.02, 60)  # what a loop that polls takes, if there is any to have
        assert forwarder.count("sleeps") == 0


@pytest.mark.parametrize("end", ["stop", "close"])
def test_the_end_wakes_a_loop_that_sleeps(end):
    with forwarding(["sim", "sim"]) as forwarder:
        asleep(forwarder)
        if end == "close":
            forwarder.devices[0].close()
        else:
            forwarder.stop()
        assert not any(thread.is_alive() for thread in forwarder._threads)


def test_a_busy_loop_does_not_sleep_in_its_short_silences():
    device = attach(Deaf(), pools=[Pool(256)])
    control, handled = new_control(1, 32), U(1_000_000)
    wake = prepare(control, device.events, timeout_ms=1)
    assert rest((device.rx[0],), control, SILENCE - ONE, handled) == SILENCE, "not yet a silence"
    silences = 0
    while rest((device.rx[0],), control, SILENCE, handled) == ZERO:
        assert control.average >= BUSY and control.sleeps == 0
        silences += 1
    assert 10 < silences < 60 and control.sleeps == 1
    assert rest((device.rx[0],), control, SILENCE, handled) == SILENCE and control.sleeps == 2
    device.bus.receive(bytes(60))
    assert rest((device.rx[0],), control, SILENCE, handled) == ZERO and control.sleeps == 2, "a packet waits"
    device.close()
    os.close(wake)


def test_in_place_does_not_sleep_while_something_waits_to_be_sent():
    with forwarding(["sim", "sim"], in_place=True) as forwarder:
        forwarder.stop()
        rxq = forwarder.devices[0].rx[0]
        assert not rx_arm(rxq)
        rxq.state.index = 1  # handed over, and not sent
        assert rx_arm(rxq)
        rxq.state.index = 0


# Virtio


@pytest.mark.parametrize("features", [VERSION_1 | MRG_RXBUF, VERSION_1 | MRG_RXBUF | EVENT_IDX])
def test_a_virtio_device_is_asked_for_an_interrupt_only_while_nobody_polls(features):
    class Bus(Loop):
        def enable_interrupts(self, vectors):
            return [-1] * vectors

    device = attach(Bus(features), pools=[Pool(256)])
    rxq, peer, batch = device.rx[0], device.bus, device.pools[0].batch()
    for _ in range(200):
        peer.deliver(bytes(60))
        assert not peer.wants_interrupt(0), "it polls"
        assert rx_arm(rxq), "a frame is there"
        rx_disarm(rxq)
        free_batch(rxq.pool, batch, U(0), rx_batch(rxq, batch, U(64)))
        assert not rx_arm(rxq)
        peer.deliver(bytes(60))
        assert peer.wants_interrupt(0)
        rx_disarm(rxq)
        peer.deliver(bytes(60))
        assert not peer.wants_interrupt(0)
        assert rx_batch(rxq, batch, U(64)) == 2
        free_batch(rxq.pool, batch, U(0), U(2))
    device.close()


def sent_back(backend, queue, count):
    frames = []
    wait_for(lambda: frames.extend(backend.collect(queue)) or len(frames) >= count, 60)
    return frames


@pytest.mark.parametrize("features", [VERSION_1 | MRG_RXBUF | MQ, VERSION_1 | MRG_RXBUF | EVENT_IDX | MQ])
def test_a_vhost_user_back_end_wakes_the_loop(tmp_path, features):
    chance = random.Random(7)
    with Backend(tmp_path / "s", features=features) as backend:
        devices = open_devices([f"vhost-user:{tmp_path}/s"], ring_size=64, queues=2, interrupts=True)
        backend.wait_ready()
        forwarder = Forwarder(devices, send_back, interrupts=True)
        for control in forwarder.controls:
            control.timeout_ms = FOREVER_MS
        with forwarder:
            wait_for(lambda: forwarder.began, 120)
            for k in range(60):
                pair, frames = k % 2, [bytes([k, j]) * 30 for j in range(chance.choice((1, 2, 31)))]
                if chance.random() < 0.3:
                    asleep(forwarder)
                for frame in frames:
                    backend.deliver(frame, 2 * pair)
                    backend.interrupt(2 * pair)
                assert sent_back(backend, 2 * pair + 1, len(frames)) == frames
            assert forwarder.count("sleeps") > 10
        for device in devices:
            device.close()
        assert backend.faults == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_a_virtio_card_is_told_the_vector_of_each_receive_queue(legacy):
    card = Card(legacy)
    card.enable_interrupts = lambda vectors: setattr(card, "msix_enabled", True) or [-1] * vectors
    device = attach(card)
    written = [entry for entry in card.log if entry[0] == "vector"]
    assert written == [("vector", 0)] and card.registers["vector", 0] == 0
    assert device.mac.hex() == "525400123456", "though legacy registers of vectors are in front of it"
    device.close()
    card = Card(legacy)
    card.enable_interrupts = lambda vectors: [-1] * vectors
    card.no_vectors = True
    with pytest.raises(IxyError, match="card: the device has no interrupt vector 0 for queue 0; do without interrupts"):
        attach(card)


# What users see


def test_a_device_without_interrupts_says_so_and_gives_everything_back():
    pool = Pool(256)
    with pytest.raises(IxyError, match="tiny: no interrupts this way; on PCI, bind the device to vfio-pci"):
        attach(TinyNic(), pools=[pool])
    assert pool.available == pool.usable


def test_a_forwarder_needs_devices_with_interrupts():
    device = attach(TinyNic(), interrupts=False, pools=[Pool(256)])
    with pytest.raises(UsageError, match=r"open all devices with open_devices\(…, interrupts=True\)"):
        Forwarder([device], send_back, interrupts=True)
    with pytest.raises(UsageError, match="a time-out of 0 ms: expected 1 to 10000"):
        Forwarder([device], send_back, timeout_ms=0)
    device.close()


def test_a_capture_of_slow_traffic_is_written_asleep(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "ixy_numba.pcap", "--json", "--interrupts", "sim:gen=500", tmp_path / "out.pcap", "100"],
        capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and json.loads(run.stdout.splitlines()[-1])["written_packets"] == 100


def test_the_app_sleeps_and_ctrl_c_wakes_it():
    run = subprocess.Popen(
        [sys.executable, "-m", "ixy_numba.fwd", "--json", "--interrupts", "sim:gen=1000,frames=50", "sim:link=nobody"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = run.stderr.readline()  # the first second's figures: it runs
    assert "rx" in line
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=300)
    summary = json.loads(out.splitlines()[-1])
    assert run.returncode == 0 and summary["interrupts"] and summary["sleeps"] > 2
    assert summary["forwarded_packets"] == 50
