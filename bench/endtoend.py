"""The forwarder as users run it, driver on one processor, simulated 82599s on the other, against the model's ceiling.

The ceiling is what the model could move if a driver cost nothing: timed alone, in turn with the driver.
"""

import json
import os
import subprocess
import sys

import numpy as np

from ixy_numba import kernel
from ixy_numba.core.errors import IxyError
from ixy_numba.sim.engine import visit

from .common import MODES, ROOT, Unavailable, grid, in_worker, pin, say, tsc_ghz, worker_environment
from .nic import ONE, U, clock, phase
from .ours import Ours

TABLE = "endtoend"
# 64-byte frames at 10 Gbit/s into both ports; and as fast as the driver takes them
LOADS = {"line": "sim:gen=line", "unlimited": "sim:frames=100000000000"}
FORMS = {"fused": (), "in_place": ("--in-place",)}
SECONDS, TURNS = 3, 5
QUICK_SECONDS, QUICK_TURNS = 1, 2
BATCH, ROUNDS = U(32), 4000


@kernel
def model_share(first, second, driver, samples):
    """Model and driver in turn; the cycles that the model takes for up to a batch each way through both devices."""
    for k in range(len(samples)):
        start = clock()
        visit(first, start, U(0), BATCH)
        visit(second, start, U(0), BATCH)
        samples[k] = clock() - start
        phase(driver, BATCH, ONE)


def worker():
    """Mpps that the model alone would reach."""
    pin()
    ours = Ours("fused", spec="bench:frames=100000000000")
    models = [opened.bus.model.state for opened in ours.devices]
    samples = np.zeros(ROUNDS, np.uint64)
    model_share(*models, ours.driver, samples)

    def sent():
        return sum(opened.stats().tx_packets for opened in ours.devices)

    before = sent()
    model_share(*models, ours.driver, samples)
    calm = samples[samples <= 3 * np.median(samples)]
    return tsc_ghz() * 1e3 * (sent() - before) / ROUNDS / float(calm.mean())


def forward(mode, form, spec, seconds):
    """One run of `python -m ixy_numba.fwd`: the object it ends with."""
    command = [sys.executable, "-m", "ixy_numba.fwd", "--json", "--duration", str(seconds), *FORMS[form], spec, spec]
    done = subprocess.run(command, capture_output=True, text=True, env=worker_environment(mode), cwd=ROOT)
    if done.returncode:
        raise IxyError(f"{' '.join(command[1:])} ended with code {done.returncode}: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(quick):
    if len(os.sched_getaffinity(0)) < 2:
        raise Unavailable("endtoend: needs two processors, one for the driver and one for the model; only one is here")
    say("endtoend: driver and simulated NICs on two processors …")
    ceiling = in_worker(TABLE, "checked")
    runs = {(mode, form, load): [] for mode in MODES for form in FORMS for load in LOADS}
    for mode, form, load in runs:
        forward(mode, form, LOADS[load], 0)  # compiles
    for _ in range(QUICK_TURNS if quick else TURNS):
        for mode, form, load in runs:
            runs[mode, form, load].append(forward(mode, form, LOADS[load], QUICK_SECONDS if quick else SECONDS))
    return [row(*key, found, ceiling) for key, found in runs.items()]


def row(mode, form, load, found, ceiling):
    mpps = [run["mpps"] for run in found]
    errors = sum(port["sequence_errors"] for run in found for port in run["ports"])
    return {"table": TABLE, "variant": form if mode == "checked" else f"{form}_fast", "load": load, "batch_size": 32,
            "mpps": round(float(np.median(mpps)), 3), "min": round(min(mpps), 3), "max": round(max(mpps), 3),
            "ceiling_mpps": round(ceiling, 3), "share_of_ceiling": round(float(np.median(mpps)) / ceiling, 3),
            "sequence_errors": errors}


def show(found):
    by_key = {(row["variant"], row["load"]): row for row in found}
    columns = {"Mpps": "mpps", "min": "min", "max": "max", "ceiling": "ceiling_mpps", "share": "share_of_ceiling",
               "out of order": "sequence_errors"}
    names = {f"{variant}, {load}": (variant, load) for variant, load in by_key}

    def cell(name, column):
        return str(by_key[names[name]][columns[column]])

    return [*grid("two processors, batch 32", names, columns, cell), "",
            f"line: {LOADS['line']} twice, 29.8 Mpps offered. unlimited: frames as fast as the driver takes them. The "
            "ceiling is without the transfers of cache lines between the processors."]
