"""Our ixgbe driver in a guest, on simulated 82599s: real config space, BARs and MSI-X, an IOMMU, and no root."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import boot
from guest_rig import NOBODY, PATHS, vfio_user, vfio_user_address
from guest_traffic import assert_same, mixed_frames
from guest_warm import IXGBE
from guest_wire import until
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapReader, RawPcapWriter

FRAMES = 20_000
POLLED, DRIVEN, RECORDED, GENERATING = (0, 1), (2, 3), 4, 5  # two cards for `fwd` with each way of waiting
ADDRESSES = [vfio_user_address(k) for k in range(6)]
START_S = 600  # a hang, not a slow machine: the server's kernels may have to be compiled


class Outside:
    """The cards, and captures at the ends of their cables: card k receives `frames[k]` once, the last one nothing."""

    def __init__(self, folder):
        self.sockets, self._folder = [folder / f"nic{k}" for k in range(len(ADDRESSES))], folder
        self.frames = [mixed_frames(FRAMES, seed=k) for k in range(GENERATING)]
        words = []
        for k, path in enumerate(self.sockets):
            words += ["--listen", path, "--wire", f"{self._source(k)}out={self._capture(k)}"]
        output = folder / "server"
        with open(output, "w") as log:
            self._server = subprocess.Popen([sys.executable, "-m", "ixy_numba.sim", *words], stdout=log, stderr=log,
                                            env={**os.environ, "PYTHONPATH": PATHS})
        until(lambda: output.read_text().count("listening") == len(words) // 4 or self._server.poll() is not None,
              START_S, "the server")
        assert self._server.poll() is None, output.read_text()

    def _source(self, k):
        if k == GENERATING:
            return ""
        path = self._folder / f"in{k}"
        with RawPcapWriter(str(path), linktype=1) as writer:
            for frame in self.frames[k]:
                writer.write(frame)
        return f"in={path},"

    def _capture(self, k):
        return self._folder / f"out{k}"

    def sent(self, k, first, count):
        """`count` frames that card `k` has sent, after its `first`. The file goes on as zeros, which are no frames."""
        with RawPcapReader(str(self._capture(k))) as reader:
            return [frame for frame, _ in itertools.islice(reader, first, first + count)]

    def close(self):
        self._server.terminate()
        self._server.wait(START_S)


@pytest.fixture(scope="module")
def outside():
    with tempfile.TemporaryDirectory(prefix="guest-ixgbe-") as folder:
        outside = Outside(Path(folder))
        try:
            yield outside
        finally:
            outside.close()


@pytest.fixture(scope="module")
def machine(outside):
    for machine in boot(IXGBE, [], iommu=True, devices=vfio_user(*outside.sockets)):
        machine.tool("bind", "vfio", *ADDRESSES, "--user", NOBODY)
        yield machine


@pytest.mark.parametrize("cards, more", [(POLLED, []), (DRIVEN, ["--interrupts"])], ids=["polling", "interrupts"])
def test_guest_ixgbe_forwards_every_frame_both_ways(outside, machine, cards, more):
    a, b = cards
    words = ["--no-touch", "--packets", 2 * FRAMES, "--json", *more, ADDRESSES[a], ADDRESSES[b]]
    told = machine.shell(f"ulimit -l 262144; setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "
                         f"{sys.executable} -m ixy_numba.fwd {' '.join(map(str, words))}")  # as a user types it
    summary = json.loads(told.splitlines()[-1])
    assert_same(outside.sent(b, 0, FRAMES), outside.frames[a])
    assert_same(outside.sent(a, 0, FRAMES), outside.frames[b])
    assert summary["forwarded_packets"] == 2 * FRAMES
    assert summary["interrupts"] == bool(more)
    for port, received, sent in zip(summary["ports"], cards, reversed(cards), strict=True):
        assert port["driver"] == "ixgbe" and not port["simulated"]
        assert (port["rx_packets"], port["rx_bytes"]) == (FRAMES, sum(map(len, outside.frames[received])))
        assert (port["tx_packets"], port["tx_bytes"]) == (FRAMES, sum(map(len, outside.frames[sent])))
        assert port["rx_errors"] == port["rx_dropped"] == port["tx_dropped"] == 0


def test_guest_ixgbe_pktgen_sends_numbered_packets(outside, machine):
    for k, size in enumerate((60, 1514)):
        machine.app("pktgen", "--packets", FRAMES, "--size", size, "--flows", 7, ADDRESSES[GENERATING], user=NOBODY)
        frames = outside.sent(GENERATING, k * FRAMES, FRAMES)
        assert [int.from_bytes(frame[-8:], "big") for frame in frames] == list(range(FRAMES))
        assert {len(frame) for frame in frames} == {size}
        for frame in frames[:20]:
            rebuilt = Ether(frame)
            del rebuilt[IP].chksum, rebuilt[UDP].chksum
            assert bytes(rebuilt) == frame  # scapy computes the same checksums


def test_guest_ixgbe_pcap_writes_every_frame(outside, machine):
    machine.app("pcap", ADDRESSES[RECORDED], "/tmp/ixgbe.pcap", FRAMES, user=NOBODY)
    machine.shell("cp /tmp/ixgbe.pcap /run/guest/")
    written = [frame for frame, _ in RawPcapReader(str(machine.guest.folder / "ixgbe.pcap"))]
    assert_same(written, outside.frames[RECORDED])
