"""Latency of every packet, the NIC's model on one processor and the driver on another, ours and ixy's way in turn.

The clock runs from the receive write-back until the model sees the transmit tail move. The model offers packets at an
even pace. The first row is the bare machine: a loop that does nothing but notice when a packet would be due.
"""

import os
import threading

import numpy as np

from ixy_numba import kernel
from ixy_numba.core.memory import new_record
from ixy_numba.core.mmio import cycles, load_acquire, store_release
from ixy_numba.core.raw import load64, load_acquire32, store_release32, store_release64

from . import nic, ours, rivals
from .common import Unavailable, grid, in_worker, say, tsc_ghz
from .contest import Contestant
from .nic import DESCRIPTOR, MASK, ONE, RS, SENT, ZERO, U, fill, phase

TABLE = "latency"
RATES = (1, 10, 20)  # Mpps offered, both directions together
BATCH_SIZE = 32
SECONDS, TURNS = 4.0, 5
QUICK_SECONDS, QUICK_TURNS = 0.5, 2
PERCENTILES = (50, 90, 99, 99.9, 99.99, 99.999, 99.9999)
COUNTED = 1 << 21  # latencies up to this many cycles are counted exactly, longer ones together
IN_FLIGHT = 4096  # more than there are descriptors
BEHIND = U(64)  # packets: a model that is later than that was interrupted; the wire was silent then, it does not burst
SUSTAINED = 0.95  # of the offered rate, or the row is void; what is missing are mostly interruptions of the model

PACE = np.dtype([("stop", "u8"), ("interval", "u8"), ("end", "u8"), ("batch", "u8"),
                 ("offered", "u8"), ("lost", "u8"), ("dropped", "u8"), ("skipped", "u8"), ("longest", "u8")])


@kernel
def note(control, counts, latency):
    counts[min(latency, U(len(counts) - 1))] += np.uint32(1)
    control.longest = max(control.longest, latency)


@kernel
def empty(control, counts):
    """The bare machine: how late a loop without any work notices that a packet is due."""
    now = cycles()
    due, end = now + control.interval, now + control.end
    while now < end:
        now = cycles()
        if now >= due:
            note(control, counts, now - due)
            if now - due > BEHIND * control.interval:
                due = now
            due += control.interval


@kernel
def pace(nic, control, stamps, counts):
    """The NIC: a packet on each port every `interval` cycles, what is sent is timed, until `end` cycles are over."""
    start = cycles()
    due0, due1, end = start, start + (control.interval >> ONE), start + control.end
    now = start
    while now < end:
        now = cycles()
        due0 = arrive(nic, 0, control, stamps[0], due0, now)
        depart(nic, 1, control, stamps[0], counts)
        now = cycles()
        due1 = arrive(nic, 1, control, stamps[1], due1, now)
        depart(nic, 0, control, stamps[1], counts)
    store_release(control, "stop", ONE)


@kernel
def arrive(nic, k, control, stamps, due, now):
    """Receive the packets that are due; returns when the next one is."""
    while due <= now:
        if now - due > BEHIND * control.interval:
            control.skipped += (now - due) // control.interval
            due = now
        control.offered += ONE
        sequence = nic.port[k].received
        if fill(nic, k, ONE) == ZERO:
            control.lost += ONE
        stamps[sequence % U(len(stamps))] = cycles()
        due += control.interval
    return due


@kernel
def depart(nic, k, control, stamps, counts):
    """Time what the driver has handed over on port `k`: each packet says which one it is, as some may be dropped."""
    port = nic.port[k]
    head, tail = port.tx_head, U(load_acquire32(port.tx_tail)) & MASK
    if head == tail:
        return
    now = cycles()
    while head != tail:
        desc = port.tx_ring + head * DESCRIPTOR
        sequence, command = load64(load64(desc) + U(52)), load64(desc + U(8))
        note(control, counts, now - min(now, stamps[sequence % U(len(stamps))]))
        port.sent += ONE
        head = (head + ONE) & MASK
        if command & RS != ZERO:
            if port.head != ZERO:
                store_release32(port.head, head)
            else:
                store_release64(desc + U(8), command | SENT)
    port.tx_head = head


@kernel
def serve(driver, control):
    """The driver's processor: passes until the model is done."""
    while load_acquire(control, "stop") == ZERO:
        phase(driver, control.batch, ONE)


class Together:
    """Kernels side by side, each in a thread on a processor of its own."""

    def __init__(self, *jobs):
        processors = sorted(os.sched_getaffinity(0))[-2:]
        self.error = None
        self._threads = [threading.Thread(target=self._run, args=(cpu, *job), daemon=True)
                         for cpu, job in zip(processors, jobs, strict=True)]
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        if self.error:
            raise self.error

    def _run(self, cpu, function, *args):
        try:
            os.sched_setaffinity(0, {cpu})  # of this thread alone
            function(*args)
        except BaseException as error:
            self.error = error


def control_for(mpps, seconds, ghz):
    control = new_record(PACE)
    control.interval = round(2 * ghz * 1000 / mpps)  # of one of the two ports
    control.end, control.batch = round(seconds * ghz * 1e9), BATCH_SIZE
    return control


def run_empty(mpps, seconds, ghz):
    """The model's pace with nothing to do, on both processors at once; the figures are the driver's processor's."""
    jobs = [(empty, control_for(mpps, seconds, ghz), np.zeros(COUNTED, np.uint32)) for _ in range(2)]
    Together(*jobs)
    _, control, counts = jobs[0]
    return counts, control, 1.0


def run(player, mpps, seconds, ghz):
    """(latencies counted by cycles, control, share of the offered rate that went through)."""
    control, counts = control_for(mpps, seconds, ghz), np.zeros(COUNTED, np.uint32)
    stamps = np.zeros((2, IN_FLIGHT), np.uint64)
    port = player.nic.port
    port["received"] = port["sent"] = 0
    Together((serve, player.entry.driver, control), (pace, player.nic, control, stamps, counts))
    drain(player)
    control.dropped = port["received"].sum() - port["sent"].sum()
    return counts, control, int(port["sent"].sum()) / (2 * seconds * ghz * 1e9 / int(control.interval))


def compile_for(player, ghz):
    """Before two threads race each other into the compiler."""
    control, counts = control_for(1, 0, ghz), np.zeros(COUNTED, np.uint32)
    empty(control, counts)
    pace(player.nic, control, np.zeros((2, IN_FLIGHT), np.uint64), counts)
    serve(player.entry.driver, control)
    drain(player)


def drain(player):
    """Nothing stays in flight."""
    samples, plan = np.zeros(8, nic.SAMPLE).view(np.recarray), nic.new_plan(nic.RING // 2, 0)
    plan.passes = 1
    nic.measure(player.nic, player.entry.driver, plan, player.eviction, samples)


def measure(quick):
    if len(os.sched_getaffinity(0)) < 2:
        raise Unavailable("latency: needs two processors, one for the model and one for the driver; only one is here")
    require()
    say("latency: model and driver on two processors …")
    return in_worker(TABLE, "checked", quick=quick)


def worker(quick):
    ghz = tsc_ghz()
    seconds, turns = (QUICK_SECONDS, QUICK_TURNS) if quick else (SECONDS, TURNS)
    eviction = nic.new_eviction([])
    gcc = [compiler.name for compiler in rivals.compilers()][:1]
    entries = [rivals.Rival(form, name) for name in gcc for form in ("ixy_style", "same_design_fused")]
    players = [Contestant(entry, eviction) for entry in [*entries, ours.Ours("fused"), ours.Ours("in_place")]]
    for player in players:
        compile_for(player, ghz)
    made = []
    for mpps in RATES:
        runs = {name: [] for name in ("empty_loop", *(player.name for player in players))}
        for _ in range(turns):
            runs["empty_loop"].append(run_empty(mpps, seconds, ghz))
            for player in players:
                runs[player.name].append(run(player, mpps, seconds, ghz))
        made += [row(name, mpps, found, runs, ghz) for name, found in runs.items()]
    return made


def row(name, mpps, found, runs, ghz):
    counts = sum(counts.astype(np.uint64) for counts, _, _ in found)
    longest = max(int(control.longest) for _, control, _ in found)
    p9999 = np.array([percentiles(counts, longest, ghz)["99.99"] for counts, _, _ in found])
    base = next((np.array([percentiles(counts, longest, ghz)["99.99"] for counts, _, _ in runs[other]])
                 for other in runs if other.startswith("ixy_style")), None)
    ratios = np.array([1.0]) if base is None else p9999 / base
    return {"table": TABLE, "variant": name, "offered_mpps": mpps, "packets": int(counts.sum()),
            "rate_share": round(min(share for *_, share in found), 4),
            **{key: sum(int(control[key]) for _, control, _ in found) for key in ("lost", "dropped", "skipped")},
            "us": {**percentiles(counts, longest, ghz), "max": round(longest / ghz / 1000, 3)},
            "p99_99_ratio_to_ixy_style": round(float(np.median(ratios)), 3),
            "min": round(float(ratios.min()), 3), "max": round(float(ratios.max()), 3)}


def require():
    try:
        import hdrh.histogram  # noqa: F401
    except ImportError:
        raise Unavailable("latency: needs hdrhistogram; install it: pip install 'ixy_numba[bench]'") from None


def percentiles(counts, longest, ghz):
    """HDR percentiles in microseconds."""
    from hdrh.histogram import HdrHistogram

    histogram = HdrHistogram(1, 1 << 40, 3)
    for latency in np.flatnonzero(counts):
        value = longest if latency == len(counts) - 1 else int(latency)
        histogram.record_value(max(1, round(value / ghz)), int(counts[latency]))
    return {f"{p:g}": round(histogram.get_value_at_percentile(p) / 1000, 3) for p in PERCENTILES}


def show(found):
    lines = []
    columns = [*(f"{p:g}" for p in PERCENTILES), "max"]
    for mpps in RATES:
        rows = {row["variant"]: row for row in found if row["offered_mpps"] == mpps}
        good = [name for name in rows if rows[name]["rate_share"] >= SUSTAINED]
        lines += grid(f"{mpps} Mpps offered: us at percentile", good, columns,
                      lambda name, column, rows=rows: f"{rows[name]['us'][column]:.2f}")
        lines += [f"{name}: only {100 * rows[name]['rate_share']:.1f} % of this rate went through" for name in rows
                  if name not in good]
        lines.append("")
    return [*lines, "empty_loop: no NIC and no driver, only how late the machine lets a loop see that time has passed."]
