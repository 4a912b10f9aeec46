"""Real traffic of two Linux network stacks through the simulated NICs and TAP interfaces. Needs root for namespaces."""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
LIMIT_S = 300
MEGABYTES = 24

needs = [tool for tool in ("ip", "ping", "tcpdump") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces and TAP interfaces"),
    pytest.mark.skipif(bool(needs), reason=f"needs {', '.join(needs)}"),
    pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="needs /dev/net/tun"),
]


def sh(command, **more):
    return subprocess.run(command, shell=True, check=True, text=True, capture_output=True, timeout=LIMIT_S, **more)


@contextlib.contextmanager
def namespace(name, tap, address):
    """A network namespace with the TAP interface `tap`, which must exist, moved into it."""
    sh(f"ip netns add {name}")
    try:
        sh(f"ip link set {tap} netns {name}")
        sh(f"ip -n {name} link set lo up && ip -n {name} addr add {address}/24 dev {tap}")
        sh(f"ip -n {name} link set {tap} up")
        yield lambda command: ["ip", "netns", "exec", name, *command]
    finally:
        sh(f"ip -n {name} link set {tap} netns {os.getpid()}")  # back to us, or it goes with its namespace
        sh(f"ip netns del {name}")


@contextlib.contextmanager
def running(*command):
    """A program of ours in the background, from its first line of figures on; ended by Ctrl-C."""
    process = subprocess.Popen([sys.executable, *map(str, command)], text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
    reader.start()
    try:
        wait_for(lambda: any("Mpps" in line for line in lines) or process.poll() is not None, "figures")
        yield process
        assert process.poll() is None, "".join(lines)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT_S)
        reader.join(LIMIT_S)
        process.stdout.close()
    out = "".join(lines)
    assert process.returncode == 0 and "Traceback" not in out, out


def wait_for(condition, what, limit_s=LIMIT_S):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {limit_s} s"
        time.sleep(0.02)


TAPS = [f"ixy{os.getpid() % 100000}{side}" for side in "ab"]
SPACES = [f"ixy-test-{os.getpid()}-{side}" for side in "ab"]
SERVER = """
import socket, sys, hashlib
server = socket.create_server(("10.98.0.2", 5001))
print("ready", flush=True)
connection = server.accept()[0]
digest = hashlib.sha256()
while data := connection.recv(1 << 16):
    digest.update(data)
print(digest.hexdigest(), flush=True)
"""
CLIENT = f"""
import socket, random, hashlib
data = random.Random(5).randbytes({MEGABYTES} << 20)
connection = socket.create_connection(("10.98.0.2", 5001), timeout=60)
connection.sendall(data)
connection.shutdown(1)
connection.recv(1)
"""


@pytest.fixture
def two_hosts():
    """Two namespaces whose only way to each other is `fwd --no-touch` between two TAPs."""
    a, b = TAPS
    with running("-m", "ixy_numba.fwd", "--no-touch", f"sim:tap={a}", f"sim:tap={b}"), contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(namespace(space, tap, address))
                 for space, tap, address in zip(SPACES, TAPS, ("10.98.0.1", "10.98.0.2"), strict=True)]
        yield hosts


def ping_all(host, count, *how):
    """Not one of `count` pings is lost, once the hosts know each other's addresses."""
    for number, options in ((3, ["-W", "30"]), (count, how)):
        done = subprocess.run(host(["ping", "-c", str(number), *options, "10.98.0.2"]), text=True, capture_output=True,
                              timeout=LIMIT_S)
        assert f"{number} packets transmitted, {number} received" in done.stdout, done.stdout


def transfer(first, second):
    """What the first host sends over TCP arrives whole at the second."""
    server = subprocess.Popen(second([sys.executable, "-c", SERVER]), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "ready\n"
        subprocess.run(first([sys.executable, "-c", CLIENT]), check=True, timeout=LIMIT_S)
        out, _ = server.communicate(timeout=LIMIT_S)
    finally:
        server.kill()
        server.wait()
    assert out.strip() == hashlib.sha256(random.Random(5).randbytes(MEGABYTES << 20)).hexdigest()


def test_ping_between_two_hosts_loses_nothing(two_hosts):
    ping_all(two_hosts[0], 2000, "-i", "0.001", "-s", "900")


def test_tcp_between_two_hosts_arrives_whole(two_hosts):
    transfer(*two_hosts)


def test_capture_of_real_traffic_round_trips(tmp_path):
    """Ping and TCP of two kernels, captured on the way, forwarded from file to file: every byte the same."""
    real, copy = tmp_path / "real.pcap", tmp_path / "copy.pcap"
    a, b = TAPS
    with running("-m", "ixy_numba.fwd", "--no-touch", f"sim:tap={a}", f"sim:tap={b}"), contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(namespace(space, tap, address)) for space, tap, address in
                         zip(SPACES, TAPS, ("10.98.0.1", "10.98.0.2"), strict=True))
        dump = subprocess.Popen(first(["tcpdump", "-i", a, "-w", str(real), "-U", "-B", "65536"]),
                                stderr=subprocess.PIPE, text=True)
        try:
            while "listening" not in (line := dump.stderr.readline()):
                assert line, "tcpdump ended"
            subprocess.run(first(["ping", "-c", "20", "-i", "0.01", "10.98.0.2"]), check=True, capture_output=True)
            server = subprocess.Popen(second([sys.executable, "-c", SERVER]), stdout=subprocess.PIPE, text=True)
            assert server.stdout.readline() == "ready\n"
            # One segment a frame: what the wire of a real NIC could carry.
            sh(f"ip netns exec {SPACES[0]} {sys.executable} -c '{UDP_BURST}'")
            subprocess.run(first([sys.executable, "-c", CLIENT.replace(f"{MEGABYTES} << 20", "1 << 20")]), check=True)
            server.communicate(timeout=LIMIT_S)
        finally:
            time.sleep(0.5)
            dump.terminate()
            dump.wait()
    subprocess.run([sys.executable, "-m", "ixy_numba.fwd", "--no-touch", f"sim:in={real}", f"sim:out={copy}"],
                   check=True, timeout=LIMIT_S, capture_output=True)
    before = [bytes(frame) for frame, _ in RawPcapReader(str(real))]
    after = [bytes(frame) for frame, _ in RawPcapReader(str(copy))]
    assert len(before) > 500 and min(map(len, before)) < 60  # unpadded frames are among them
    assert after == before


UDP_BURST = """
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for size in range(0, 1400, 7):
    udp.sendto(bytes(size), ("10.98.0.2", 9))
"""


def test_example_responder_answers_ping():
    tap, space = TAPS[0], SPACES[0]
    with running(EXAMPLES / "responder.py", "10.98.0.2", f"sim:tap={tap}"):
        with namespace(space, tap, "10.98.0.1") as host:
            ping_all(host, 500, "-i", "0.002", "-s", "1000")
