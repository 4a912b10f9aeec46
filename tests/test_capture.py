"""Capture files and the clock of their time stamps, against scapy, tcpdump where there is one, and plain struct."""

import errno
import gzip
import os
import random
import resource
import shutil
import socket
import struct
import subprocess
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapReader, wrpcap

from ixy_numba.core import capture, clock
from ixy_numba.core.capture import Capture, CaptureWriter, append
from ixy_numba.core.clock import Clock, now_ns
from ixy_numba.core.errors import ClosedError, IxyError, UsageError
from ixy_numba.core.jit import INTERPRETED, kernel

U = np.uint64
MICRO, NANO = 0xA1B2C3D4, 0xA1B23C4D
START = 1_700_000_000  # seconds

quick = settings(max_examples=20 if INTERPRETED else 60, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])
frame_lists = st.lists(st.binary(max_size=2000), max_size=30)


def pcap(records=(), order="<", magic=NANO, link=1, version=(2, 4), snaplen=65535):
    """The bytes of a pcap file; a record is (seconds, fraction, captured bytes, original length or None)."""
    parts = [struct.pack(order + "I2H2i2I", magic, *version, 0, 0, snaplen, link)]
    for seconds, fraction, data, original in records:
        wire = len(data) if original is None else original
        parts.append(struct.pack(order + "4I", seconds, fraction, len(data), wire) + data)
    return b"".join(parts)


def contents(path):
    """[(time in ns, original length, frame)] as `Capture` sees them."""
    with Capture(path) as found:
        rows = zip(found.offsets, found.lengths, found.original, found.times_ns, strict=True)
        return [(int(t), int(n), bytes(found.data[o : o + U(k)])) for o, k, n, t in rows]


def peer_contents(path):
    """The same by scapy."""
    with RawPcapReader(str(path)) as reader:
        assert reader.nano and reader.linktype == 1
        return [(m.sec * 10**9 + m.usec, m.wirelen, bytes(frame)) for frame, m in reader]


def put(writer, frame, time_ns):
    """Append one frame, with as many services as it takes."""
    buffer = np.frombuffer(frame or b"\0", np.uint8)
    while not append(writer.out, U(buffer.ctypes.data), U(len(frame)), U(time_ns)):
        writer.service()


def refused(path, *words, error=IxyError, then=Capture):
    """`then(path)` fails with one line that names the path and has all `words`."""
    with pytest.raises(error) as caught:
        then(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: ")
    for word in words:
        assert word in text
    return text


# Reading


@quick
@given(frames=frame_lists, order=st.sampled_from("<>"), magic=st.sampled_from([MICRO, NANO]), more=st.integers(0, 9000))
def test_reads_both_byte_orders_and_resolutions(tmp_path, frames, order, magic, more):
    path = tmp_path / "in.pcap"
    records = [(START + k, 999_999 - k, frame, len(frame) + more) for k, frame in enumerate(frames)]
    path.write_bytes(pcap(records, order, magic))
    scale = 1000 if magic == MICRO else 1
    assert contents(path) == [(s * 10**9 + f * scale, n, data) for s, f, data, n in records]


def test_reads_what_scapy_writes(tmp_path):
    path, rng = tmp_path / "in.pcap", random.Random(1)
    frames = [Ether(rng.randbytes(rng.randrange(14, 1514))) for _ in range(100)]
    for k, frame in enumerate(frames):
        frame.time = START + k
    wrpcap(str(path), frames)
    assert contents(path) == [((START + k) * 10**9, len(f), bytes(f)) for k, f in enumerate(frames)]


def test_shapes_and_types(tmp_path):
    path = tmp_path / "in.pcap"
    path.write_bytes(pcap([(1, 2, b"abc", 9), (2**32 - 1, 2**32 - 1, b"", 0)]))
    with Capture(path) as found:
        assert len(found) == 2 and found.data.dtype == np.uint8 and len(found.data) == path.stat().st_size
        assert not found.data.flags.writeable
        kinds = [(part.dtype, part.shape) for part in (found.offsets, found.lengths, found.original, found.times_ns)]
        assert kinds == [(np.uint64, (2,)), (np.uint32, (2,)), (np.uint32, (2,)), (np.uint64, (2,))]
        assert found.times_ns[1] == (2**32 - 1) * (10**9 + 1)
        view = found.data[40:43]
    assert bytes(view) == b"abc"  # a view that is still held stays good


def test_no_records_is_a_valid_capture(tmp_path):
    path = tmp_path / "in.pcap"
    path.write_bytes(pcap())
    assert contents(path) == []


FRAME = (START, 0, bytes(60), None)
DAMAGED = {
    "empty": (b"", ["is empty", "24 bytes"]),
    "three bytes": (b"\xd4\xc3\xb2", ["is no pcap file", "d4 c3 b2"]),
    "text": (b"#!/bin/sh\nexit 0\n" * 9, ["is no pcap file", "23 21 2f 62", "editcap -F nsecpcap"]),
    "pcapng": (b"\x0a\x0d\x0d\x0a" + bytes(24), ["pcapng, not pcap", "editcap -F nsecpcap"]),
    "gzip": (gzip.compress(pcap([FRAME])), ["gzip", "gunzip"]),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(24), ["zstd"]),
    "header cut off": (pcap()[:23], ["cut off", "23 of its header's 24 bytes"]),
    "version 2.3": (pcap(version=(2, 3)), ["version 2.3", "expected 2.4", "tcpdump --nano -r"]),
    "big-endian version 1.0": (pcap(order=">", version=(1, 0)), ["version 1.0"]),
    "cooked": (pcap(link=113), ["link type 113", "cooked", "expected 1 (Ethernet)"]),
    "unknown link type": (pcap(link=147), ["link type 147,", "expected 1 (Ethernet)"]),
    "record header cut off": (pcap([FRAME, FRAME])[:-61],
                              ["record 2 at byte 100 is cut off", "15 of", "tcpdump --nano -r"]),
    "frame cut off": (pcap([FRAME, FRAME])[:-1],
                      ["record 2 at byte 100 is cut off", "59 of its 60", "tcpdump --nano -r"]),
    "frame missing": (pcap([FRAME])[:-60], ["record 1 at byte 24 is cut off", "0 of its 60"]),
    "big-endian cut off": (pcap([FRAME], order=">")[:-1], ["record 1 at byte 24 is cut off", "59 of its 60"]),
    "damaged length": (pcap([FRAME]) + struct.pack("<4I", 1, 2, 2**32 - 1, 0) + bytes(99),
                       ["record 2 at byte 100 is damaged", "4294967295 bytes"]),
    "too long": (pcap([(1, 0, bytes((256 << 10) + 1), None)]), ["record 1 at byte 24 is damaged", "at most 262144"]),
    "writer killed": (pcap([FRAME]) + bytes(100_001), ["only zeros from byte 100", "truncate -s 100 "]),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_in_one_line(tmp_path, kind):
    data, words = DAMAGED[kind]
    path = tmp_path / "in.pcap"
    path.write_bytes(data)
    refused(path, *words)


def test_longest_record_is_accepted(tmp_path):
    path = tmp_path / "in.pcap"
    path.write_bytes(pcap([(1, 0, bytes(256 << 10), None)]))
    assert [len(frame) for _, _, frame in contents(path)] == [256 << 10]


@quick
@given(data=st.binary(max_size=200), order=st.sampled_from("<>"), frames=st.lists(st.binary(max_size=50), max_size=3))
def test_any_bytes_give_records_inside_the_file_or_one_error(tmp_path, data, order, frames):
    path = tmp_path / "in.pcap"
    path.write_bytes(pcap([(1, 2, frame, None) for frame in frames], order) + data)
    try:
        with Capture(path) as found:
            assert len(found) >= len(frames)
            assert np.all(found.offsets + found.lengths <= U(len(found.data)))
    except IxyError as error:
        assert f"{path}: record " in str(error)


def test_file_changed_between_the_passes(tmp_path, monkeypatch):
    path = tmp_path / "in.pcap"
    path.write_bytes(pcap([FRAME] * 3))
    walk = capture._walk

    def walk_then_damage(*args):
        found = walk(*args)
        with open(path, "r+b") as file:  # the second record claims all of memory
            file.seek(100 + 8)
            file.write(b"\xff\xff\xff\xff")
        return found

    monkeypatch.setattr(capture, "_walk", walk_then_damage)
    refused(path, "changed while it was read")


def test_what_is_no_readable_file(tmp_path):
    refused(tmp_path / "none.pcap", "cannot read", "No such file")
    refused(tmp_path, "is a directory")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "is a pipe", "regular file")
    refused("/dev/null", "is a character device")


@pytest.fixture
def ordinary_user():
    """Root may read and write everything: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_without_permission(tmp_path, request):
    path = tmp_path / "in.pcap"
    path.write_bytes(pcap())
    path.chmod(0)
    request.getfixturevalue("ordinary_user")
    refused(path, "cannot read", "Permission denied", "permissions")
    refused(path, "cannot write", "Permission denied", then=CaptureWriter)


def test_remedies_can_be_pasted(tmp_path):
    path = tmp_path / "a b.pcap"
    path.write_bytes(pcap([FRAME])[:-1])
    refused(path, f"tcpdump --nano -r '{path}' -w FIXED")


# Writing


@quick
@given(frames=frame_lists, snaplen=st.sampled_from([1, 64, 65535]), chunk=st.sampled_from([1, 4096, 1 << 20]))
def test_written_frames_read_back(tmp_path, frames, snaplen, chunk):
    path = tmp_path / "out.pcap"
    with CaptureWriter(path, snaplen=snaplen, chunk=chunk) as writer:
        for k, frame in enumerate(frames):
            put(writer, frame, START * 10**9 + k)
        assert writer.frames == len(frames)
        size = writer.bytes_written
    expected = [(START * 10**9 + k, len(frame), frame[:snaplen]) for k, frame in enumerate(frames)]
    assert path.stat().st_size == size == 24 + sum(16 + len(kept) for _, _, kept in expected)
    assert contents(path) == peer_contents(path) == expected


def test_tcpdump_reads_it(tmp_path):
    if not shutil.which("tcpdump"):
        pytest.skip("tcpdump is not installed")
    path = tmp_path / "out.pcap"
    with CaptureWriter(path) as writer:
        for k in range(10):
            put(writer, bytes(12) + b"\x88\xb5" + bytes(46 + k), START * 10**9 + k)
    command = ["tcpdump", "-Z", "root", "-n", "-e", "-tt", "--nano", "-r", "-"]  # as root it would become another user
    with open(path) as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[0].isdigit()]
    assert [line.split()[0] for line in lines] == [f"{START}.{k:09d}" for k in range(10)]
    assert all(f"length {60 + k}:" in line for k, line in enumerate(lines))


def test_longest_frame_through_the_smallest_chunk(tmp_path):
    path = tmp_path / "out.pcap"
    frame = random.Random(2).randbytes(256 << 10)
    with CaptureWriter(path, snaplen=256 << 10, chunk=1) as writer:
        put(writer, frame, 1)
        put(writer, frame, 2)
    assert contents(path) == [(1, len(frame), frame), (2, len(frame), frame)]


def test_full_window_writes_nothing(tmp_path):
    frame = np.arange(4000, dtype=np.uint8)
    with CaptureWriter(tmp_path / "out.pcap", chunk=4096) as writer:
        out, args = writer.out, (U(frame.ctypes.data), U(4000), U(5))
        assert not out.wanted
        assert append(out, *args) and out.wanted == capture.SOON
        before = out.position
        assert not append(out, *args)
        assert out.wanted == capture.STUCK and out.position == before and out.frames == 1 and out.bytes == 4000
        writer.service()
        assert not out.wanted and append(out, *args)
    assert [t for t, _, _ in contents(tmp_path / "out.pcap")] == [5, 5]


@kernel
def append_many(out, frame, count, lost):
    """`count` frames that carry their number, waiting for room; lost[0] = how often there was none."""
    for k in range(count):
        frame[0], frame[1], frame[2] = k & 255, k >> 8 & 255, k >> 16
        address, length = U(frame.ctypes.data), U(60) + U(k) % U(7)
        while not append(out, address, length, U(k)):
            lost[0] += 1


def test_grows_while_a_kernel_appends(tmp_path):
    path, count = tmp_path / "out.pcap", 2_000 if INTERPRETED else 200_000
    frame, lost = np.zeros(66, np.uint8), np.zeros(1, np.int64)
    with CaptureWriter(path, chunk=64 << 10) as writer:
        thread = threading.Thread(target=append_many, args=(writer.out, frame, count, lost))
        thread.start()
        while thread.is_alive():
            writer.service()
            time.sleep(0)
    with Capture(path) as found:
        assert np.array_equal(found.times_ns, np.arange(count))
        assert np.array_equal(found.lengths, 60 + np.arange(count) % 7)
        numbers = sum(found.data[found.offsets + U(k)].astype(int) << 8 * k for k in range(3))
        assert np.array_equal(numbers, np.arange(count))


def test_later_seconds_wrap_and_lengths_survive(tmp_path):
    path = tmp_path / "out.pcap"
    with CaptureWriter(path) as writer:
        put(writer, b"x", (2**32 + 7) * 10**9 + 999_999_999)
    assert contents(path) == [(7 * 10**9 + 999_999_999, 1, b"x")]


def test_overwrites_a_longer_file(tmp_path):
    path = tmp_path / "out.pcap"
    path.write_bytes(b"?" * 1_000_000)
    CaptureWriter(path).close()
    assert path.read_bytes() == pcap()


def test_append_and_service_after_close(tmp_path):
    writer = CaptureWriter(tmp_path / "out.pcap")
    writer.close()
    writer.close()
    assert not append(writer.out, U(0), U(60), U(0))  # and touches no memory
    with pytest.raises(ClosedError):
        writer.service()


def test_never_onto_a_file_in_use(tmp_path):
    path = tmp_path / "a.pcap"
    path.write_bytes(pcap([FRAME]))
    alias = tmp_path / "b.pcap"
    alias.symlink_to(path)
    with Capture(path):
        refused(alias, "in use", then=CaptureWriter)
        assert len(contents(alias)) == 1
    with CaptureWriter(alias):
        refused(path, "in use", then=CaptureWriter)
        refused(path, "being written")
    assert contents(path) == []


@pytest.mark.parametrize("arguments", [{"snaplen": 0}, {"snaplen": (256 << 10) + 1}, {"chunk": 0}])
def test_arguments_out_of_range(tmp_path, arguments):
    with pytest.raises(UsageError, match=str(next(iter(arguments)))):
        CaptureWriter(tmp_path / "out.pcap", **arguments)
    assert not (tmp_path / "out.pcap").exists()


def test_where_no_capture_can_be_written(tmp_path):
    refused(tmp_path, "is a directory", then=CaptureWriter)
    refused(tmp_path / "none" / "out.pcap", "cannot write", "No such file", then=CaptureWriter)
    refused("/dev/full", "is a character device", then=CaptureWriter)
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "is a pipe", "memory-mapped", then=CaptureWriter)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        refused(tmp_path / "socket", "is a socket", then=CaptureWriter)


def test_file_system_without_preallocation(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    refused(tmp_path / "out.pcap", "cannot preallocate", then=CaptureWriter)
    assert contents(tmp_path / "out.pcap") == []


def fill_up(writer):
    """Append until an error; the frames that were taken, and the error's text."""
    frame = bytes(range(250)) * 4
    with pytest.raises(IxyError) as caught:
        while True:
            put(writer, frame, writer.frames)
    assert type(caught.value) is IxyError
    count = writer.frames
    writer.close()
    assert peer_contents(writer.path) == contents(writer.path) == [(k, 1000, frame) for k in range(count)]
    return count, str(caught.value)


def test_file_size_limit(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CaptureWriter(tmp_path / "out.pcap", chunk=128 << 10) as writer:
        put(writer, b"", 0)  # compiled before the limit holds
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
        try:
            with pytest.raises(IxyError, match="File too large.*ulimit -f"):
                while True:
                    put(writer, bytes(1000), 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        count = writer.frames
    assert len(contents(tmp_path / "out.pcap")) == count == 1 + ((1 << 20) - 24 - 16) // 1016


def test_address_space_is_a_limit_too(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "RESERVE", 256 << 10)
    count, text = fill_up(CaptureWriter(tmp_path / "out.pcap", chunk=64 << 10))
    assert count == ((256 << 10) - 24) // 1016 and "File too large" in text


def test_less_address_space_is_taken_where_there_is_less(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "RESERVE", 1 << 62)
    with CaptureWriter(tmp_path / "out.pcap") as writer:
        put(writer, b"frame", 3)
    assert contents(tmp_path / "out.pcap") == [(3, 5, b"frame")]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def test_full_disk_leaves_a_valid_file(small_disk):
    count, text = fill_up(CaptureWriter(small_disk / "out.pcap"))
    assert "No space left" in text and str(small_disk) in text and "make room" in text
    assert count > 900  # nearly all of the disk was used


def test_nearly_full_disk_takes_a_small_capture(small_disk):
    with CaptureWriter(small_disk / "out.pcap") as writer:
        for k in range(600):
            put(writer, bytes(1000), k)
            writer.service()  # wants more room, gets none, and needs none
    assert len(contents(small_disk / "out.pcap")) == 600


def test_disk_full_from_the_start(small_disk):
    with open(small_disk / "ballast", "wb") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    refused(small_disk / "out.pcap", "cannot write", "No space left", "make room", then=CaptureWriter)


# The clock

u64 = st.integers(0, 2**64 - 1)


@given(since=st.integers(0, 2**63), elapsed=st.integers(0, 2**50), multiplier=st.integers(1, 2**38))
@settings(deadline=None)
def test_scaling_is_exact(since, elapsed, multiplier):
    """Six days of a 2 GHz counter, multipliers from 4 THz to 16 MHz."""
    expected = elapsed * multiplier >> 32
    assert int(clock._scaled(U(since + elapsed), U(since), U(multiplier))) == expected
    assert int(clock._scaled(U(since), U(since + elapsed), U(multiplier))) == 0  # a counter that is behind


def test_clock_is_wall_clock_time():
    ours = Clock()
    before, now, after = time.time_ns(), int(now_ns(ours.record)), time.time_ns()
    assert before - 10**8 < now < after + 10**8


@kernel
def steps_back(record, readings):
    """How often a reading was below the one before it."""
    last, back = now_ns(record), 0
    for _ in range(readings):
        now = now_ns(record)
        if now < last:
            back += 1
        last = now
    return back


def test_clock_never_goes_back_while_it_is_corrected(monkeypatch):
    monkeypatch.setattr(Clock, "INTERVAL_NS", 2_000_000)
    monkeypatch.setattr(Clock, "STEP_NS", 1 << 62)  # a machine that stalls must not make it jump, which may go back
    readings = 20_000 if INTERPRETED else 3_000_000
    for _ in range(4):  # stalled inside an update, a machine may show one step; not each time
        ours, found = Clock(), []
        turn = int(ours.record.turn)
        thread = threading.Thread(target=lambda ours, found: found.append(steps_back(ours.record, readings)),
                                  args=(ours, found))
        thread.start()
        while thread.is_alive():
            time.sleep(0.002)
            ours.update()
        time.sleep(0.003)
        ours.update()  # if the thread was done before the first
        assert ours.record.turn > turn
        if found == [0]:
            return
    pytest.fail(f"{found} steps back")


class Machine:
    """A counter and two clocks of our making; `rate` is nanoseconds a cycle."""

    def __init__(self, monkeypatch, rate):
        self.cycles, self.ns, self.rate, self.offset = 10**12, 5 * 10**11, rate, START * 10**9
        self.error = 0
        monkeypatch.setattr(clock, "_read_clocks", lambda: (int(self.cycles), int(self.ns), int(self.ns + self.offset)))
        monkeypatch.setattr(clock, "_set_multiplier", self.set_multiplier)
        monkeypatch.setattr(clock.time, "sleep", self.run)
        self.clock = Clock()

    def set_multiplier(self, record, multiplier):
        clock._set_state(record, U(int(self.cycles)), U(self.clock._at(int(self.cycles))), multiplier)

    def run(self, seconds):
        self.ns += seconds * 1e9
        self.cycles += seconds * 1e9 / self.rate

    def wrong_by_ns(self):
        return int(self.ns + self.offset) - self.clock._at(int(self.cycles))


@pytest.mark.parametrize("rate", [0.25, 1.0, 40.0])
def test_clock_follows_a_drifting_counter(monkeypatch, rate):
    machine, last = Machine(monkeypatch, rate), 0
    machine.rate *= 1 + 50e-6  # the first measurement was that wrong
    for _ in range(20):
        machine.run(1.0)
        machine.clock.update()
        now = machine.clock._at(int(machine.cycles))
        assert now >= last
        last = now
    assert abs(machine.wrong_by_ns()) <= 2 + rate


def test_clock_makes_up_small_differences_and_jumps_over_large_ones(monkeypatch):
    machine = Machine(monkeypatch, 0.4)
    machine.offset -= 5_000_000  # set back by 5 ms: slow down, a millisecond a second
    before = machine.clock._at(int(machine.cycles))
    for k in range(1, 8):
        machine.run(1.0)
        machine.clock.update()
        now = machine.clock._at(int(machine.cycles))
        assert now > before
        before = now
        assert abs(machine.wrong_by_ns() + max(5_000_000 - 1_000_000 * (k - 1), 0)) < 1000
    machine.offset += 3600 * 10**9
    machine.run(1.0)
    machine.clock.update()
    assert abs(machine.wrong_by_ns()) < 10


def test_clock_survives_a_counter_that_restarts(monkeypatch):
    machine = Machine(monkeypatch, 0.4)
    machine.cycles = 5
    machine.run(60.0)
    machine.clock.update()
    machine.run(30.0)
    assert abs(machine.wrong_by_ns()) < 10


def test_updates_in_quick_succession_change_nothing(monkeypatch):
    machine = Machine(monkeypatch, 0.4)
    turn = int(machine.clock.record.turn)
    for _ in range(9):
        machine.run(0.1)
        machine.clock.update()
    assert machine.clock.record.turn == turn
