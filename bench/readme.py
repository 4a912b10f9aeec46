"""README.md's figures, generated from bench/results/*.json between `<!-- bench:NAME -->` and `<!-- /bench -->`."""

import json
import re

from ixy_numba.core.errors import IxyError

from . import events, handlers, latency, marks, ours, safety, size, vhost
from .common import RESULTS, ROOT

README = ROOT / "README.md"
PLOTS = {"throughput": "bench/results/throughput.png"}
MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NAMES = {
    "in_place": "**handler, in place**", "fused": "**handler (default)**", "batch": "**batch verbs (default)**",
    "in_place_fast": "handler, in place, checks off", "fused_fast": "handler, checks off",
    "batch_fast": "batch verbs, checks off",
    "same_design_in_place_gcc": "C, same design, in place, gcc",
    "same_design_in_place_clang": "C, same design, in place, clang",
    "same_design_fused_gcc": "C, same design, fused, gcc", "same_design_fused_clang": "C, same design, fused, clang",
    "same_design_gcc": "C, same design, batch, gcc", "same_design_clang": "C, same design, batch, clang",
    "ixy_style_gcc": "C, ixy's way, gcc", "ixy_style_clang": "C, ixy's way, clang",
}


def results():
    """{table: (rows, the result that they come from)}, of the newest result that has each table.

    The safety table has several kinds of rows: its "rows" are the result.
    """
    found = {}
    loaded = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    for result in sorted(loaded, key=lambda result: result["date"]):
        for row in result["rows"]:
            rows, origin = found.get(row["table"], ([], None))
            found[row["table"]] = (rows + [row] if origin is result else [row]), result
        if "marks" in result:
            found["safety"] = result, result
    return found


def render(text, found):
    """`text` with every marked part replaced. IxyError for a name that there is no figure for."""

    def replace(match):
        start, name, end = match.groups()
        if name not in FIGURES:
            raise IxyError(f"README.md: no figure is named {name!r}; expected one of {', '.join(FIGURES)}")
        if name not in found:
            raise IxyError(f"README.md: bench/results/ has no {name!r}; measure it: python -m bench {name} --json "
                           "bench/results/FILE.json")
        return start + "\n".join([*FIGURES[name](found[name][0]), "", origin(found[name][1])]) + "\n" + end

    return MARKED.sub(replace, text)


def run():
    text = README.read_text()
    README.write_text(render(text, results()))
    print(f"{README.name}: {len(MARKED.findall(text))} figures are up to date")


def origin(result):
    """Where and when figures were taken."""
    machine = result["machine"]
    compilers = ", ".join(machine["compilers"].values())
    return (f"<sub>{machine['cpu']}, TSC {machine['tsc_ghz']} GHz, Linux {machine['kernel']}; {compilers}; "
            f"numba {machine['numba']}; commit {result['commit'].rstrip('+')}, {result['date'][:10]}.</sub>")


def markdown(head, lines):
    return ["| " + " | ".join(map(str, head)) + " |", "|---" + "|---:" * (len(head) - 1) + "|",
            *("| " + " | ".join(map(str, line)) + " |" for line in lines)]


def _name(variant):
    return NAMES.get(variant, variant)


def _ordered(variants):
    variants = list(dict.fromkeys(variants))
    return [name for name in NAMES if name in variants] + [name for name in variants if name not in NAMES]


def _throughput(rows):
    at = {(row["variant"], row["state"]): row for row in rows if row["batch_size"] == 32}
    states = list(dict.fromkeys(state for _, state in at))
    lines = []
    for variant in _ordered(variant for variant, _ in at):
        cells = [at[variant, state] for state in states]
        lines.append([_name(variant), *(f"{row['cycles_per_packet']:.1f} (x {row['ratio_to_ixy_style']:.2f})"
                                        for row in cells)])
    return [f"![Packet rate over batch size]({PLOTS['throughput']})", "",
            *markdown(["cycles a packet, batch 32 (x C, ixy's way)", *states], lines)]


def _events(rows):
    rows = {row["variant"]: row for row in rows if row["batch_size"] == 32}
    lines = [[_name(name), *(f"{rows[name][event]:.1f}" for event in events.EVENTS)] for name in _ordered(rows)]
    return markdown(["per packet, batch 32", *events.EVENTS], lines)


def _latency(rows):
    columns = [*(f"{p:g}" for p in latency.PERCENTILES), "max"]
    lines = [[f"{row['offered_mpps']} Mpps, {_name(row['variant'])}", *(f"{row['us'][p]:.2f}" for p in columns)]
             for row in rows if row["rate_share"] >= latency.SUSTAINED]
    return markdown(["us at percentile", *columns], lines)


def _endtoend(rows):
    lines = [[_name(row["variant"]), row["load"], row["mpps"], f"{row['min']} to {row['max']}", row["ceiling_mpps"]]
             for row in rows]
    return markdown(["two processors, batch 32", "load", "Mpps (simulated NICs)", "runs", "model alone"], lines)


def _startup(rows):
    from .startup import MEANINGS

    return markdown(["", "seconds"], [[MEANINGS.get(row["variant"], f"{row['variant']}, as a program"),
                                       f"{row['seconds']:.2f}"] for row in rows])


def _size(rows):
    lines = [[size.label(row["variant"]), row["lines"], 0, row["gzip_kb"]] for row in rows]
    return markdown(["source", "lines", "of C", "gzip -6 kB"],
                    [*lines, *([f"{language} (published)", *rest] for language, *rest in size.PUBLISHED)])


def _handlers(rows):
    at = {(row["variant"], row["handler"]): row for row in rows}
    names = list(dict.fromkeys(handler for _, handler in at))
    lines = [[_name(variant), *(f"{at[variant, name]['cycles_per_packet']:.1f} (x "
                                f"{at[variant, name]['ratio_to_ixy_style']:.2f})" for name in names)]
             for variant in _ordered(variant for variant, _ in at)]
    return markdown([f"cycles a packet, batch {handlers.BATCH_SIZE}, warm", *names], lines)


def _safety(result):
    rows = marks.table(result["marks"])
    head = ["", *(name.strip() for name in marks.COLUMNS)]
    table = markdown(head, [[f"**{name}**" if name not in marks.PUBLISHED else f"{name} (published)", *cells]
                            for name, cells in rows.items()])
    at = {row["path"]: row for row in result["cost"]
          if row["protection"] == safety.ALL and row["batch_size"] == safety.BATCH_SIZES[-1]}
    alone = {(row["path"], row["protection"]): row["ratio_to_fast"] for row in result["cost"]
             if row["batch_size"] == safety.BATCH_SIZES[-1]}
    cost = [[_name(path), f"{at[path]['cycles_per_packet']:.1f}", f"{at[path]['ratio_to_ixy_style'] or 0:.2f}",
             *(f"{alone[path, which]:.2f}" for which in safety.VARIANTS[1:])] for path in ours.FORMS]
    names = [which.replace("_", " ") for which in safety.VARIANTS[1:]]
    return [*table, "", f"<sub>{'; '.join(marks.FOOTNOTES)}.</sub>", "",
            *markdown(["batch 32, warm", "cycles a packet", "x C, ixy's way", *(f"x fast: {name}" for name in names)],
                      cost)]


def _vhost(rows):
    at = {(row["variant"], row["work"]): row for row in rows}
    lines = [[vhost.MEANINGS[variant], *(vhost.cost(at.get((variant, work))) for work in vhost.WORK)]
             for variant in dict.fromkeys(variant for variant, _ in at)]
    return markdown([f"busy cycles a packet, {rows[0]['pages']} pages (x DPDK's split ring)", *vhost.WORK], lines)


FIGURES = {"throughput": _throughput, "events": _events, "latency": _latency, "endtoend": _endtoend,
           "startup": _startup, "size": _size, "handlers": _handlers, "safety": _safety,
           "vhost": _vhost}
