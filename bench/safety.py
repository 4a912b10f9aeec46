"""The table of protections with our row, and what each protection costs alone and all together."""

from contextlib import ExitStack
from functools import cache

import numpy as np

from ixy_numba.core.jit import PROTECTIONS

from . import marks, ours
from .common import LIMITS, Unavailable, Worker, grid, say
from .contest import BASELINE, clock_cost, compete, contestants, verified
from .counting import callgrind
from .nic import WARM

BATCH_SIZES = (8, 32)
RUNS, QUICK_RUNS = 15, 9
PROCESSES, QUICK_PROCESSES = 3, 1  # one after the other: where a process's memory lies is luck too
FAST, ALL = "fast", "all"
VARIANTS = (FAST, ALL, *PROTECTIONS)
HANDLERS, HANDLER_FORMS = ("mac_swap", "udp_filter"), ("fused", "in_place")
# (path, figure, at most) at batch 32
TARGETS = (("fused", "ratio_to_ixy_style", 0.33), ("fused", "ratio_to_fast", 1.2),
           ("batch", "ratio_to_ixy_style", 0.50), ("batch", "ratio_to_fast", 1.2),
           ("in_place", "ratio_to_ixy_style", 0.20))
HANDLER_TARGET = 1.3


def setting(variant):
    """(mode, environment) that leaves a variant's protections."""
    left_out = [name for name in PROTECTIONS if variant in PROTECTIONS and name != variant]
    return "fast" if variant == FAST else "checked", {"IXY_NUMBA_WITHOUT": ",".join(left_out)}


@cache
def _players(handler, forms):
    return verified(contestants(handler, forms, against=(BASELINE,)), BATCH_SIZES), clock_cost()


def worker(handler, forms, batch_size):
    """One run of each form and of the rival in this process's variant: {name without mode: cycles a packet}."""
    players, clock = _players(handler, tuple(forms))
    found = compete(players, WARM, batch_size, 1, clock)
    return {name.removesuffix("_fast"): cycles for name, (cycles,) in found.items()}


def measure(quick):
    given, tests = marks.measure()
    touch, handlers = {}, {}
    for _ in range(QUICK_PROCESSES if quick else PROCESSES):
        with ExitStack() as stack:
            workers = {}
            for variant in VARIANTS:
                say(f"safety: {variant} …")
                workers[variant] = stack.enter_context(Worker("safety", *setting(variant)))
                workers[variant].ask(handler="touch", forms=ours.FORMS, batch_size=BATCH_SIZES[-1])
            runs = QUICK_RUNS if quick else RUNS
            for batch in BATCH_SIZES:
                _turns(workers, runs, touch.setdefault(batch, {}), handler="touch", forms=ours.FORMS, batch_size=batch)
            pair = {variant: workers[variant] for variant in (FAST, ALL)}
            for name in HANDLERS:
                _turns(pair, runs, handlers.setdefault(name, {}), handler=name, forms=HANDLER_FORMS,
                       batch_size=BATCH_SIZES[-1])
    counted = {} if quick else _instructions()
    cost = [{"path": form, "protection": variant, "batch_size": batch, **_figures(runs, variant, form),
             **_counts(counted, variant, form, batch)}
            for batch, runs in touch.items() for form in ours.FORMS for variant in VARIANTS[1:]]
    return {"marks": given, "tests": tests, "cost": cost,
            "handlers": [{"path": form, "handler": name, "batch_size": BATCH_SIZES[-1], **_figures(runs, ALL, form)}
                         for name, runs in handlers.items() for form in HANDLER_FORMS]}


def _turns(workers, runs, found, **options):
    """Every variant in turn, `runs` times: {(variant, name): cycles a packet of each run}, added to `found`."""
    for _ in range(runs):
        for variant, process in workers.items():
            for name, cycles in process.ask(**options).items():
                found.setdefault((variant, name), []).append(cycles)


def _figures(runs, variant, form):
    """Medians of a variant, and of its ratios to what ran in the same turn."""
    mine, fast, rival = (np.array(runs.get(key, ())) for key in ((variant, form), (FAST, form), (variant, BASELINE)))
    return {"cycles_per_packet": round(float(np.median(mine)), 3),
            "cycles_per_packet_fast": round(float(np.median(fast)), 3),
            "ratio_to_fast": round(float(np.median(mine / fast)), 4),
            "ratio_to_ixy_style": round(float(np.median(mine / rival)), 4) if len(rival) else None}


def _instructions():
    """{variant: {form: {batch size: instructions a packet}}}; empty where they cannot be counted."""
    found = {}
    for variant in VARIANTS:
        say(f"safety: instructions, {variant} …")
        mode, environment = setting(variant)
        try:
            counted = callgrind(mode, BATCH_SIZES, (), environment)
        except Unavailable as error:
            say(f"safety: {error}")
            return {}
        found[variant] = {name.removesuffix("_fast"): {batch: events["instructions"] for batch, events in by.items()}
                          for name, by in counted.items()}
    return found


def _counts(counted, variant, form, batch):
    return {key: round(counted[which][form][batch], 2) if counted else None
            for key, which in (("instructions_per_packet", variant), ("instructions_per_packet_fast", FAST))}


def targets(found):
    """(what, figure, at most) of every target; the figure is None where there is no C compiler."""
    at = {row["path"]: row for row in found["cost"] if row["protection"] == ALL and row["batch_size"] == 32}
    against = {"ratio_to_fast": "fast mode", "ratio_to_ixy_style": BASELINE}
    return [*((f"{path}, x {against[key]}", at[path][key], limit) for path, key, limit in TARGETS),
            *((f"{row['handler']}, {row['path']}, x fast mode", row["ratio_to_fast"], HANDLER_TARGET)
              for row in found["handlers"])]


def verdict(figure, limit):
    return "not measured" if figure is None else "met" if figure <= limit else "missed"


COST_COLUMNS = {"cycles": "cycles_per_packet", "instructions": "instructions_per_packet", "x fast": "ratio_to_fast",
                "x ixy": "ratio_to_ixy_style"}


def show(found):
    rows = marks.table(found["marks"])
    lines = [*grid("protection", rows, marks.COLUMNS, lambda name, column: rows[name][marks.COLUMNS.index(column)]),
             "", *marks.FOOTNOTES, "", *marks.reasons(found["tests"]), ""]
    for batch in BATCH_SIZES:
        for path in ours.FORMS:
            at = {row["protection"]: row for row in found["cost"]
                  if row["path"] == path and row["batch_size"] == batch}
            lines += [*grid(f"{path}, batch {batch}, warm, a packet", at, COST_COLUMNS,
                            lambda name, column, at=at: _text(at[name][COST_COLUMNS[column]])),
                      f"fast mode: {_text(at[ALL]['cycles_per_packet_fast'])} cycles, "
                      f"{_text(at[ALL]['instructions_per_packet_fast'])} instructions", ""]
    lines += [f"{what} at batch 32: {_text(figure)}, target {limit}: {verdict(figure, limit)}"
              for what, figure, limit in targets(found)]
    return [*lines, "", LIMITS]


def _text(value):
    return "-" if value is None else f"{value:.2f}"
