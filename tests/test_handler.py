"""Handlers in the forwarding loop, on a NIC that moves only when a test says so."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinynic import DD, EOP, account, attach

from ixy_numba import (
    DROP,
    Forwarder,
    Packet,
    Pool,
    UsageError,
    alloc_batch,
    handler,
    kernel,
)
from ixy_numba.core.jit import CHECKED, INTERPRETED
from ixy_numba.datapath import MAX_PORTS, Lane, forward_pass, new_control

U = np.uint64
RAISES, WILD_HIGH, WILD_LOW = 100, 101, 102  # verdicts that are none
checked_only = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast does not check accesses")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")


@handler
def steer(packet, state):
    """Byte 0 says where the packet goes, or what goes wrong; byte 1 is written, as a handler may."""
    wish = np.int64(packet[0])
    state[0] += 1
    packet[1] = packet.port
    if wish == RAISES:
        return np.int64(packet[5000])
    if wish == WILD_HIGH:
        return np.int64(len(state) + 1000)
    if wish == WILD_LOW:
        return np.int64(-1000)
    return wish - 1  # 0 is DROP


def to(port):
    return port + 1


class Rig:
    """`ports` devices on one pool, the loop's record, and what each output should see of each input."""

    def __init__(self, ports=2, ring=64, batch=32, budget=None):
        self.pool = Pool(96 * ports if ring == 64 else 2 * ring * ports + 256)
        self.devices, self.nics = zip(*(attach(self.pool, ring) for _ in range(ports)), strict=True)
        self.rxqs, self.txqs = (tuple(queue[0] for queue in queues) for queues in (
            [device.rx for device in self.devices], [device.tx for device in self.devices]))
        self.control = new_control(ports, batch, budget)
        self.state = np.zeros(4, np.int64)
        self.lane = Lane(steer, self.state, self.control)
        self.expected = {pair: [] for pair in itertools.product(range(ports), repeat=2)}  # (input, output): frames
        self.sent = {pair: [] for pair in self.expected}
        self.numbers = itertools.count()
        self.dropped = self.failed = self.broken = 0
        self.held = []

    def arrive(self, port, wish, size=60, done=None):
        """A frame that asks for `wish` on `port`; False when the device has no descriptor for it."""
        body = next(self.numbers).to_bytes(8, "big") * (size // 8 + 1)
        frame = bytes([wish, 0xFF]) + body[: size - 2]
        if not self.nics[port].receive(frame, done):
            return False
        if done is not None:
            self.broken += 1
        elif wish in (RAISES, WILD_HIGH, WILD_LOW):
            self.failed += 1
        elif wish == 0:
            self.dropped += 1
        else:
            self.expected[port, wish - 1].append(frame[:1] + bytes([port]) + frame[2:])
        return True

    def hold(self, count):
        """Buffers in the application's hands."""
        batch = self.pool.batch()
        alloc_batch(self.pool.view, batch, U(count))
        self.held = batch.packet[:count]

    def run(self, port):
        moved = int(forward_pass(self.rxqs[port], self.txqs, self.lane, port))
        account(self.pool, self.devices, self.held)
        return moved

    def all(self, port):
        """Passes until one moves nothing; a pass may be short when verdicts change."""
        return sum(iter(lambda: self.run(port), 0))

    def send(self, port, limit=1 << 20):
        frames = self.nics[port].send(limit)
        for frame in frames:
            self.sent[frame[1], port].append(frame)
        for source in range(len(self.nics)):  # in order, each once, nothing else
            count = len(self.sent[source, port])
            assert self.sent[source, port] == self.expected[source, port][:count]
        return len(frames)

    def drain(self):
        """Passes and wires until nothing moves; all that arrived must then be where it belongs."""
        idle = 0
        while idle < 2:  # a pass may do no more than take buffers back
            moved = sum(self.run(port) for port in range(len(self.nics)))
            moved += sum(self.send(port) for port in range(len(self.nics)))
            idle = 0 if moved else idle + 1
        assert self.sent == self.expected
        assert self.control.forwarded == sum(map(len, self.expected.values()))
        assert self.control.failed == self.failed
        assert self.control.dropped == self.dropped + self.failed + self.broken
        assert sum(int(rxq.state.errors) for rxq in self.rxqs) == self.broken
        assert self.state[0] == self.control.forwarded + self.failed + self.dropped  # each packet was shown once
        assert self.pool.view.table.bad_handles == 0

    def close(self):
        for device in self.devices:
            device.close()
        assert self.pool.available == self.pool.count - len(self.held)


# ---- verdicts

@checked_only
@pytest.mark.parametrize("ports, ring", [(1, 64), (2, 64), (3, 128), (4, 64), (2, 512)])
def test_every_verdict_from_every_port(ports, ring):
    rig = Rig(ports, ring)
    wishes = [0, *(to(port) for port in range(ports)), RAISES, WILD_HIGH, WILD_LOW, to(ports - 1), to(0)]
    for port in range(ports):
        for wish, size in zip(wishes, [60, 61, 14, 1514, 2048] * 3, strict=False):
            assert rig.arrive(port, wish, size)
    rig.drain()
    rig.close()


KINDS = st.sampled_from([0, 1, 1, 1, 2, 2, 2, 3, 4, RAISES, WILD_HIGH])
STEPS = st.lists(st.one_of(
    st.tuples(st.just("arrive"), st.integers(0, 3), st.lists(st.tuples(KINDS, st.integers(1, 64)), max_size=8)),
    st.tuples(st.just("broken"), st.integers(0, 3), st.sampled_from([0, 1, 2049, 0xFFFF])),
    st.tuples(st.just("run"), st.integers(0, 3), st.sampled_from([1, 2, 3, 31, 32, 33, 64, 255, 256])),
    st.tuples(st.just("send"), st.integers(0, 3), st.sampled_from([1, 5, 31, 32, 64, 200]))), max_size=60)


@checked_only
@pytest.mark.parametrize("ports, ring", [(1, 64), (2, 64), (2, 512), (4, 64)])
def test_nothing_is_lost_or_reordered(ports, ring):
    """Random bursts, batches, partial completions, full rings and an empty pool; buffers counted at every step."""

    @settings(max_examples=8 if INTERPRETED else 25)
    @given(STEPS)
    def check(steps):
        rig = Rig(ports, ring)
        for what, port, argument in steps:
            port %= ports
            if what == "arrive":
                for wish, count in argument:
                    wish = wish if wish in (0, RAISES, WILD_HIGH) else (wish - 1) % ports + 1
                    for _ in range(count):
                        rig.arrive(port, wish)
            elif what == "broken":
                rig.arrive(port, 1, done=DD | (argument > 1) * EOP | argument << 32)
            elif what == "run":
                rig.control.batch_size = argument
                assert rig.run(port) <= argument
            else:
                rig.send(port, argument)
        rig.drain()
        rig.close()

    check()


@pytest.mark.parametrize("batch", [1, 2, 31, 32, 33, 255, 256])
def test_a_pass_is_at_most_a_batch(batch):
    rig = Rig(2, 512, batch=batch)
    rig.arrive(0, to(1))
    rig.run(0)  # from now on packets for port 1 take the short way
    for k in range(510):
        rig.arrive(0, to(1) if k % 3 else 0)
    moved = [rig.run(0) for _ in range(600 // batch + 1)]
    full = 510 // batch
    assert moved[: full + 1] == [batch] * full + [510 % batch] and not any(moved[full + 1 :])
    rig.drain()
    rig.close()


def test_mixed_verdicts_ring_each_doorbell():
    rig = Rig(4, 64)
    for wish in (to(1), to(1), to(2), 0, to(1), to(3), to(0), to(0)):
        rig.arrive(0, wish)
    assert rig.all(0) == 8
    assert [int(nic.words[0x6018 // 4]) for nic in rig.nics] == [2, 3, 1, 1]
    assert int(rig.nics[0].words[0x1018 // 4]) == 7  # one short of the next descriptor to look at
    rig.drain()
    rig.close()


# ---- full rings and empty pools

def test_a_full_output_holds_its_packet_and_those_behind_it():
    rig = Rig(4, 64)
    for _ in range(63):
        rig.arrive(0, to(1))
    assert rig.all(0) == 63
    for wish in (to(1), to(2), to(1)):
        rig.arrive(0, wish)
    assert [rig.run(0) for _ in range(3)] == [0, 0, 0]  # the ring of port 1 is full
    rig.arrive(2, to(0))
    assert rig.run(2) == 1  # others go on
    assert rig.send(1, 31) == 31 and rig.run(0) == 0  # only a block of 32 reports that it is sent
    assert rig.send(1, 1) == 1 and rig.all(0) == 3
    rig.drain()
    rig.close()


def test_the_handler_sees_a_waiting_packet_once():
    rig = Rig(2, 64)
    for _ in range(63):
        rig.arrive(0, to(1))
    rig.all(0)
    rig.arrive(0, to(1))
    for _ in range(5):
        rig.run(0)
    assert rig.state[0] == 64
    rig.drain()
    rig.close()


def test_a_port_that_sends_nothing_is_given_up_after_a_while():
    rig = Rig(2, 64)
    for _ in range(63):
        rig.arrive(0, to(1))
    rig.all(0)
    for _ in range(3):
        rig.arrive(0, to(1))
    rig.arrive(0, to(0))
    rig.run(0)
    assert rig.txqs[1].state.stalled > 0 and rig.txqs[1].state.dropped == 0
    rig.txqs[1].state.stalled = 1  # since the machine was started
    assert rig.all(0) == 4 and rig.txqs[1].state.dropped == 3
    assert rig.devices[1].stats().tx_dropped == 3 and rig.control.dropped == 3
    assert rig.send(0) == 1  # the packet behind them
    assert rig.send(1, 32) == 32
    rig.arrive(0, 0)
    rig.arrive(0, to(1))
    assert rig.all(0) == 2 and rig.txqs[1].state.stalled == 0  # it moves again: the time starts anew
    rig.expected[0, 1][63:66] = []
    rig.dropped += 3
    rig.drain()
    rig.close()


def test_packets_that_fail_behind_a_dead_port_are_not_counted_as_its_own():
    rig = Rig(2, 64)
    for _ in range(63):
        rig.arrive(0, to(1))
    rig.all(0)
    rig.txqs[1].state.stalled = 1
    rig.arrive(0, WILD_HIGH)
    rig.arrive(0, 0)
    rig.all(0)
    assert rig.control.failed == 1 and rig.control.dropped == 2 and rig.txqs[1].state.dropped == 0
    rig.drain()
    rig.close()


def test_an_empty_pool_ends_a_batch_and_is_counted():
    rig = Rig(2, 64)
    rig.hold(24)
    for _ in range(50):
        rig.arrive(0, to(1))
    rig.control.batch_size = 256
    moved = rig.run(0) + rig.run(0)
    assert moved == 40 and rig.pool.available == 0
    before = int(rig.pool.view.table.empty)
    assert rig.run(0) == 0 and rig.pool.view.table.empty == before + 1
    assert rig.run(1) == 0 and rig.pool.view.table.empty == before + 1  # nothing there to send
    assert rig.send(1) == 40 and rig.all(0) == 10
    rig.drain()
    rig.close()


@pytest.mark.parametrize("first, then", [(0, 1), (1, 0), (0, 3), (3, 0), (2, 1)])
def test_an_empty_pool_takes_back_what_any_output_has_sent(first, then):
    rig = Rig(4, 64)
    rig.hold(64)
    for _ in range(45):
        rig.arrive(0, to(first))
    assert rig.all(0) == 45 and rig.send(first) == 45
    for _ in range(30):
        rig.arrive(1, to(then))
    assert rig.all(1) == 30  # 19 were left; the others had to come from the first output
    rig.drain()
    rig.close()


def test_dropping_needs_no_buffer():
    rig = Rig(2, 64)
    rig.hold(64)
    for _ in range(200):
        rig.arrive(0, 0)
        rig.run(0)
    assert rig.control.dropped == 200 and rig.pool.view.table.empty == 0
    rig.drain()
    rig.close()


@pytest.mark.parametrize("done", [
    DD | 60 << 32, DD | EOP, DD | EOP | 2049 << 32, DD | EOP | 0xFFFF << 32, DD | EOP | 1 << 29 | 60 << 32])
def test_descriptors_that_make_no_sense(done):
    """No end of packet, length 0 or over the buffer's, a MAC error: counted, and the buffer used again."""
    rig = Rig(2, 64)
    for _ in range(3):
        rig.arrive(0, to(1))
        rig.arrive(0, to(1), done=done)
    assert rig.all(0) == 6
    assert rig.devices[0].stats().rx_errors == 3
    rig.drain()
    rig.close()


@pytest.mark.parametrize("budget", [0, 1, 31, 32, 33, 100])
def test_the_budget_is_exact(budget):
    rig = Rig(2, 512, budget=budget)
    for _ in range(200):
        rig.arrive(0, to(1))
        rig.arrive(0, 0)  # not forwarded: does not count
    while rig.control.forwarded < budget:
        assert rig.run(0) > 0
    assert rig.control.forwarded == budget and rig.run(0) == 0
    assert rig.send(1) == budget
    rig.close()


# ---- the loop in its thread

def forward(rig, **options):
    return Forwarder(rig.devices, steer, state=rig.state, **options)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.001)


def test_forwarder_moves_packets_until_its_count():
    rig = Rig(2, 64)
    with forward(rig, packets=20) as forwarder:
        until(lambda: forwarder.began is not None)
        assert not forwarder.finished
        for _ in range(30):
            rig.arrive(1, to(0))
        until(lambda: forwarder.finished)
    assert forwarder.count("forwarded") == 20 and rig.send(0) == 20
    forwarder.check()
    account(rig.pool, rig.devices)
    rig.close()


def test_forwarder_stops_when_told():
    rig = Rig(2, 64)
    forwarder = forward(rig).start()
    until(lambda: forwarder.began is not None)
    rig.arrive(0, to(1))
    until(lambda: forwarder.count("forwarded") == 1)
    forwarder.stop()
    assert not any(thread.name.startswith("forwarder") for thread in threading.enumerate())
    rig.send(1)
    account(rig.pool, rig.devices)
    rig.close()


def test_each_queue_has_a_state_of_its_own():
    pools = [Pool(192), Pool(192)]
    devices, nics = zip(*(attach(pools, 64, queues=2) for _ in range(2)), strict=True)
    state = np.zeros(4, np.int64)
    with Forwarder(devices, steer, state=state) as forwarder:
        for queue, count in ((0, 5), (1, 9)):
            for _ in range(count):
                nics[0].receive(bytes([to(1), 0]) * 30, queue=queue)
        until(lambda: forwarder.count("forwarded") == 14)
    assert forwarder.states[0] is state and [int(own[0]) for own in forwarder.states] == [5, 9]
    assert [len(nics[1].send(queue=queue)) for queue in range(2)] == [5, 9]
    for device in devices:
        device.close()
    assert [pool.available for pool in pools] == [192, 192]


def failure_of(wish):
    rig = Rig(2, 64)
    with forward(rig) as forwarder:
        for wanted in (to(1), wish, RAISES):
            rig.arrive(0, wanted)
        until(lambda: forwarder.count("failed") == 1 + (wish != 0) and forwarder.count("forwarded") == 1)
    rig.close()
    return forwarder.explain_failure()


@checked_only
def test_an_exception_is_explained_by_the_handlers_line():
    line = steer.function.__code__.co_firstlineno + 7
    assert failure_of(RAISES) == (f"{__file__}:{line}: handler steer: IndexError: access outside the packet: "
                                  "1 byte(s) at offset 5000 of 60")


@checked_only
@pytest.mark.parametrize("wish, verdict", [(WILD_HIGH, 1004), (WILD_LOW, -1000)])
def test_a_wild_verdict_is_explained(wish, verdict):
    first = steer.function.__code__.co_firstlineno
    assert failure_of(wish) == (f"handler steer ({__file__}:{first}): returned {verdict}; expected a port from 0 to 1, "
                                "or DROP")


def test_no_failure_no_explanation():
    rig = Rig(2, 64)
    assert forward(rig).explain_failure() is None
    rig.close()


@kernel
def far_byte(packet, state):
    return packet[int(state[1])]


@handler
def leans_on_a_kernel(packet, state):
    state[0] += 1
    return np.int64(far_byte(packet, state))


@checked_only
def test_a_failure_in_a_handlers_own_kernel_is_explained():
    rig = Rig(2, 64)
    state = np.array([0, 4000], np.int64)
    with Forwarder(rig.devices, leans_on_a_kernel, state=state) as forwarder:
        rig.arrive(0, to(1))
        until(lambda: forwarder.count("failed") == 1)
    line = leans_on_a_kernel.function.__code__.co_firstlineno + 3
    assert forwarder.explain_failure().startswith(
        f"{__file__}:{line}: handler leans_on_a_kernel: IndexError: access outside the packet")
    rig.close()


def test_a_handler_called_from_python_works_on_a_packet():
    state = np.zeros(4, np.int64)
    part = Packet(np.array([2, 0, 7], np.uint8), port=1)
    assert steer(part, state) == 1 and state[0] == 1 and part[1] == 1
    assert steer.__name__ == "steer" and steer.__doc__.startswith("Byte 0 says")


# ---- what is refused

@handler
def names_nothing(packet):
    return packet.nonsense


@handler
def falls_off_the_end(packet):
    if packet[0] == 1:
        return 1


@handler
def returns_a_float(packet):
    return 0.5


@handler
def takes_an_attribute(packet, state):
    return state.absent


@compiled_only
@pytest.mark.parametrize("bad, state, offset, words", [
    (names_nothing, None, 2, "nonsense"),
    (falls_off_the_end, None, 0, "expected a port's index or DROP on every path"),
    (returns_a_float, None, 0, "returns float64, expected a port's index or DROP on every path"),
    (takes_an_attribute, np.zeros(2), 2, "absent"),
    (steer, {"a": 1}, 0, "state"), (steer, object(), 0, "state"), (steer, "text", 4, "")])
def test_a_handler_that_does_not_compile_is_one_line(bad, state, offset, words):
    rig = Rig(2, 64)
    forwarder = Forwarder(rig.devices, bad, state=state).start()
    until(lambda: forwarder.ended is not None)
    with pytest.raises(UsageError) as caught:
        forwarder.stop()
    message = str(caught.value)
    line = bad.function.__code__.co_firstlineno + offset
    assert "\n" not in message and f"handler {bad.__name__}" in message and words in message
    assert message.startswith(f"{__file__}:{line}: "), message
    rig.close()


def test_arguments_of_handlers():
    with pytest.raises(UsageError, match=r"handler three: expected \(packet\) or \(packet, state\), got 3 parameters"):
        @handler
        def three(packet, state, more):
            return DROP


def test_arguments_of_forwarders():
    rig, other = Rig(2, 64), Rig(1, 64)
    for options, words in (({"batch_size": 0}, "batch size 0: expected 1 to 256"),
                           ({"batch_size": 257}, "batch size 257: expected 1 to 256"),
                           ({"packets": -1}, "-1 packets: expected 0 or more")):
        with pytest.raises(UsageError, match=words):
            forward(rig, **options)
    with pytest.raises(UsageError, match="handler steer: takes a state, none was given"):
        Forwarder(rig.devices, steer)
    with pytest.raises(UsageError, match="handler returns_a_float: takes no state, one was given"):
        Forwarder(rig.devices, returns_a_float, state=rig.state)
    with pytest.raises(UsageError, match="expected a function under the @handler decorator"):
        Forwarder(rig.devices, lambda packet: 0)
    with pytest.raises(UsageError, match="have pools of their own; open them with open_devices"):
        Forwarder([*rig.devices, *other.devices], steer, state=rig.state)
    for count in (0, MAX_PORTS + 1):
        with pytest.raises(UsageError, match=f"{count} devices: expected 1 to 16"):
            Forwarder(list(rig.devices[:1]) * count, steer, state=rig.state)
    rig.close()
    other.close()
