"""The virtio driver against DPDK's vhost back-end: frames, traffic of two kernels, crashes, queue pairs, the apps."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_apps import LIMIT_S, assert_same, frames_of, refused
from test_sim_receive import write_pcap
from test_traffic import SPACES, TAPS, namespace, ping_all, running, transfer, wait_for

from bench import testpmd
from bench.testpmd import Testpmd
from ixy_numba import Forwarder, Pool, open_device
from ixy_numba.core.pool import BUFFER_SIZE
from ixy_numba.fwd import forward

pytestmark = pytest.mark.skipif(not testpmd.installed(), reason="needs dpdk-testpmd (Debian: dpdk-dev)")

ROOT = Path(__file__).resolve().parents[2]
FRAMES, RETRY = 20_000, "set burst tx delay 5 retry 100000"
LARGEST = 1514
COMPILED_S = 300  # kernels that no test before has compiled, on a busy machine


@pytest.fixture(scope="module")
def mixed():
    """Frames of 60 to 1514 bytes, the bounds among them, of random bytes."""
    rng = random.Random(82599)
    sizes = [60, 61, 1513, LARGEST] + [rng.randint(60, LARGEST) for _ in range(FRAMES - 4)]
    return [rng.randbytes(size) for size in sizes]


def capture_ends(tmp_path, *sources):
    """--vdev arguments of two capture ports, a queue a source: the first sends them, the second writes out0.pcap, ….

    Between them, in the order of testpmd's pairs of ports (0 with 1, 2 with 3), go the devices under test.
    """
    for k, frames in enumerate(sources):
        write_pcap(tmp_path / f"in{k}.pcap", frames)
    write_pcap(tmp_path / "none.pcap", [])

    def port(name, received, sent):
        queues = range(len(sources))
        return ",".join([name, *(f"rx_pcap={tmp_path / received.format(k)}" for k in queues),
                         *(f"tx_pcap={tmp_path / sent.format(k)}" for k in queues)])

    return port("net_pcap0", "in{}.pcap", "back{}.pcap"), port("net_pcap1", "none.pcap", "out{}.pcap")


def vhosts(tmp_path, queues=1):
    """(their sockets, --vdev arguments) of two vhost-user back-ends."""
    sockets = [tmp_path / f"{side}.sock" for side in "ab"]
    return sockets, [f"net_vhost{k},iface={path},queues={queues}" for k, path in enumerate(sockets)]


def wait_until_connected(back_end, sockets):
    for path in sockets:
        back_end.wait_for(f"({path}) virtio is now ready", LIMIT_S)


def wait_until_sent(back_end, port, packets):
    wait_for(lambda: back_end.statistics()[port]["tx_packets"] >= packets, f"{packets} packets out of port {port}")


class App:
    """An app of ours in the background, `with App(…) as ours`: compiled and running once the block begins."""

    def __init__(self, name, *args):
        self.process = subprocess.Popen([sys.executable, "-m", f"ixy_numba.{name}", "--json", *map(str, args)],
                                        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")))

    def __enter__(self):
        self._reader.start()
        try:
            wait_for(lambda: any("Mpps" in line for line in self.lines) or self.process.poll() is not None, "figures",
                     COMPILED_S)
            assert self.process.poll() is None, "".join(self.lines)
        except BaseException:
            self.__exit__()
            raise
        return self

    def result(self, ask=False):
        """The JSON object that it ends with, by itself or, when we `ask`, by Ctrl-C."""
        if ask:
            self.process.send_signal(signal.SIGINT)
        assert self.process.wait(LIMIT_S) == 0, "".join(self.lines)
        return json.loads(self.process.stdout.read().splitlines()[-1])

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


def test_vhost_back_end_and_dpdk_s_own_front_end(mixed, tmp_path):
    """What the other tests stand on: DPDK at both ends of the sockets gives every frame back as it was."""
    sockets, devices = vhosts(tmp_path)
    source, sink = capture_ends(tmp_path, mixed)
    fronts = [f"net_virtio_user{k},path={path},queues=1,queue_size=256,mrg_rxbuf=0" for k, path in enumerate(sockets)]
    with Testpmd(tmp_path, source, *devices, sink) as back_end:
        with Testpmd(tmp_path, *fronts, cpu=max(os.sched_getaffinity(0)), eal=["--single-file-segments"]) as front_end:
            wait_until_connected(back_end, sockets)
            for end in (front_end, back_end):
                end.command(RETRY)
                end.start("io retry")
            wait_until_sent(back_end, 3, FRAMES)
            front_end.stop()
            assert [front_end.statistics()[k]["rx_packets"] for k in (0, 1)] == [FRAMES, 0]
    assert_same(frames_of(tmp_path / "out0.pcap"), mixed)


def specs(sockets, options=""):
    return [f"vhost-user:{path}{options}" for path in sockets]


def swapped(counters):
    """What testpmd counted at one of its ports, as the other end of the wire should have it."""
    return {f"{'tx' if way == 'rx' else 'rx'}_{what}": counters[f"{way}_{what}"]
            for way in ("rx", "tx") for what in ("packets", "bytes")}


def assert_same_counters(result, theirs, ports):
    """Our ports, in the JSON object of an app, beside those ports in testpmd's statistics."""
    for ours, port in zip(result["ports"], ports, strict=True):
        expected = swapped(theirs[port])
        assert {name: ours[name] for name in expected} == expected
        assert ours["driver"] == "virtio" and not ours["simulated"] and ours["rx_errors"] == ours["tx_dropped"] == 0


def round_trip(tmp_path, *sources, packets=FRAMES, options=""):
    """Captures, a queue each, through DPDK, `fwd` and DPDK into out0.pcap, …; what `fwd` and testpmd say at the end."""
    queues = len(sources)
    sockets, devices = vhosts(tmp_path, queues)
    source, sink = capture_ends(tmp_path, *sources)
    with Testpmd(tmp_path, source, *devices, sink, options=[f"--rxq={queues}", f"--txq={queues}"]) as back_end:
        back_end.command(RETRY)
        with App("fwd", "--no-touch", "--queues", queues, *specs(sockets, options)) as ours:
            wait_until_connected(back_end, sockets)
            back_end.start("io retry")
            wait_until_sent(back_end, 3, packets)
            return ours.result(ask=True), back_end.statistics()


@pytest.mark.parametrize("options", ["", ",mrg_rxbuf=off"])
def test_vhost_fwd_copies_a_capture_byte_for_byte(mixed, tmp_path, options):
    result, theirs = round_trip(tmp_path, mixed, options=options)
    assert result["forwarded_packets"] == FRAMES
    assert_same_counters(result, theirs, (1, 2))
    assert_same(frames_of(tmp_path / "out0.pcap"), mixed)


def test_vhost_frames_over_several_buffers_are_dropped_whole_and_counted(mixed, tmp_path):
    """With MRG_RXBUF, the back-end spreads what is larger than a buffer over several; all around it stays as it was."""
    large = [2 * BUFFER_SIZE, BUFFER_SIZE + 1, 3000, 9000]
    frames = [frame for k in range(200)
              for frame in (*mixed[20 * k : 20 * k + 20], bytes([k]) * large[k % 4], bytes([k]) * BUFFER_SIZE)]
    whole = [frame for frame in frames if len(frame) <= BUFFER_SIZE]
    result, theirs = round_trip(tmp_path, frames, packets=len(whole))
    assert_same(frames_of(tmp_path / "out0.pcap"), whole)
    assert theirs[1]["tx_packets"] == len(frames) and result["ports"][0]["rx_packets"] == len(whole)
    assert result["ports"][0]["rx_errors"] == len(frames) - len(whole) == 200


def test_vhost_two_queue_pairs_carry_their_own_traffic(mixed, tmp_path):
    """A capture into each queue of one port, a capture out of each queue of the other: no frame changes its queue."""
    halves = mixed[: FRAMES // 2], mixed[FRAMES // 2 :]
    result, theirs = round_trip(tmp_path, *halves)
    assert_same_counters(result, theirs, (1, 2))
    for k, half in enumerate(halves):
        assert_same(frames_of(tmp_path / f"out{k}.pcap"), half)


# ---- traffic of two Linux network stacks


@pytest.fixture
def two_hosts(tmp_path, monkeypatch):
    """Two namespaces whose only way to each other is `fwd` between two vhost-user devices; DPDK has the TAPs."""
    for hindrance, reason in ((os.geteuid() != 0, "needs root for network namespaces and TAP interfaces"),
                              (not os.path.exists("/dev/net/tun"), "needs /dev/net/tun")):
        if hindrance:
            pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sockets, devices = vhosts(tmp_path)
    first, second = (f"net_tap{k},iface={tap}" for k, tap in enumerate(TAPS))
    with Testpmd(tmp_path, first, *devices, second) as back_end:
        back_end.command(RETRY)
        with running("-m", "ixy_numba.fwd", "--no-touch", "vhost-user:a.sock", "vhost-user:b.sock"):
            back_end.start("io retry")
            with contextlib.ExitStack() as stack:
                yield [stack.enter_context(namespace(space, tap, address)) for space, tap, address in
                       zip(SPACES, TAPS, ("10.98.0.1", "10.98.0.2"), strict=True)]


def test_vhost_ping_flood_loses_nothing(two_hosts):
    ping_all(two_hosts[0], 3000, "-q", "-f", "-s", "900")


def test_vhost_tcp_arrives_whole(two_hosts):
    transfer(*two_hosts)


# ---- a back-end that dies


def test_vhost_traffic_resumes_after_the_back_end_was_killed(tmp_path):
    """Killed in mid-traffic and started again, twice: our forwarder goes on, and every buffer is back at the end."""
    sockets, vdevs = vhosts(tmp_path)

    def carry_traffic():
        """What the back-end sends out of one port comes back to the other, round and round."""
        wait_until_connected(back_end, sockets)
        before = forwarder.count("forwarded")
        back_end.start("io retry", first=4)
        wait_for(lambda: forwarder.check() or forwarder.count("forwarded") > before + 10_000, "traffic")

    with contextlib.ExitStack() as stack:
        back_end = stack.enter_context(Testpmd(tmp_path, *vdevs))
        pool = Pool(shared=True)
        devices = [stack.enter_context(open_device(spec, pools=[pool])) for spec in specs(sockets)]
        forwarder = stack.enter_context(Forwarder(devices, forward))
        wait_for(lambda: forwarder.began, "compiled loop", COMPILED_S)
        carry_traffic()
        for _ in range(2):
            back_end.kill()
            back_end = stack.enter_context(Testpmd(tmp_path, *vdevs))
            carry_traffic()
    free = pool.view.table.free[: pool.available]
    assert len(np.unique(free)) == pool.available == pool.usable
    pool.close()
    assert [device.bus.summary()["reconnects"] for device in devices] == [2, 2]


# ---- the other apps, and peers that are none


def test_vhost_pktgen_sends_numbered_packets(tmp_path):
    (path, _), (device, _) = vhosts(tmp_path)
    _, sink = capture_ends(tmp_path, [])
    with Testpmd(tmp_path, device, sink) as back_end:
        back_end.command(RETRY)
        with App("pktgen", *specs([path]), "--packets", FRAMES, "--size", 61, "--flows", 7) as ours:
            wait_until_connected(back_end, [path])
            back_end.start("io retry")
            result = ours.result()
        wait_until_sent(back_end, 1, FRAMES)
        assert_same_counters(result, back_end.statistics(), [0])
    packets = frames_of(tmp_path / "out0.pcap")
    assert result["sent_packets"] == FRAMES and {len(packet) for packet in packets} == {61}
    assert [int.from_bytes(packet[-8:], "big") for packet in packets] == list(range(FRAMES))


def test_vhost_pcap_writes_what_arrives(mixed, tmp_path):
    (path, _), (device, _) = vhosts(tmp_path)
    source, _ = capture_ends(tmp_path, mixed)
    with Testpmd(tmp_path, source, device) as back_end:
        back_end.command(RETRY)
        with App("pcap", *specs([path]), tmp_path / "copy.pcap", FRAMES) as ours:
            wait_until_connected(back_end, [path])
            back_end.start("io retry")
            result = ours.result()
        assert_same_counters(result, back_end.statistics(), [1])
    assert result["written_packets"] == FRAMES
    assert_same(frames_of(tmp_path / "copy.pcap"), mixed)


def test_vhost_fwd_ends_after_exactly_n_packets(tmp_path):
    sockets, devices = vhosts(tmp_path)
    with Testpmd(tmp_path, *devices) as back_end:
        with App("fwd", "--packets", 12345, *specs(sockets)) as ours:
            wait_until_connected(back_end, sockets)
            back_end.start("io retry", first=4)
            assert ours.result()["forwarded_packets"] == 12345


@pytest.mark.parametrize("name, more", [("pktgen", ()), ("pcap", ("out.pcap",)), ("fwd", ("sim",))])
def test_vhost_without_a_socket_is_one_line(name, more, tmp_path):
    missing = tmp_path / "missing.sock"
    assert str(missing) in refused(name, *specs([missing], ",wait=0.1"), *more, code=1)


def test_vhost_peer_that_is_silent_is_one_line(tmp_path):
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert str(path) in refused("pktgen", *specs([path], ",wait=0.1"), code=1)  # nobody listens
        listener.listen()
        assert str(path) in refused("pktgen", *specs([path]), code=1)  # nobody answers
