"""Figures in the style of the published ones: packet rate over batch size, latency over percentile."""

import csv

from ixy_numba.core.errors import UsageError

from .common import HERE, Unavailable
from .latency import SUSTAINED

PUBLISHED = HERE / "published_throughput.csv"
SOURCE = "published in 2019: a real NIC, 3.3 GHz"
STYLES = {  # variant: label, colour, line
    "in_place": ("Numba, in place", "tab:red", "-"), "fused": ("Numba, handler", "tab:orange", "-"),
    "batch": ("Numba, batch verbs", "tab:purple", "-"),
    "fused_fast": ("Numba, handler, checks off", "tab:orange", "--"),
    "batch_fast": ("Numba, batch verbs, checks off", "tab:purple", "--"),
    "same_design_in_place_gcc": ("C, in place", "tab:green", "-"),
    "same_design_fused_gcc": ("C, fused", "tab:cyan", "-"), "same_design_gcc": ("C, batch", "tab:blue", "-"),
    "ixy_style_gcc": ("C, ixy's way", "black", "-"),
}


def require():
    """matplotlib, or one clear line before anything is measured."""
    try:
        import matplotlib
    except ImportError:
        raise Unavailable("--plot needs matplotlib; install it: pip install 'ixy_numba[bench]'") from None
    matplotlib.use("Agg")


def draw(table, rows, info, path):
    """Write the table's figure to `path`; UsageError where that cannot be."""
    require()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    FIGURES[table]([row for row in rows if row["table"] == table], info, axes)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.minorticks_off()
    figure.legend(loc="outside lower center", fontsize=6.5, ncols=3, frameon=False)
    try:
        figure.savefig(path, dpi=150, metadata={"Software": None})
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot draw that: {error}; name a file that ends in .png") from None
    pyplot.close(figure)


def throughput(rows, info, axes):
    """Mpps that the driver's cycles would give at this clock, caches warm; the published series dotted."""
    ghz = info["tsc_ghz"]
    warm = [row for row in rows if row["state"] == "warm"]
    for variant, (label, colour, line) in STYLES.items():
        points = sorted((row["batch_size"], 1e3 * ghz / row["cycles_per_packet"]) for row in warm
                        if row["variant"] == variant)
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=3, label=label)
    published = {}
    with open(PUBLISHED, newline="") as file:
        for row in csv.DictReader(file):
            if row["cpu_ghz"] == "3.3":
                published.setdefault(row["language"], []).append((int(row["batch_size"]), float(row["mpps"])))
    for language, points in published.items():
        axes.plot(*zip(*points, strict=True), ":", color="grey", linewidth=1,
                  label=SOURCE if language == "C" else None)
        if language in ("C", "Python"):  # the others lie between
            axes.annotate(language, points[-1], xytext=(-14, 4), textcoords="offset points", fontsize=7, color="grey")
    axes.set(xscale="log", yscale="log", xlabel="Batch size",
             ylabel=f"Packet rate of the driver alone [Mpps at {ghz} GHz]")
    sizes = sorted({row["batch_size"] for row in warm})
    axes.set_xticks(sizes, map(str, sizes))


def latency(rows, info, axes):
    """Microseconds over percentile at each rate that was sustained."""
    for row in rows:
        if row["rate_share"] < SUSTAINED:
            continue
        percentiles = {float(p): value for p, value in row["us"].items() if p != "max"}
        line = {1: "-", 10: "--", 20: ":"}[row["offered_mpps"]]
        colour = {"fused": "tab:orange", "in_place": "tab:red", "empty_loop": "grey"}.get(row["variant"], "black")
        colour = "tab:cyan" if row["variant"].startswith("same_design") else colour
        axes.plot([1 / (1 - p / 100) for p in percentiles], percentiles.values(), line, color=colour, marker="o",
                  markersize=3, label=f"{row['variant']}, {row['offered_mpps']} Mpps")
    axes.set(xscale="log", yscale="log", xlabel="Percentile", ylabel="Latency [us]")
    marks = (50, 90, 99, 99.9, 99.99, 99.999, 99.9999)
    axes.set_xticks([1 / (1 - p / 100) for p in marks], [f"{p:g}" for p in marks])


FIGURES = {"throughput": throughput, "latency": latency}
