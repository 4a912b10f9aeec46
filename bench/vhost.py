"""Our virtio front-end beside DPDK's own virtio-user, each behind vhost-user ports of the same dpdk-testpmd.

The back-end has one processor, the front-ends take turns on the other: ours (front_end.py) and DPDK's
(c/virtio_user.c), in loops that count and time alike. 64-byte frames, bursts of 32, rings of 256. A window in which a
worker had to wait for its processor says little about its code: it is left out.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ixy_numba.core.errors import IxyError

from . import rivals, testpmd
from .common import ROOT, Unavailable, grid, say, tsc_ghz, worker_environment

TABLE = "vhost"
# What the front-end does, and what the back-end does meanwhile: how it forwards, how many bursts it sends before.
WORK = {"receive": ("txonly", 0), "transmit": ("rxonly", 0), "macswap": ("io retry", 8)}
RIVALS = {  # a rival's settings of its virtio-user device, and of DPDK
    "dpdk": ("mrg_rxbuf=0,in_order=0",),
    "dpdk_in_order": ("mrg_rxbuf=0,in_order=1",),
    "dpdk_vectorized": ("mrg_rxbuf=0,in_order=0,vectorized=1",),
    "dpdk_packed": ("mrg_rxbuf=0,in_order=1,packed_vq=1,vectorized=1", "--force-max-simd-bitwidth=512"),
}
OURS = {"handler": "checked", "verbs": "checked", "handler_fast": "fast", "verbs_fast": "fast"}
BASELINE, TARGET = "dpdk", 0.9
MEANINGS = {
    "handler": "ours: handler (default)", "verbs": "ours: batch verbs (default)",
    "handler_fast": "ours: handler, checks off", "verbs_fast": "ours: batch verbs, checks off",
    "dpdk": "DPDK: split ring", "dpdk_in_order": "DPDK: split ring, in order",
    "dpdk_vectorized": "DPDK: split ring, vectorized", "dpdk_packed": "DPDK: packed ring, in order, vectorized",
}
SECONDS, ROUNDS = 0.25, 15
QUICK_SECONDS, QUICK_ROUNDS = 0.1, 3
MOST_LOST = 0.01  # of a window, waiting for a processor
ENOUGH = 3  # undisturbed windows, or all are taken and the row says so
DRAIN_S = 0.02
HUGE_PAGES_NEEDED = 64 * (2 + len(RIVALS)) + 32


@dataclass
class Window:
    """What a front-end counted; see front_end.py. `lost` is the share of the time that a worker had no processor."""

    cycles: int
    timed: int
    passes: int
    packets: int
    seconds: float
    lost: float

    @property
    def cycles_per_packet(self):
        return self.cycles / self.timed

    @property
    def mpps(self):
        return self.packets / self.seconds / 1e6


class FrontEnd:
    """A process that works for a window at a time when it is told to."""

    def __init__(self, command, ghz, environment=None):
        self._ghz = ghz
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        line = "?"
        while line and line != "ready\n":  # DPDK says this and that before
            line = self._process.stdout.readline()
        if not line:
            errors = self._process.communicate()[1].strip().splitlines() or ["no reason given"]
            raise IxyError(f"{' '.join(command)} ended: {errors[-1]}")

    def window(self, what, seconds):
        self._process.stdin.write(f"{what} {seconds}\n")
        self._process.stdin.flush()
        *counted, elapsed, waited_ns = map(int, self._process.stdout.readline().split())
        taken = elapsed / self._ghz / 1e9
        return Window(*counted, taken, waited_ns / 1e9 / taken)

    def close(self):
        self._process.communicate()  # the end of its input ends it


def our_front_end(spec, mode, ghz):
    return FrontEnd([sys.executable, "-m", "bench.front_end", spec], ghz, worker_environment(mode))


def dpdk_front_end(path, settings, memory, ghz):
    device, *more = settings
    cpu = max(os.sched_getaffinity(0))
    command = [rivals.program("virtio_user", "gcc", "libdpdk"), *testpmd.environment(f"0@{cpu}", memory),
               "--single-file-segments", "--log-level=error", *more,
               f"--vdev=net_virtio_user0,path={path},queues=1,queue_size=256,{device}"]
    return FrontEnd(command, ghz, {**os.environ, "RUNTIME_DIRECTORY": str(Path(path).parent)})


class Contest:
    """All front-ends connected to ports of one back-end; one works at a time."""

    def __init__(self, stack):
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ixy_numba-vhost-"))
        self.huge = free_huge_pages() >= HUGE_PAGES_NEEDED
        memory, ghz = testpmd.HUGE if self.huge else testpmd.PLAIN, tsc_ghz()
        ends = [*dict.fromkeys(OURS.values()), *RIVALS]
        sockets = [f"{directory}/{end}.sock" for end in ends]
        self.back_end = stack.enter_context(testpmd.Testpmd(
            directory, *(f"net_vhost{k},iface={path},queues=1" for k, path in enumerate(sockets)), memory=memory))
        self.front_ends, self.ports = {}, {}
        for port, (end, path) in enumerate(zip(ends, sockets, strict=True)):
            opened = (dpdk_front_end(path, RIVALS[end], memory, ghz) if end in RIVALS
                      else our_front_end(f"vhost-user:{path}", end, ghz))
            stack.callback(opened.close)
            for variant in (end,) if end in RIVALS else (name for name, mode in OURS.items() if mode == end):
                self.front_ends[variant], self.ports[variant] = opened, port

    def window(self, work, variant, seconds):
        """One window of one front-end, with the back-end at work as WORK says; `lost` is the worse one's."""
        mode, bursts = WORK[work]
        front_end, form = self.front_ends[variant], f" {variant.partition('_')[0]}" * (variant in OURS)
        self.back_end.command(f"set portlist {self.ports[variant]}")
        if bursts:  # nothing of before may be under way
            self.back_end.start(mode)
            front_end.window("receive" + form, DRAIN_S)
            self.back_end.stop()
        self.back_end.start(mode, bursts)
        since = self._waited_ns()
        found = front_end.window(work + form, seconds)
        found.lost = max(found.lost, (self._waited_ns() - since) / 1e9 / found.seconds)
        self.back_end.stop()
        if not found.timed:
            raise IxyError(f"vhost: {variant} moved no packet ({work}); the back-end says: "
                           f"{self.back_end.statistics()[self.ports[variant]]}")
        return found

    def _waited_ns(self):
        path = f"/proc/{self.back_end.process.pid}/task/{self.back_end.worker}/schedstat"
        return int(Path(path).read_text().split()[1])


def free_huge_pages():
    """Of 2 MiB."""
    try:
        return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    except OSError:
        return 0


def require():
    """Unavailable where this machine lacks a part."""
    if len(os.sched_getaffinity(0)) < 2:
        raise Unavailable("vhost: needs two processors, one for each end; only one is here")
    missing = [program for program in (testpmd.PROGRAM, "gcc", "pkg-config") if shutil.which(program) is None]
    if missing:
        raise Unavailable(f"vhost: needs {', '.join(missing)}; install DPDK and a compiler "
                          "(Debian: apt install dpdk-dev gcc pkg-config)")


def measure(quick):
    require()
    say("vhost: our front-end and DPDK's in turn behind dpdk-testpmd …")
    seconds, rounds = (QUICK_SECONDS, QUICK_ROUNDS) if quick else (SECONDS, ROUNDS)
    with contextlib.ExitStack() as stack:
        contest = Contest(stack)
        found = {(work, variant): [] for work in WORK for variant in (*OURS, *RIVALS) if applies(work, variant)}
        for work, variant in found:
            contest.window(work, variant, DRAIN_S)  # warms up; not counted
        for _ in range(rounds):
            for work, variant in found:
                found[work, variant].append(contest.window(work, variant, seconds))
    return rows(found, "2 MiB" if contest.huge else "4 KiB")


def applies(work, variant):
    """A handler answers packets: it cannot make any."""
    return not (work == "transmit" and variant.startswith("handler"))


def rows(found, pages):
    """A row a kind of work and variant: medians over the undisturbed windows, and ratios within rounds."""
    made = []
    for (work, variant), windows in found.items():
        cycles, kept = _kept(windows)
        base, base_kept = _kept(found[work, BASELINE])
        both = kept & base_kept if (kept & base_kept).any() else np.ones(len(windows), bool)
        ratios = cycles[both] / base[both]
        made.append({
            "table": TABLE, "variant": variant, "work": work, "pages": pages,
            "cycles_per_packet": round(float(np.median(cycles[kept])), 2),
            "mpps": round(float(np.median([w.mpps for w in np.array(windows)[kept]])), 3),
            "packets_per_pass": round(float(np.median([w.timed / w.passes for w in np.array(windows)[kept]])), 1),
            "ratio_to_dpdk": round(float(np.median(ratios)), 3), "min": round(float(ratios.min()), 3),
            "max": round(float(ratios.max()), 3), "windows": len(windows), "kept": int(both.sum()),
            "disturbed": bool(sum(w.lost <= MOST_LOST for w in windows) < ENOUGH)})
    return made


def _kept(windows):
    """(cycles a packet of each window, which of them count): the undisturbed ones, or all where those are too few."""
    kept = np.array([window.lost <= MOST_LOST for window in windows])
    if kept.sum() < ENOUGH:
        kept[:] = True
    return np.array([window.cycles_per_packet for window in windows]), kept


def show(found):
    at = {(row["variant"], row["work"]): row for row in found}
    names = {MEANINGS[variant]: variant for variant in dict.fromkeys(variant for variant, _ in at)}

    def table(title, text):
        return grid(title, names, WORK, lambda name, work: text(at[names[name], work])
                    if (names[name], work) in at else "-")

    disturbed = any(row["disturbed"] for row in found)
    return [f"64-byte frames, bursts of 32, rings of 256, {found[0]['pages']} pages; the rival's split ring is x 1", "",
            *table("busy cycles a packet (x DPDK, spread)", lambda row: f"{row['cycles_per_packet']:.1f} "
                   f"(x {row['ratio_to_dpdk']:.2f}, {row['min']:.2f} to {row['max']:.2f})"), "",
            *table("Mpps (packets a pass)", lambda row: f"{row['mpps']:.2f} ({row['packets_per_pass']:.0f})"), "",
            *(verdict(work, at) for work in WORK),
            *(["", "A worker was disturbed in nearly all windows: these figures are about the machine's other work."]
              * disturbed)]


def verdict(work, at):
    """What the default costs, against DPDK's split ring and against the best of DPDK's settings."""
    ours = at["handler" if applies(work, "handler") else "verbs", work]
    best = min((at[name, work] for name in RIVALS), key=lambda row: row["cycles_per_packet"])
    ratio = ours["ratio_to_dpdk"]
    return (f"{work}: {ours['cycles_per_packet']:.1f} cycles, x {ratio:.2f} of DPDK's split ring (target {TARGET}: "
            f"{'met' if ratio <= TARGET else 'missed'}), x {ours['cycles_per_packet'] / best['cycles_per_packet']:.2f} "
            f"of its best ({MEANINGS[best['variant']].partition(': ')[2]})")
