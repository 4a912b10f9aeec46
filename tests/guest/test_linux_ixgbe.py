"""Linux's own ixgbe driver, Debian's unmodified module, in a guest on the simulated 82599: an independent judge."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from guest_rig import HERE, PATHS, Machine, vfio_user, vfio_user_address
from guest_wire import until

from ixy_numba.device import open_device
from ixy_numba.sim.regs import NATIVE
from tools import Refused, guest_parts

HOST, GUEST, MAC = "10.99.0.1", "10.99.0.2", "02:00:00:99:00:02"
ADDRESS = vfio_user_address(0)
START_S, STEP_S = 600, 60  # hangs, not slow machines: the kernels may have to be compiled
TRANSFER, FLOWS = 24 << 20, 16
RING_SIZE = 512


class Outside:
    """The other end of the cable: a TAP interface in a network namespace of its own, where the device is served."""

    def __init__(self, folder):
        self.name, self.trace = f"ixy-{os.getpid()}", folder / "trace"
        self.socket, self._server, self._output = folder / "nic", None, folder / "server"
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        try:
            for command in ("ip link set lo up", "ip tuntap add tap0 mode tap", f"ip addr add {HOST}/24 dev tap0",
                            "ip link set tap0 up"):
                self.run(*command.split())
            self._serve()
        except BaseException:
            self.close()
            raise

    def _serve(self):
        with open(self._output, "w") as output:
            self._server = self.start(
                sys.executable, "-m", "ixy_numba.sim", "--listen", self.socket, "--trace", self.trace,
                "--wire", f"tap=tap0,min_frame=60,mac={MAC}", stdout=output, stderr=output)
        until(lambda: "listening" in self.output() or self._server.poll() is not None, START_S, "the server")
        assert self._server.poll() is None, self.output()

    def output(self):
        return self._output.read_text()

    def command(self, *words):
        return ["ip", "netns", "exec", self.name, *map(str, words)]

    def run(self, *words):
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True, timeout=STEP_S).stdout

    def start(self, *words, **more):
        return subprocess.Popen(self.command(*words), env={**os.environ, "PYTHONPATH": PATHS}, text=True, **more)

    def close(self):
        if self._server:
            self._server.terminate()
            self._server.wait(STEP_S)
        subprocess.run(["ip", "netns", "del", self.name], check=True)


@pytest.fixture(scope="module")
def outside():
    if os.geteuid():
        pytest.skip("needs root, for a TAP interface in a network namespace of its own")
    for program in ("ip", "ping", "ethtool"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("needs /dev/net/tun")
    try:
        guest_parts.parts()
    except Refused as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory(prefix="linux-ixgbe-") as folder:
        outside = Outside(Path(folder))
        try:
            yield outside
        finally:
            outside.close()


class Card:
    """The interface that the guest's kernel made of the device."""

    def __init__(self, machine):
        self.machine, self.name = machine, None

    def shell(self, command):
        return self.machine.shell(command)

    def load(self):
        self.shell("modprobe ixgbe")
        self.name = self.shell(f"ls /sys/bus/pci/devices/{ADDRESS}/net").strip()
        self.shell(f"ip addr add {GUEST}/24 dev {self.name} && ip link set {self.name} up")
        self.wait_for_carrier(1)

    def wait_for_carrier(self, value):
        self.shell(f"for k in $(seq 600); do [ $(cat /sys/class/net/{self.name}/carrier) = {value} ] && exit 0; "
                   f"sleep 0.1; done; dmesg | tail -20; exit 1")

    def ping(self, count=5, more=""):
        """The first may get lost on the way to an address that is not known yet."""
        self.shell(f"ping -q -c 1 -W 10 {more} {HOST} || true")
        self.shell(f"ping -q -i 0.2 -c {count} -W 20 {more} {HOST} | grep -q ' {count} received'")

    def statistics(self):
        lines = self.shell(f"ethtool -S {self.name}").splitlines()[1:]
        return {name.strip(): int(value) for name, value in (line.rsplit(":", 1) for line in lines)}

    def registers(self, *names):
        """{name: value} of these registers in `ethtool -d`."""
        told = self.shell(f"ethtool -d {self.name} | grep -E '^0x[0-9A-Fa-f]+: ({'|'.join(names)}) '")
        found = re.findall(r"^0x\w+: (\w+) +\(.*?\) +0x(\w+)$", told, re.M)
        return {name: int(value, 16) for name, value in found}


@pytest.fixture(scope="module")
def card(outside):
    machine = Machine([], iommu=False, devices=vfio_user(outside.socket))
    try:
        card = Card(machine)
        card.load()
        yield card
    finally:
        with contextlib.suppress(AssertionError):
            print(machine.shell("uname -r; dmesg | tail -30"))
        machine.close()


def transfer(outside, card, direction):
    """TRANSFER bytes in FLOWS connections; returns what both ends made of them."""
    here, there = ("receive", "send") if direction == "out" else ("send", "receive")
    program = HERE / "tcp_transfer.py"
    server = outside.start(sys.executable, program, "listen", HOST, here, FLOWS, TRANSFER, stdout=subprocess.PIPE)
    try:
        assert server.stdout.readline() == "listening\n"
        theirs = card.shell(f"{sys.executable} {program} connect {HOST} {there} {FLOWS} {TRANSFER}").split()
        ours = server.communicate(timeout=STEP_S)[0].split()
    finally:
        server.kill()
        server.wait()
    return ours, theirs


def test_linux_ixgbe_probes_the_card_and_has_a_link(card):
    assert "ixgbe" in card.shell(f"readlink /sys/bus/pci/devices/{ADDRESS}/driver")
    assert card.shell(f"cd /sys/class/net/{card.name} && cat speed address").split() == ["10000", MAC]
    told = card.shell(f"ethtool {card.name}; ethtool -i {card.name}; ethtool -m {card.name}; ethtool -l {card.name}")
    for words in ("Speed: 10000Mb/s", "Port: FIBRE", "Link detected: yes", "driver: ixgbe",
                  "10G Ethernet: 10G Base-SR", "SIM-10G-SR"):
        assert words in told
    assert told.count("Combined:\t2") == 2  # of at most two
    log = card.shell("dmesg")
    assert "Multiqueue Enabled: Rx Queue count = 2, Tx Queue count = 2" in log and "NIC Link is Up 10 Gbps" in log
    for trouble in ("HW Init failed", "not supported", "checksum", "timed out", "Call Trace", "Adapter removed"):
        assert not re.search(f"ixgbe.*{trouble}|{trouble}.*ixgbe", log), log


def test_linux_ixgbe_pings(card):
    card.ping()
    card.ping(3, "-s 8000")  # in fragments


def offloads_used(outside):
    """(descriptors, doorbells) that the driver gave to its transmit queues, from the trace of register accesses."""
    tails, descriptors, doorbells = {}, 0, 0
    for line in outside.trace.read_text().splitlines():
        words = line.split()
        if len(words) == 5 and words[1] == "W" and words[3].startswith("TDT["):
            value = int(words[4], 16)
            descriptors += (value - tails.get(words[3], 0)) % RING_SIZE
            doorbells += 1
            tails[words[3]] = value
    return descriptors, doorbells


@pytest.mark.parametrize("direction", ["out", "in"])
def test_linux_ixgbe_moves_tcp_with_offloads(outside, card, direction):
    features = card.shell(f"ethtool -k {card.name}")
    for name in ("rx-checksumming", "tx-checksumming", "tcp-segmentation-offload", "scatter-gather"):
        assert f"{name}: on" in features
    before, given = card.statistics(), offloads_used(outside)[0]
    ours, theirs = transfer(outside, card, direction)
    assert len(ours) == FLOWS and ours == theirs
    after, given = card.statistics(), offloads_used(outside)[0] - given
    grown = {name: after[name] - before.get(name, 0) for name in after}
    if direction == "out":  # fewer descriptors than frames, though each that is not segmented needs at least one
        assert grown["tx_pkts_nic"] > TRANSFER / 1514 and given < grown["tx_pkts_nic"]
    else:
        assert grown["rx_pkts_nic"] > TRANSFER / 1514
        assert grown["rx_queue_0_packets"] and grown["rx_queue_1_packets"]
    assert after["rx_csum_offload_errors"] == 0
    for side in (outside.run, lambda *words: card.shell(" ".join(words))):
        names, values = (line.split() for line in side("grep", "^Tcp:", "/proc/net/snmp").splitlines())
        assert values[names.index("InCsumErrors")] == "0"


def test_linux_ixgbe_statistics_agree_with_each_other(card):
    card.ping(1)
    counts = card.statistics()
    assert counts["rx_packets"] == counts["rx_pkts_nic"] == counts["rx_queue_0_packets"] + counts["rx_queue_1_packets"]
    assert counts["tx_packets"] == counts["tx_pkts_nic"] == counts["tx_queue_0_packets"] + counts["tx_queue_1_packets"]
    assert counts["rx_bytes_nic"] == counts["rx_bytes"] + 4 * counts["rx_packets"]  # the CRC
    padding = counts["tx_bytes_nic"] - counts["tx_bytes"] - 4 * counts["tx_packets"]
    assert 0 <= padding < 18 * 100  # of ARP, which the card pads to 60 bytes
    for name in ("rx_errors", "rx_crc_errors", "rx_missed_errors", "tx_errors", "tx_timeout_count", "rx_length_errors",
                 "tx_restart_queue", "rx_no_buffer_count", "rx_over_errors"):
        assert counts[name] == 0, name


def test_linux_ixgbe_registers_are_consistent(card):
    registers = card.registers("STATUS", "LINKS", "RAL00", "RAH00", "EIMS", "[RT]D(LEN|H|T)0[01]", "[RT]XDCTL0[01]")
    assert registers["STATUS"] == 1 << 19 | 1 << 7 and registers["LINKS"] >> 28 == 7
    assert registers["RDLEN00"] == registers["TDLEN00"] == 16 * RING_SIZE
    assert max(registers["RDH00"], registers["RDT00"]) < RING_SIZE and registers["RDH00"] != registers["RDT00"]
    for k in range(2):
        assert registers[f"TDH{k:02}"] == registers[f"TDT{k:02}"]  # all sent
        assert registers[f"RXDCTL{k:02}"] & 1 << 25 and registers[f"TXDCTL{k:02}"] & 1 << 25
    low, high = registers["RAL00"], registers["RAH00"]
    assert (low | (high & 0xFFFF) << 32).to_bytes(6, "little").hex(":") == MAC and high >> 31
    assert registers["EIMS"] & 1 << 20  # the link's changes are interrupts


def test_linux_ixgbe_sees_the_cable_pulled_and_plugged_in_again(outside, card):
    outside.run("ip", "link", "set", "tap0", "down")
    card.wait_for_carrier(0)
    assert "NIC Link is Down" in card.shell("dmesg | tail -5")
    outside.run("ip", "link", "set", "tap0", "up")
    card.wait_for_carrier(1)
    card.ping()


def test_linux_ixgbe_is_unloaded_and_loaded_again(card):
    card.shell("modprobe -r ixgbe")
    assert not card.shell(f"ls -d /sys/class/net/{card.name} 2>/dev/null || true")
    card.load()
    card.ping()


def native(offset):
    return NATIVE.get(offset, offset)


def test_linux_ixgbe_writes_what_the_list_of_departures_explains(outside, card):
    """Which registers only one of it and our driver writes is in docs/deviations.md. Last, for all that it ever did."""
    words = (line.split() for line in outside.trace.read_text().splitlines())
    theirs = {native(int(line[2], 16)) for line in words if len(line) == 5 and line[1] == "W"}
    ours = set()
    device = open_device("sim:frames=1", queues=2,
                         trace=lambda kind, register, value: ours.add(native(register.offset)) if kind == "W" else None)
    device.close()
    text = (HERE.parents[1] / "docs" / "deviations.md").read_text().partition("## What Linux's driver writes")[2]
    head, _, entries = text.partition("\n- ")
    other_way = {int(offset, 16) for offset in re.findall(r"`([0-9A-F]{5})`", head)}
    assert ours - theirs == other_way
    explained = re.findall(r"`([0-9A-F]{5})`(?:–`([0-9A-F]{5})`)?", entries)
    ranges = [(int(first, 16), int(last or first, 16)) for first, last in explained]
    left = {offset for offset in theirs - ours if not any(first <= offset <= last for first, last in ranges)}
    assert not left, sorted(f"{offset:05X}" for offset in left)
    for first, last in ranges:
        assert any(first <= offset <= last for offset in theirs - ours), f"{first:05X} is explained, but not written"
