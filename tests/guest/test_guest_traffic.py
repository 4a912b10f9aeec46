"""The apps on emulated NICs: real PCI, real DMA, every frame compared with what was sent.

Three ways to a NIC: legacy virtio and modern virtio as root through sysfs, with addresses from pagemap; modern virtio
through VFIO and an IOMMU as a user who is not root.
"""

import signal
from typing import NamedTuple

import pytest
from guest_rig import NOBODY, Machine
from guest_traffic import assert_same, carry_both_ways, mixed_frames, ours
from guest_warm import RING_SIZE
from guest_wire import Wire, carry
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapReader

FRAMES = 5000
WINDOW = RING_SIZE // 2  # frames under way: fewer than a receive ring holds
WAYS = ["legacy-sysfs", "modern-sysfs", "modern-vfio"]


class Cards(NamedTuple):
    """Two NICs of a guest, their wires, and the user who drives them."""

    machine: Machine
    nics: list
    wires: list[Wire]
    user: int | None

    def start(self, app, *args, forked=True):
        """Start an app; not forked, by its very command line: `python -m ixy_numba.APP …`."""
        return self.machine.start(f"{'' if forked else 'python -m '}ixy_numba.{app}", *args, "--json",
                                  *["--unbind"] * (self.user is None), user=self.user)

    def start_forwarding(self, *options, forked=True):
        process = self.start("fwd", "--no-touch", *options, *self.nics, forked=forked)
        process.says("Mpps")
        return process

    def interrupts(self):
        """How many MSI-X interrupts of each NIC have arrived at VFIO, while a process has them enabled."""
        lines = self.machine.shell("cat /proc/interrupts").splitlines()
        return [sum(int(line.split()[1]) for line in lines if f"vfio-msix[0]({nic})" in line) for nic in self.nics]

    def free_huge_pages(self):
        return self.machine.shell("grep -E 'HugePages_(Free|Total)' /proc/meminfo")


@pytest.fixture(scope="module", params=WAYS)
def cards(request):
    machine = request.getfixturevalue("translated" if request.param == "modern-vfio" else "plain")
    first = 2 if request.param == "modern-sysfs" else 0
    nics = machine.nics[first : first + 2]
    if request.param == "modern-vfio":
        machine.tool("bind", "vfio", *nics, "--user", NOBODY)
    yield Cards(machine, nics, machine.wires[first : first + 2], NOBODY if request.param == "modern-vfio" else None)
    machine.tool("bind", "restore", *nics)


def check_both_ways(cards, process, frames=FRAMES, before=()):
    """All frames arrive on the other side, in order and unchanged, and the app counts the same.

    `before`: frames that it has carried each way already.
    """
    there, back = mixed_frames(frames, seed=1), mixed_frames(frames, seed=2)
    for wire in cards.wires:
        wire.clear()
    a, b = cards.wires
    out_of_b, out_of_a = carry_both_ways(a, b, there, back, WINDOW)
    process.end(stop=signal.SIGINT)
    assert_same(out_of_b, there)
    assert_same(out_of_a, back)
    summary, there, back = process.summary, [*before, *there], [*before, *back]
    assert summary["forwarded_packets"] == len(there) + len(back)
    for port, received, sent in zip(summary["ports"], (there, back), (back, there), strict=True):
        assert not port["simulated"] and port["driver"] == "virtio"
        assert (port["rx_packets"], port["rx_bytes"]) == (len(received), sum(map(len, received)))
        assert (port["tx_packets"], port["tx_bytes"]) == (len(sent), sum(map(len, sent)))
        assert port["rx_errors"] == port["rx_dropped"] == port["tx_dropped"] == 0


def test_guest_fwd_carries_every_frame_both_ways(cards):
    check_both_ways(cards, cards.start_forwarding(forked=False))


@pytest.mark.parametrize("cards", ["modern-vfio"], indirect=True)
def test_guest_fwd_sleeps_until_an_interrupt(cards):
    """Frames that come after a pause raise MSI-X interrupts and are carried; under load none is lost."""
    (a, b), frames = cards.wires, mixed_frames(10, seed=7)
    process = cards.start_forwarding("--interrupts", forked=False)
    for frame in frames:
        for source, target in ((a, b), (b, a)):
            target.clear()  # which takes longer than the forwarder takes to fall asleep
            assert carry(source, target, [frame], WINDOW) == [frame]
    assert all(cards.interrupts()), cards.machine.shell("cat /proc/interrupts")
    check_both_ways(cards, process, before=frames)
    assert process.summary["interrupts"] and process.summary["sleeps"]


def test_guest_pktgen_sends_numbered_packets(cards):
    wire = cards.wires[0]
    wire.clear()
    for size in (60, 1514):
        cards.start("pktgen", cards.nics[0], "--packets", FRAMES, "--size", size, "--flows", 7).end()
        assert wire.wait_for(FRAMES, 30)
        frames = list(wire.received)
        assert [int.from_bytes(frame[-8:], "big") for frame in frames] == list(range(FRAMES))
        assert {len(frame) for frame in frames} == {size}
        for frame in frames[:20]:
            rebuilt = Ether(frame)
            del rebuilt[IP].chksum, rebuilt[UDP].chksum
            assert bytes(rebuilt) == frame  # scapy computes the same checksums
        wire.clear()


def test_guest_pcap_writes_every_frame(cards):
    frames, file = mixed_frames(FRAMES, seed=3), f"/tmp/{cards.nics[0]}.pcap"
    options = [] if cards.user is None else ["--interrupts"]  # which are VFIO's
    process = cards.start("pcap", cards.nics[0], file, FRAMES, *options)
    process.says("Mpps")
    for frame in frames:
        cards.wires[0].send(frame)  # QEMU waits with what the receive ring has no room for
    process.end()
    cards.machine.shell(f"cp {file} /run/guest/")
    written = [frame for frame, _ in RawPcapReader(str(cards.machine.guest.folder / f"{cards.nics[0]}.pcap"))]
    assert_same(written, frames)


def test_guest_killed_in_mid_traffic_it_starts_again(cards):
    huge_pages = cards.free_huge_pages()
    process = cards.start_forwarding()
    (a, b), frames = cards.wires, mixed_frames(500, seed=4)
    b.clear()
    assert_same(carry(a, b, frames, WINDOW), frames)
    for frame in mixed_frames(WINDOW, seed=5):
        a.send(frame)
    process.kill()  # with frames in its rings
    process.end(-signal.SIGKILL)
    assert cards.free_huge_pages() == huge_pages
    again = cards.start_forwarding()
    check_both_ways(cards, again, 1000)
    assert cards.free_huge_pages() == huge_pages


def test_guest_a_second_process_is_refused(cards):
    process = cards.start_forwarding()
    second = cards.start("pcap", cards.nics[1], "/tmp/none.pcap").end(1)
    assert "another process" in second.refusal
    check_both_ways(cards, process, 200)


def test_guest_the_kernels_driver_takes_the_cards_back(cards):
    """Last: the interfaces come back, and carry the same frames between the same wires."""
    machine, (a, b) = cards.machine, cards.wires
    machine.tool("bind", "restore", *cards.nics)
    machine.shell("modprobe virtio_net")
    names = [machine.shell(f"ls /sys/bus/pci/devices/{nic}/virtio*/net").strip() for nic in cards.nics]
    assert all(names)
    up = "".join(f"ip link set {name} master br0 up promisc on; " for name in names)
    machine.shell(f"ip link add br0 type bridge forward_delay 0; {up} ip link set br0 up; sleep 1")
    refused = machine.app("pcap", "--unbind", cards.nics[0], "/tmp/none.pcap", code=1).refusal
    assert f"its interface {names[0]} is up" in refused, "an interface in use is left alone"
    b.clear()
    frames = mixed_frames(200, seed=6)
    for frame in frames:
        a.send(frame)
    b.wait_for(len(frames) + 20, 5)
    assert_same(ours(b.received), frames)
    machine.shell(f"ip link del br0; {'; '.join(f'ip link set {name} down' for name in names)}")
