"""What a user's handler costs: a MAC swap and a UDP port filter, in Python beside the same by hand in C."""

from .common import LIMITS, MODES, grid, in_worker, say
from .contest import clock_cost, compete, contestants, rows, verified
from .nic import EFFECTS, WARM

TABLE = "handlers"
BATCH_SIZE = 32
RUNS, QUICK_RUNS = 25, 9


def measure(quick):
    made = []
    for mode in MODES:
        say(f"handlers: {mode} mode …")
        names = {row["variant"] for row in made}
        made += [row for row in in_worker(TABLE, mode, quick=quick) if row["variant"] not in names]
    return made


def worker(quick):
    clock, made = clock_cost(), []
    for handler in EFFECTS:
        players = verified(contestants(handler, forms=("fused", "in_place")), (BATCH_SIZE,))
        found = compete(players, WARM, BATCH_SIZE, QUICK_RUNS if quick else RUNS, clock)
        made += rows(TABLE, found, handler=handler, state=WARM, batch_size=BATCH_SIZE)
    return made


def show(found):
    by_key = {(row["variant"], row["handler"]): row for row in found}
    variants = list(dict.fromkeys(row["variant"] for row in found))
    columns = [f"{handler}{suffix}" for handler in EFFECTS for suffix in ("", " x ixy")]

    def cell(variant, column):
        handler, _, ratio = column.partition(" ")
        row = by_key[variant, handler]
        value = row["ratio_to_ixy_style" if ratio else "cycles_per_packet"]
        return "-" if value is None else f"{value:.2f}"

    return [*grid(f"cycles a packet, warm, batch {BATCH_SIZE}", variants, columns, cell), "", LIMITS]
