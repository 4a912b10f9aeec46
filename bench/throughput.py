"""Cycles a packet by batch size and memory state: ours in both modes beside the rivals in C."""

from .common import LIMITS, MODES, grid, in_worker, say
from .contest import clock_cost, compete, contestants, rows, verified
from .nic import STATES

TABLE = "throughput"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RUNS, QUICK_RUNS = 15, 9


def measure(quick):
    """Rows from one process a mode. The C rivals run in both; their rows come from the default mode's."""
    made = []
    for mode in MODES:
        say(f"throughput: {mode} mode …")
        found = in_worker(TABLE, mode, quick=quick)
        names = {row["variant"] for row in made}
        made += [row for row in found if row["variant"] not in names]
    return made


def worker(quick):
    players = verified(contestants(), (1, 32, 256))
    clock, made = clock_cost(), []
    for state in STATES:
        for batch in BATCH_SIZES:
            found = compete(players, state, batch, QUICK_RUNS if quick else RUNS, clock)
            made += rows(TABLE, found, state=state, batch_size=batch)
    return made


def show(found):
    """The rows as lines for people."""
    by_key = {(row["variant"], row["state"], row["batch_size"]): row for row in found}
    variants = list(dict.fromkeys(row["variant"] for row in found))
    lines = []
    for state in STATES:
        for title, key, digits in (("cycles a packet", "cycles_per_packet", 1),
                                   ("x ixy_style_gcc", "ratio_to_ixy_style", 2)):

            def cell(variant, batch, key=key, digits=digits, state=state):
                value = by_key[variant, state, batch][key]
                return "-" if value is None else f"{value:.{digits}f}"

            lines += [*grid(f"{state}: {title}", variants, BATCH_SIZES, cell), ""]
    return [*lines, LIMITS]
