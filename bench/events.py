"""Cycles, instructions, loads, stores and branches a packet, at batch 8 and 32, as in the published ixy table."""

from .common import MODES, grid, in_worker, say
from .contest import clock_cost, compete, contestants
from .counting import KINDS, HardwareCounters, callgrind
from .nic import WARM

TABLE = "events"
BATCH_SIZES = (8, 32)
RUNS, QUICK_RUNS = 25, 9
EVENTS = ("cycles", "instructions", "loads", "stores", "branches")
# The published readings at 1.6 GHz, forwarding on an Intel CPU: another machine, for orientation.
PUBLISHED = {("C", 8): (108, 139, 34.4, None, 19), ("C", 32): (94, 127, 30.1, None, 18),
             ("Rust", 8): (120, 232, 84.2, None, 27), ("Rust", 32): (100, 209, 77.0, None, 24)}


def measure(quick):
    made = {}
    for mode in MODES:
        say(f"events: {mode} mode …")
        timed = in_worker(TABLE, mode, quick=quick)
        counted = timed.pop("hardware") or callgrind(mode, BATCH_SIZES)
        for name, by_batch in timed.items():
            for batch, cycles in by_batch.items():
                events = {**counted[name]}.get(batch) or counted[name][int(batch)]
                row = {"table": TABLE, "variant": name, "batch_size": int(batch), "cycles": round(cycles, 2),
                       "source": "callgrind" if "mix" in events else "hardware counters"}
                row |= {event: round(events[event], 2) if event in events else None for event in EVENTS[1:]}
                row["mix"] = {kind: round(count, 2) for kind, count in events.get("mix", {}).items()}
                made.setdefault((name, batch), row)
    return list(made.values())


def worker(quick):
    """{variant: {batch: cycles}}, and under "hardware" the events where the machine counts them."""
    players, clock = contestants(), clock_cost()
    counters, made = HardwareCounters(), {"hardware": {}}
    for batch in BATCH_SIZES:
        found = compete(players, WARM, batch, QUICK_RUNS if quick else RUNS, clock)
        for player in players:
            runs = sorted(found[player.name])
            made.setdefault(player.name, {})[batch] = runs[len(runs) // 2]
            if "instructions" in counters.names:
                made["hardware"].setdefault(player.name, {})[batch] = counters.count(player, batch)
    return made


def show(found):
    lines = []
    for batch in BATCH_SIZES:
        rows = {row["variant"]: row for row in found if row["batch_size"] == batch}

        def cell(variant, event, rows=rows, batch=batch):
            if variant in rows:
                value = rows[variant][event]
            else:
                value = PUBLISHED[variant.split()[0], batch][EVENTS.index(event)]
            return "-" if value is None else f"{value:.1f}"

        published = [f"{language} (published, 1.6 GHz)" for language in ("C", "Rust")]
        lines += [*grid(f"batch {batch}: per packet", [*rows, *published], EVENTS, cell), ""]
        kinds = [kind for kind, _ in KINDS]
        if any(row["mix"] for row in rows.values()):
            lines += [*grid(f"batch {batch}: instructions", rows, kinds,
                            lambda variant, kind, rows=rows: f"{rows[variant]['mix'].get(kind, 0):.1f}"), ""]
    source = found[0]["source"]
    lines.append(f"Counted by {source}" + (
        ": exact; code compiled for the baseline x86-64; branches are conditional and indirect ones. Cycles are timed, "
        "with code compiled for this machine." if source == "callgrind" else "."))
    return lines
