"""Our virtio front-end beside DPDK's own virtio-user, each behind vhost-user ports of the same dpdk-testpmd.

The back-end has one processor, the front-ends take turns on the other: ours (front_end.py) and DPDK's
(c/virtio_user.c), in loops that count and time alike. 64-byte frames, bursts of 32, rings of 256. A window in which a
worker had to wait for its processor says little about its code: it is left out.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ixy_numba.core.errors import IxyError

from . import rivals, testpmd
from .common import Unavailable, Worker, grid, say, tsc_ghz

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
DRAIN_S, TRIES = 0.02, 10
HUGE_PAGES_NEEDED = testpmd.MEMORY_MIB // 2 * (1 + len(RIVALS)) + 64  # of the back-end and the rivals, and ours


@dataclass
class Window:
    """What a front-end counted, see front_end.py; `elapsed` in cycles. `waited_s`: a worker had no processor."""

    cycles: int
    timed: int
    passes: int
    packets: int
    elapsed: int
    waited_s: float

    @property
    def cycles_per_packet(self):
        return self.cycles / self.timed

    def mpps(self, ghz):
        return self.packets / self.elapsed * ghz * 1e3


class Ours:
    """A process with our front-end, in one mode."""

    def __init__(self, stack, path, mode):
        self._worker, self._spec = stack.enter_context(Worker("front_end", mode)), f"vhost-user:{path}"

    def window(self, work, form, seconds):
        return Window(**self._worker.ask(spec=self._spec, work=work, form=form, seconds=seconds))


class Rival:
    """A process with DPDK's front-end, in one of its settings."""

    def __init__(self, stack, path, settings, memory):
        device, *more = settings
        command = [rivals.program("virtio_user", "gcc", "libdpdk"),
                   *testpmd.environment(f"0@{max(os.sched_getaffinity(0))}", memory),
                   "--single-file-segments", "--log-level=error", *more,
                   f"--vdev=net_virtio_user0,path={path},queues=1,queue_size=256,{device}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env={**os.environ, "RUNTIME_DIRECTORY": str(Path(path).parent)})
        stack.callback(self._process.communicate)  # the end of its input ends it
        for line in self._process.stdout:
            if line == "ready\n":  # DPDK says this and that before
                return
        raise IxyError(f"DPDK's virtio-user front-end ended with code {self._process.wait()}: {' '.join(command)}")

    def window(self, work, form, seconds):
        self._process.stdin.write(f"{work} {seconds}\n")
        self._process.stdin.flush()
        *counted, waited_ns = map(int, self._process.stdout.readline().split())
        return Window(*counted, waited_ns / 1e9)


class Contest:
    """All front-ends connected to ports of one back-end; one works at a time."""

    def __init__(self, stack):
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ixy_numba-vhost-"))
        self.huge = free_huge_pages() >= HUGE_PAGES_NEEDED
        memory, self.ghz = testpmd.HUGE if self.huge else testpmd.PLAIN, tsc_ghz()
        ends = [*dict.fromkeys(OURS.values()), *RIVALS]
        sockets = [f"{directory}/{end}.sock" for end in ends]
        self.back_end = stack.enter_context(testpmd.Testpmd(
            directory, *(f"net_vhost{k},iface={path},queues=1" for k, path in enumerate(sockets)), memory=memory))
        opened = {end: Rival(stack, path, RIVALS[end], memory) if end in RIVALS else Ours(stack, path, end)
                  for end, path in zip(ends, sockets, strict=True)}
        self._places = {variant: (opened[end], ends.index(end))
                        for variant, end in [*OURS.items(), *zip(RIVALS, RIVALS, strict=True)]}

    def window(self, work, variant, seconds):
        """One window of one front-end; another if the back-end had no processor in all of it, IxyError after TRIES."""
        for _ in range(TRIES):
            found = self._window(work, variant, seconds)
            if found.timed:
                return found
        raise IxyError(f"vhost: {variant} moved no packet ({work}) in {TRIES} windows; is the machine very busy?")

    def _window(self, work, variant, seconds):
        """With the back-end at work as WORK says; `waited_s` is the worse one's."""
        (mode, bursts), (front_end, port) = WORK[work], self._places[variant]
        form = variant.removesuffix("_fast")
        self.back_end.command(f"set portlist {port}")
        if bursts:  # nothing of before may be under way
            self.back_end.start(mode)
            front_end.window("receive", form, DRAIN_S)
            self.back_end.stop()
        self.back_end.start(mode, bursts)
        since = self._waited_s()
        found = front_end.window(work, form, seconds)
        found.waited_s = max(found.waited_s, self._waited_s() - since)
        self.back_end.stop()
        return found

    def _waited_s(self):
        path = f"/proc/{self.back_end.process.pid}/task/{self.back_end.worker}/schedstat"
        return int(Path(path).read_text().split()[1]) / 1e9


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
    return rows(found, seconds, contest.ghz, "2 MiB" if contest.huge else "4 KiB")


def applies(work, variant):
    """A handler answers packets: it cannot make any."""
    return not (work == "transmit" and variant.startswith("handler"))


def rows(found, seconds, ghz, pages):
    """A row a kind of work and variant: medians over the undisturbed windows, and ratios within rounds."""
    made = []
    for (work, variant), windows in found.items():
        cycles, kept = _kept(windows, seconds)
        base, base_kept = _kept(found[work, BASELINE], seconds)
        both = kept & base_kept if (kept & base_kept).any() else np.ones(len(windows), bool)
        ratios, counted = cycles[both] / base[both], [windows[k] for k in np.flatnonzero(kept)]
        made.append({
            "table": TABLE, "variant": variant, "work": work, "pages": pages,
            "cycles_per_packet": round(float(np.median(cycles[kept])), 2),
            "mpps": round(float(np.median([window.mpps(ghz) for window in counted])), 3),
            "packets_per_pass": round(float(np.median([window.timed / window.passes for window in counted])), 1),
            "ratio_to_dpdk": round(float(np.median(ratios)), 3), "min": round(float(ratios.min()), 3),
            "max": round(float(ratios.max()), 3), "windows": len(windows),
            "undisturbed": sum(undisturbed(window, seconds) for window in windows)})
    return made


def undisturbed(window, seconds):
    return window.waited_s <= MOST_LOST * seconds


def _kept(windows, seconds):
    """(cycles a packet of each window, which of them count): the undisturbed ones, or all where those are too few."""
    kept = np.array([undisturbed(window, seconds) for window in windows])
    if kept.sum() < ENOUGH:
        kept[:] = True
    return np.array([window.cycles_per_packet for window in windows]), kept


def cost(row):
    """Cycles a packet, the ratio to the rival's split ring, and its spread; "-" where there is no row."""
    if row is None:
        return "-"
    return f"{row['cycles_per_packet']:.1f} (x {row['ratio_to_dpdk']:.2f}, {row['min']:.2f} to {row['max']:.2f})"


def _rate(row):
    return "-" if row is None else f"{row['mpps']:.2f} ({row['packets_per_pass']:.0f})"


def show(found):
    at = {(row["variant"], row["work"]): row for row in found}
    names = {MEANINGS[variant]: variant for variant in dict.fromkeys(variant for variant, _ in at)}
    lines = [f"64-byte frames, bursts of 32, rings of 256, {found[0]['pages']} pages; x 1 is DPDK's split ring"]
    for title, text in (("busy cycles a packet (x DPDK, spread)", cost), ("Mpps (packets a pass)", _rate)):
        lines += ["", *grid(title, names, WORK, lambda name, work, text=text: text(at.get((names[name], work))))]
    lines += ["", *(verdict(work, at) for work in WORK)]
    if any(row["undisturbed"] < ENOUGH for row in found):
        lines += ["", "In nearly all windows a worker had to wait: these figures are about the machine's other work."]
    return lines


def verdict(work, at):
    """What the default costs, against DPDK's split ring and against the best of DPDK's settings."""
    ours = at["handler" if applies(work, "handler") else "verbs", work]
    best = min((at[name, work] for name in RIVALS), key=lambda row: row["cycles_per_packet"])
    ratio = ours["ratio_to_dpdk"]
    return (f"{work}: {ours['cycles_per_packet']:.1f} cycles, x {ratio:.2f} of DPDK's split ring (target {TARGET}: "
            f"{'met' if ratio <= TARGET else 'missed'}), x {ours['cycles_per_packet'] / best['cycles_per_packet']:.2f} "
            f"of its best ({MEANINGS[best['variant']].partition(': ')[2]})")
