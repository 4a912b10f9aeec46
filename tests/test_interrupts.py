"""Sleeping until an interrupt: no packet is slept on, nothing is lost at the switch, an idle loop costs next to nothing."""

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
from ixy_numba.drivers.virtio import regs as v
from ixy_numba.fwd import forward
from ixy_numba.sim import open_bus as open_sim
from ixy_numba.sim import regs as m
from ixy_numba.waiting import BUSY, SILENCE, SPINS, prepare, rest, rx_arm, rx_disarm



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
    for interrupts, expected in ((False, [0] * 8), (True, [0xC0000030, 0xFFFF, 7, 0, 0x810080, 0x82, 10 << 3, 10 << 3])):
        device = attach(open_sim("sim", "", manual=True), 3, interrupts)
        assert [device.regs.read(register) for register in registers] == expected
        assert device.regs.read(r.EIMS_EX[0]) == 0, "all are masked until a loop sleeps"
        device.close()


def test_closing_masks_everything_and_closes_the_eventfds():
    trace = []
    device = device_module._attach(open_sim("sim", "", manual=True), 1, 64, None, interrupts=True,
                                   trace=lambda way, register, value: trace.append((register.name, value)))
    event = device.events[0]
    rx_arm(device.rx[0])
    trace.clear()
    device.close()
    assert trace[:3] == [("EIMC", 0x7FFFFFFF), ("EIMC_EX[0]", 0xFFFFFFFF), ("EIMC_EX[1]", 0xFFFFFFFF)]
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


def asleep(forwarder):
    """Until all its threads sleep, in a poll() of their own."""
    for thread in forwarder._threads:
        wait_for(lambda: "poll" in wchan(thread), 60)


def wchan(thread):
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        number = file.read().split()[0]
    return "poll" if number in POLL else number


POLL = {"7", "271", "73"}  # poll and ppoll on x86-64, ppoll on aarch64


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


FORMS = pytest.mark.parametrize("in_place", [False, True])


@FORMS
def test_nothing_is_lost_or_slept_on_in_bursts_and_pauses(in_place):
    chance = random.Random(5)
    with stations(in_place=in_place) as (ends, forwarder):
        for _ in range(150 if not INTERPRETED else 20):
            for here, there in ((0, 1), (1, 0)):
                if chance.random() < 0.7:
                    ends[here].send(chance.choice((1, 1, 2, 31, 32, 33, 63, 64, 65, 500)))
            pause = chance.choice((0, 0, 1e-5, 1e-4, 1e-3, None))
            if pause is None:
                for here, there in ((0, 1), (1, 0)):
                    wait_for(lambda: ends[there].receive() == ends[here].sent, 60)
                asleep(forwarder)
            else:
                time.sleep(pause)
            for end in ends:
                end.receive()
        for here, there in ((0, 1), (1, 0)):
            wait_for(lambda: ends[there].receive() == ends[here].sent, 60)
        assert forwarder.count("sleeps") > 5 and forwarder.count("forwarded") == sum(end.sent for end in ends)


@FORMS
def test_one_packet_after_a_pause_comes_out_without_another(in_place):
    with stations(in_place=in_place) as (ends, forwarder):
        for n in range(1, 6):
            asleep(forwarder)
            ends[n % 2].send(1)
            wait_for(lambda: ends[1 - n % 2].receive() == ends[n % 2].sent, 60)


def test_each_queue_wakes_its_own_thread():
    specs = ["sim:gen=2000,frames=200,flows=64,size=64", "sim:gen=2000,frames=200,flows=64"]
    with forwarding(specs, queues=3) as forwarder:
        wait_for(lambda: forwarder.count("forwarded") == 400, 60)
        assert all(control.forwarded and control.sleeps for control in forwarder.controls)


def test_without_an_interrupt_a_packet_is_out_after_the_time_out():
    class Deaf(TinyNic):
        """Its eventfds are never written."""

        def enable_interrupts(self, vectors):
            return [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(vectors)]

    nic, pool = Deaf(), Pool(256)
    device = attach(nic, pools=[pool])
    with Forwarder([device], send_back, interrupts=True, timeout_ms=20) as forwarder:
        wait_for(lambda: forwarder.count("sleeps") > 3, 120)  # wakes and sleeps again
        nic.receive(bytes(60))
        wait_for(lambda: nic.send(), 60)
    device.close()
    for event in device.events:
        os.close(event)
