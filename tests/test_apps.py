"""The apps as their users meet them: subprocesses, exit codes, JSON, captures."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.utils import RawPcapReader, rdpcap, wrpcap

from ixy_numba import IxyError, cli, open_device, pktgen
from ixy_numba.core.clock import Clock
from ixy_numba.core.memory import new_record
from ixy_numba.core.thread import KernelThread

LIMIT_S = 300  # a hang, not a slow machine


def app(name, *args, code=0, **more):
    """Run an app to its end; returns the finished process."""
    done = subprocess.run([sys.executable, "-m", f"ixy_numba.{name}", *map(str, args)], text=True, timeout=LIMIT_S,
                          stdin=subprocess.DEVNULL, capture_output=True, **more)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def last_json(done):
    return json.loads(done.stdout.splitlines()[-1])


def refused(name, *args, code=2):
    """The one line of complaint of an app that must refuse its arguments."""
    done = app(name, *args, code=code)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ") or ": error: " in line]
    assert len(lines) == 1, done.stderr
    assert "simulated" not in done.stdout
    return lines[0]


def frames_of(path):
    return [bytes(frame) for frame, _ in RawPcapReader(str(path))]


def assert_same(frames, expected):
    """Frame by frame, so that a failure says which and where and not all of both."""
    assert len(frames) == len(expected)
    for k, (frame, wanted) in enumerate(zip(frames, expected, strict=True)):
        if frame != wanted:
            where = next((j for j in range(min(len(frame), len(wanted))) if frame[j] != wanted[j]), "the end")
            pytest.fail(f"frame {k}: {len(frame)} bytes, expected {len(wanted)}; they differ at {where}")


@pytest.fixture
def capture(tmp_path):
    """Mixed Ethernet frames of 14 to 1514 bytes, as a microsecond capture."""
    frames = [Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02") / IP(dst=f"10.0.{k % 7}.{k % 251}")
              / (UDP(sport=k + 1, dport=53), TCP(dport=80), ICMP())[k % 3] / Raw(bytes([k & 255]) * (k * 37 % 1460))
              for k in range(2000)]
    frames += [Ether(dst="ff:ff:ff:ff:ff:ff") / ARP(), Ether(), Ether(type=0x88B5) / Raw(b"x" * 1500)]
    path = tmp_path / "in.pcap"
    wrpcap(str(path), frames)
    return path


INTERRUPTED_ANYWHERE = """
import signal, sys
from ixy_numba import cli

instructions = 0

def run(argv, stop):
    # whether the signal was heard, which comes after instruction `argv`
    global instructions
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == argv:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    stop.wait(0.001)
    sys.settrace(None)
    instructions = seen
    return stop.is_set()

number = 1
while cli.main(run, number):
    number += 1
assert number > instructions, f"lost after instruction {number} of {instructions}"
print(instructions)
"""


def test_an_interrupt_is_heard_wherever_it_comes_in():
    """While the main thread waits, after each single instruction of that."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_ANYWHERE], text=True, timeout=LIMIT_S, capture_output=True)
    assert done.returncode == 0 and int(done.stdout) > 3, done.stderr


def test_fwd_without_devices_forwards_simulated_line_rate():
    done = app("fwd", "--duration", 1.5, "--json")
    result = last_json(done)
    assert result["app"] == "fwd" and result["mode"] == "checked" and result["batch_size"] == 32
    assert result["forwarded_packets"] > 10_000 and result["mpps"] > 0 and result["cycles_per_packet"] > 0
    assert 1.4 < result["seconds"] < 30
    assert [port["simulated"] for port in result["ports"]] == [True, True]
    for port in result["ports"]:
        assert port["driver"] == "ixgbe" and port["rx_packets"] > 0 and port["tx_packets"] > 0
        assert abs(port["rx_bytes"] / port["rx_packets"] - 60) < 1 and port["rx_errors"] == 0  # read while they count
        assert port["sequence_errors"] == 0
    assert all("simulated" in line for line in done.stderr.splitlines() if "Mpps" in line)


@pytest.mark.parametrize("batch_size", [1, 3, 32, 256])
def test_fwd_copies_a_capture_byte_for_byte(capture, tmp_path, batch_size):
    result = last_json(app("fwd", "--json", "--no-touch", "--batch-size", batch_size, f"sim:in={capture}",
                           f"sim:out={tmp_path / 'copy.pcap'}"))
    expected = frames_of(capture)
    assert_same(frames_of(tmp_path / "copy.pcap"), expected)
    assert result["forwarded_packets"] == len(expected)
    sent, received = result["ports"]
    assert sent["rx_packets"] == received["tx_packets"] == len(expected)
    assert sent["rx_bytes"] == received["tx_bytes"] == sum(map(len, expected))


def test_fwd_touches_byte_1_and_nothing_else(capture, tmp_path):
    app("fwd", f"sim:in={capture}", f"sim:out={tmp_path / 'copy.pcap'}")
    touched = [frame[:1] + bytes([frame[1] + 1 & 255]) + frame[2:] for frame in frames_of(capture)]
    assert_same(frames_of(tmp_path / "copy.pcap"), touched)


def test_fwd_both_ways_at_once(capture, tmp_path):
    a, b = tmp_path / "a.pcap", tmp_path / "b.pcap"
    app("fwd", "--no-touch", f"sim:in={capture},out={a}", f"sim:in={capture},out={b}")
    assert_same(frames_of(a), frames_of(capture))
    assert_same(frames_of(b), frames_of(capture))


def test_fwd_stops_after_exactly_n_packets():
    result = last_json(app("fwd", "--packets", 12345, "--json"))
    assert result["forwarded_packets"] == 12345


def test_fwd_with_several_queues(tmp_path):
    result = last_json(app("fwd", "--queues", 4, "--json", "sim:gen=200000,frames=50000", f"sim:out={tmp_path / 'o'}"))
    assert result["forwarded_packets"] == result["ports"][1]["tx_packets"] > 0
    assert len(frames_of(tmp_path / "o")) == result["forwarded_packets"]


def test_the_error_that_all_began_with_is_told(capsys):
    def run(argv, stop):
        with contextlib.ExitStack() as stack:
            stack.callback(fail, "closed, but it did not become quiet")
            fail("the disk is full")

    def fail(words):
        raise IxyError(words)

    assert cli.main(run) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


@pytest.mark.parametrize("state", [
    {"multiplier": 1 << 32, "cycles": 0, "ns": [1 << 62, 1 << 61]},  # set back again and again
    {"multiplier": 1 << 52}])  # a million nanoseconds a cycle: as after a stop, at every look
def test_pktgen_keeps_its_rate_whatever_happens_to_the_clock(state):
    clock = Clock().record
    for name, value in state.items():
        clock[name] = value
    with open_device("sim") as device:
        job = new_record(pktgen.JOB)
        job.batch_size, job.rate, job.size, job.flows, job.budget = 32, 10**9, 60, 1, 100
        thread = KernelThread(pktgen.generate, device.tx[0], pktgen.Job(job, clock, device.pools[0].batch()))
        thread.start()
        deadline = time.monotonic() + LIMIT_S
        while thread.is_alive() and time.monotonic() < deadline:
            clock.turn += 1
            time.sleep(0.0001)
        assert thread.error is None and job.sent == 100


def test_pktgen_numbers_its_packets(tmp_path):
    out = tmp_path / "gen.pcap"
    for size in (60, 61, 1514):
        result = last_json(app("pktgen", f"sim:out={out}", "--packets", 3000, "--flows", 7, "--size", size, "--json"))
        assert result["sent_packets"] == result["ports"][0]["tx_packets"] == 3000
        packets = rdpcap(str(out))
        assert [int.from_bytes(bytes(packet)[-8:], "big") for packet in packets] == list(range(3000))
        assert len({packet[UDP].sport for packet in packets}) == 7
        for packet in packets[:50]:
            raw = bytes(packet)
            assert len(raw) == size
            rebuilt = Ether(raw)
            del rebuilt[IP].chksum, rebuilt[UDP].chksum
            assert bytes(rebuilt) == raw  # scapy computes the same checksums


def test_pktgen_keeps_to_its_rate():
    result = last_json(app("pktgen", "sim", "--packets", 20000, "--rate", 10000, "--json"))
    assert result["sent_packets"] == 20000
    assert result["seconds"] > 1.8  # 2 s at this rate; a slow machine only makes it longer


def test_pcap_writes_what_arrives(tmp_path):
    out = tmp_path / "out.pcap"
    result = last_json(app("pcap", "sim:gen=1000000,frames=100000", out, 100000, "--json"))
    frames = frames_of(out)
    received = result["ports"][0]["rx_packets"]
    assert result["written_packets"] == len(frames) == received
    numbers = [int.from_bytes(frame[-8:], "big") for frame in frames]
    assert numbers == sorted(set(numbers))


def test_pcap_keeps_snaplen_bytes_and_every_frame_of_a_capture(capture, tmp_path):
    out = tmp_path / "out.pcap"
    app("pcap", f"sim:in={capture}", out, "--snaplen", 40)
    assert_same(frames_of(out), [frame[:40] for frame in frames_of(capture)])


@pytest.mark.parametrize("args", [
    ("--batch-size", 0), ("--batch-size", 10000), ("--queues", 0), ("--queues", 65), ("--ring-size", 100),
    ("--duration", "nan-sense"), ("--packets", -1), ("sim",), ("sim", "sim", "sim"), ("nonsense", "sim"),
    ("sim:nonsense", "sim"), ("sim:unknown=1", "sim"), ("sim:gen=", "sim"), ("sim:gen=fast", "sim"),
    ("sim:gen=1,gen=2", "sim"), ("sim:gen=1,in=x", "sim"), ("sim:gen=1,size=7", "sim"), ("0000:03:00.0", "sim"),
    ("",  "sim"), ("sim:device=1572", "sim"), ("sim:device=10ed", "sim"), ("sim:loss=2", "sim"), ("--frobnicate",),
    ("--duration", "nan"), ("--packets", 1 << 64),
])
def test_fwd_refuses_what_cannot_be(args):
    refused("fwd", *args)


def test_every_app_refuses_more_packets_than_64_bits_count():
    assert f"from 0 to {(1 << 64) - 1}" in refused("pktgen", "sim", "--packets", 1 << 64)
    assert f"from 0 to {(1 << 64) - 1}" in refused("pcap", "sim", "/dev/null", 1 << 64)
    result = last_json(app("fwd", "--packets", (1 << 64) - 1, "--duration", 0.1, "--json"))
    assert 0 < result["forwarded_packets"]


def test_apps_refuse_unusable_files(tmp_path):
    bad = tmp_path / "bad.pcap"
    for content in (b"", b"\0" * 100, b"\xd4\xc3\xb2\xa1" + b"\0" * 7):
        bad.write_bytes(content)
        assert str(bad) in refused("fwd", f"sim:in={bad}", "sim", code=1)
    refused("fwd", f"sim:in={tmp_path / 'missing'}", "sim", code=1)
    refused("fwd", f"sim:in={tmp_path}", "sim", code=1)
    refused("fwd", "sim", f"sim:out={tmp_path / 'no' / 'such' / 'directory'}", code=1)
    refused("pcap", "sim", tmp_path, code=1)
    refused("pcap", "sim:gen=1000,frames=10", "/dev/full", code=1)


def test_frames_that_ethernet_cannot_carry_are_counted(tmp_path):
    path, out = tmp_path / "odd.pcap", tmp_path / "out.pcap"
    sizes = [0, 13, 14, 60, 1514, 1515, 1518, 4000]
    records = b"".join(struct.pack("<4I", 1, k, size, size) + bytes(size) for k, size in enumerate(sizes))
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + records)
    done = app("fwd", "--no-touch", "--json", f"sim:in={path}", f"sim:out={out}")
    assert [len(frame) for frame in frames_of(out)] == [14, 60, 1514]
    port = last_json(done)["ports"][0]
    assert port["rx_packets"] == 3 and port["rx_errors"] >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_cleanly(number):
    process = subprocess.Popen([sys.executable, "-m", "ixy_numba.fwd", "--json"], text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # we may run under nohup
    assert "Mpps" in process.stderr.readline()  # it forwards
    process.send_signal(number)
    out, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0 and "Traceback" not in errors
    assert json.loads(out.splitlines()[-1])["forwarded_packets"] > 0


@pytest.mark.parametrize("before, heard", [(lambda number, frame: None, True), (signal.SIG_IGN, False)])
def test_a_hangup_stops_a_run_unless_it_is_ignored(before, heard):
    def run(argv, stop):
        signal.raise_signal(signal.SIGHUP)
        return stop.is_set()

    at_first = signal.signal(signal.SIGHUP, before)
    try:
        assert cli.main(run) == heard
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, at_first)


def test_ctrl_c_during_compilation(tmp_path):
    """With an empty cache: the first Ctrl-C ends the run after the compiler, the second at once."""
    for presses, codes in ((1, {0}), (2, {0, 130, -2})):
        process = subprocess.Popen([sys.executable, "-m", "ixy_numba.fwd"], text=True, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / str(presses))})
        time.sleep(2.5)
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        out, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode in codes and "Traceback" not in errors, (process.returncode, out, errors)


def test_output_closed_early():
    done = subprocess.run(f"{sys.executable} -m ixy_numba.fwd --duration 4 | head -n 1", shell=True, text=True,
                          timeout=LIMIT_S, capture_output=True)
    assert "Mpps" in done.stdout and done.stderr == ""


def test_output_that_cannot_be_written():
    for target, code, errors in ((">/dev/full", 1, "error: the output cannot be written: [Errno 28] No space left"),
                                 (">/dev/full 2>&1", 1, ""), (">&-", 0, "")):
        done = subprocess.run(f"{sys.executable} -m ixy_numba.fwd --packets 1000 {target}", shell=True, text=True,
                              timeout=LIMIT_S, capture_output=True)
        assert done.returncode == code and done.stdout == "", target
        assert done.stderr.startswith(errors) and len(done.stderr.splitlines()) == bool(errors), done.stderr


@pytest.mark.parametrize("name", ["fwd", "pktgen", "pcap"])
def test_help_has_an_example(name):
    text = app(name, "--help").stdout
    assert f"python -m ixy_numba.{name}" in text.split("example:")[1] and "sim[:KEY" in text


def test_a_full_disk_leaves_a_valid_capture(tmp_path):
    if os.geteuid():
        pytest.skip("needs root to mount a small file system")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", mount], check=True)
    try:
        line = refused("pcap", "sim:frames=100000", mount / "out.pcap", code=1)
        assert "No space left" in line
        kept = frames_of(mount / "out.pcap")
        assert 5000 < len(kept) < 100000 and all(len(frame) == 60 for frame in kept)
        assert "No space left" in refused("fwd", "sim:frames=100000", f"sim:out={mount / 'o2.pcap'}", code=1)
    finally:
        subprocess.run(["umount", mount], check=True)
