"""dpdk-testpmd as a subprocess: devices of DPDK at the other end of a vhost-user socket, for benchmarks and tests."""

import itertools
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

from ixy_numba.core.errors import IxyError

PROGRAM = "dpdk-testpmd"
PROMPT = "\ntestpmd> "
HUGE, PLAIN = ("--in-memory",), ("--no-huge", "--no-shconf")  # how a DPDK program gets its memory
MEMORY_MIB = 128
REFUSED = ("Command not found", "Bad arguments", "Ambiguous command")
_STATISTICS = re.compile(
    r"NIC statistics for port (\d+) .*?RX-packets: (\d+)\s+RX-missed: (\d+)\s+RX-bytes: +(\d+)\s+RX-errors: (\d+)"
    r".*?TX-packets: (\d+)\s+TX-errors: (\d+)\s+TX-bytes: +(\d+)", re.DOTALL)
_COUNTERS = ("rx_packets", "rx_missed", "rx_bytes", "rx_errors", "tx_packets", "tx_errors", "tx_bytes")
_CYCLES = re.compile(r"total cycles=(\d+) / total \w+ packets=(\d+)")
_prefixes = itertools.count()


def installed():
    """Whether there is a dpdk-testpmd here (Debian: apt install dpdk-dev)."""
    return shutil.which(PROGRAM) is not None


def environment(lcores, memory=PLAIN):
    """Arguments of DPDK's environment for a program that keeps to itself: no PCI, no files that others share."""
    return ["--lcores", lcores, "--no-pci", *memory, "-m", str(MEMORY_MIB), "--no-telemetry",
            f"--file-prefix=ixy{os.getpid()}-{next(_prefixes)}"]


class Testpmd:
    """An interactive dpdk-testpmd, its one worker on processor `cpu`: devices of DPDK, and forwarding between them.

    directory   where its runtime files go
    devices     --vdev arguments, in the order of their port numbers; their sockets (`iface=`) are made anew
    options     more arguments of testpmd itself
    memory      HUGE or PLAIN pages
    eal         more arguments of DPDK's environment
    The process ends with ours at the latest: it sees the end of its input. IxyError, with its last words, when it does
    not start, ends early, refuses a command, or does not answer in time.
    """

    __test__ = False  # no test case, whatever its name begins with

    def __init__(self, directory, *devices, cpu=None, options=(), memory=PLAIN, eal=()):
        self._output, self._ended = "", False
        cpu = min(os.sched_getaffinity(0)) if cpu is None else cpu
        for device in devices:
            for path in re.findall(r"\biface=(/[^,]*)", device):
                Path(path).unlink(missing_ok=True)  # left by one that was killed: it could not listen, and not say so
        command = ["stdbuf", "-oL", PROGRAM, *environment(f"0@{cpu},1@{cpu}", memory), *eal,
                   *(f"--vdev={device}" for device in devices),
                   "--", "--interactive", "--total-num-mbufs=16384", "--rxd=256", "--txd=256", "--no-flush-rx",
                   *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT,
                                        env={**os.environ, "RUNTIME_DIRECTORY": str(directory)})
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()
        try:
            self.wait_for(PROMPT, timeout_s=60)
        except BaseException:
            self.kill()
            raise

    def _drain(self):
        """Take all output as it comes: with a full pipe the process, and its vhost thread, would stand still."""
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            self._output += data.decode(errors="replace")
        self._ended = True

    def wait_for(self, text, timeout_s=20.0, start=0):
        """Where `text` first appears in the output from `start` on."""
        deadline = time.monotonic() + timeout_s
        while (found := self._output.find(text, start)) < 0:
            if self._ended or time.monotonic() > deadline:
                what = "ended" if self._ended else f"did not print {text.strip()!r} within {timeout_s} s"
                raise IxyError(f"{PROGRAM} {what}; its last words: {self._output[-600:].strip()}")
            time.sleep(0.002)
        return found

    def command(self, text, timeout_s=20.0):
        """Type `text`; returns what it prints."""
        start = len(self._output)
        try:
            self.process.stdin.write(f"{text}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise IxyError(f"{PROGRAM} is gone; its last words: {self._output[-600:].strip()}") from None
        end = self.wait_for(PROMPT, timeout_s, start)
        answer = self._output[start:end]
        if any(word in answer for word in REFUSED):
            raise IxyError(f"{PROGRAM} refused {text!r}: {answer.strip()}")
        return answer

    def start(self, mode, first=0):
        """Forward in this mode ("io", "io retry", "rxonly", "txonly", "macswap", …), with all counters at 0.

        It sends `first` bursts of its own out of every port before.
        """
        for text in (f"set fwd {mode}", "clear port stats all", "start" + f" tx_first {first}" * bool(first)):
            self.command(text)

    def stop(self):
        """Stop forwarding; (cycles, packets) of the passes that moved any, (0, 0) unless they are recorded."""
        counted = _CYCLES.search(self.command("stop"))
        return tuple(map(int, counted.groups())) if counted else (0, 0)

    def statistics(self):
        """{port number: {counter: value}} with rx_ and tx_packets, _bytes, _errors, and rx_missed."""
        return {int(port): dict(zip(_COUNTERS, map(int, values), strict=True))
                for port, *values in _STATISTICS.findall(self.command("show port stats all"))}

    @property
    def worker(self):
        """The thread id of the worker that forwards."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return next(int(task.name) for task in tasks.iterdir() if "worker" in (task / "comm").read_text())

    def kill(self):
        """End it without any warning, as a crash would."""
        self.process.kill()
        self._reap()

    def close(self):
        """Let it end by itself, at the end of its input."""
        if self.process.stdin.closed:
            return
        try:
            self.process.stdin.close()
            self.process.wait(20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
        self._reap()

    def _reap(self):
        self.process.wait()
        self._reader.join()
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
