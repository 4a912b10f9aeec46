"""Contestants in turn, A B C A B C …: every ratio is between figures of the same process, taken moments apart."""

import numpy as np

from ixy_numba.core.errors import IxyError

from . import nic, ours, rivals
from .common import pin
from .nic import DRAM, L3, WARM

PACKETS = 128  # a direction and round, at least: several batches, so that the clock costs little
LEAD = 8  # packets before the clock starts, after the caches were emptied
ROUNDS = {WARM: 300, L3: 60, DRAM: 80}
VERIFIED_ROUNDS = 100
BASELINE, SAME = "ixy_style_gcc", "same_design_gcc"


class Contestant:
    """A driver behind the benchmark's NIC."""

    def __init__(self, entry, eviction):
        self.entry, self.name = entry, entry.name
        self.nic = nic.new_nic(entry.ports, entry.handler)
        self.eviction = nic.Eviction(eviction.walk, np.array(entry.private, np.uint64))

    def run(self, state, batch, rounds):
        """One run: samples of `rounds` rounds."""
        samples = np.zeros(rounds, nic.SAMPLE).view(np.recarray)
        self.nic.state = nic.STATES.index(state)
        plan = nic.new_plan(batch, max(batch, PACKETS), LEAD if state == L3 else 0)
        nic.measure(self.nic, self.entry.driver, plan, self.eviction, samples)
        return samples

    def verify(self, batch):
        """What is wrong with what the driver forwards: an empty list, or sentences."""
        self.nic.check = 1
        for state in nic.STATES:
            self.run(state, batch, VERIFIED_ROUNDS)
        self.nic.check = 0
        faults = []
        received, sent, wrong = (int(self.nic.port[name].sum()) for name in ("received", "sent", "wrong"))
        due = received - int(self.nic.port["discards"].sum()) * int(self.nic.drops)
        if sent != due or not sent:
            faults.append(f"{received} packets received, {sent} sent, expected {due}")
        if wrong:
            faults.append(f"{wrong} packets with wrong contents or out of order")
        audited = self.entry.audit()
        if audited != self.entry.buffers:
            faults.append(f"{audited} of {self.entry.buffers} buffers accounted for")
        return [f"{self.name}, batch {batch}: {fault}" for fault in faults]


def contestants(handler="touch", forms=ours.FORMS, against=None, flags=rivals.FLAGS):
    """Ours in these forms and this process's mode, and the rivals of these names (None: all) that can be compiled."""
    pin()
    eviction = nic.new_eviction([])
    entries = [rivals.Rival(form, compiler.name, handler, flags) for compiler in rivals.compilers()
               for form in rivals.FORMS if against is None or f"{form}_{compiler.name}" in against]
    return [Contestant(entry, eviction) for entry in [*entries, *(ours.Ours(form, handler) for form in forms)]]


def verified(players, batch_sizes):
    """The players, once each has forwarded correctly: contents, order, buffers. IxyError otherwise."""
    faults = [fault for batch in batch_sizes for player in players for fault in player.verify(batch)]
    if faults:
        raise IxyError("; ".join(faults))
    return players


def clock_cost():
    """Cycles between two looks at the clock with nothing in between."""
    samples = np.zeros(1000, nic.SAMPLE).view(np.recarray)
    nic.measure(nic.idle_nic(), nic.Nothing(np.uint64(0)), nic.new_plan(1, 1), nic.new_eviction([]), samples)
    return float(np.median(samples.cycles))


def cycles_per_packet(samples, clock):
    """The mean over a run, without the rounds before the caches settled and those that an interrupt fell into."""
    samples = samples[len(samples) // 8:]
    cycles = samples.cycles - clock
    calm = cycles <= 3 * np.median(cycles)
    return float(cycles[calm].sum() / samples.packets[calm].sum())


def compete(players, state, batch, runs, clock):
    """{name: cycles per packet of each run}."""
    found = {player.name: [] for player in players}
    for player in players:
        player.run(state, batch, ROUNDS[state])  # warms up code and predictors; not counted
    for _ in range(runs):
        for player in players:
            found[player.name].append(cycles_per_packet(player.run(state, batch, ROUNDS[state]), clock))
    return found


def rows(table, found, **more):
    """A row a contestant: medians, and the ratios' median, minimum and maximum over the runs."""
    made = []
    for name, runs in found.items():
        runs = np.array(runs)
        row = {"table": table, "variant": name, **more, "cycles_per_packet": round(float(np.median(runs)), 3)}
        for key, base in (("ratio_to_ixy_style", BASELINE), ("ratio_to_same_design_gcc", SAME)):
            row[key] = round(float(np.median(runs / found[base])), 4) if base in found else None
        ratios = runs / found[BASELINE] if BASELINE in found else runs / runs.min()
        row["min"], row["max"] = (round(float(value), 4) for value in (ratios.min(), ratios.max()))
        made.append(row)
    return made
