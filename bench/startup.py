"""From nothing to the first packet: interpreter, import, kernels compiled or from the cache; and how C starts."""

import subprocess
import sys
import tempfile
import time

import numpy as np

from ixy_numba.core.errors import IxyError

from . import rivals
from .common import ROOT, grid, say, worker_environment

TABLE = "startup"
TURNS, QUICK_TURNS = 9, 3
COLD_TURNS, QUICK_COLD_TURNS = 3, 1
FORWARD_ONE = ("-m", "ixy_numba.fwd", "--packets", "1", "sim:frames=1", "sim")


def seconds(command, cache):
    """How long a process takes, from its start to its end."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env=worker_environment(NUMBA_CACHE_DIR=cache))
    if done.returncode:
        raise IxyError(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr.strip()[-200:]}")
    return time.perf_counter() - start


def measure(quick):
    say("startup: fresh processes …")
    turns, cold_turns = (QUICK_TURNS, QUICK_COLD_TURNS) if quick else (TURNS, COLD_TURNS)
    found = {}
    with tempfile.TemporaryDirectory(prefix="ixy_numba-startup-") as cache:
        for k in range(cold_turns):
            found.setdefault("first_packet_cold", []).append(
                seconds([sys.executable, *FORWARD_ONE], f"{cache}/{k}"))
        commands = {"python": [sys.executable, "-c", "pass"],
                    "import_numba": [sys.executable, "-c", "import numba"],
                    "import": [sys.executable, "-c", "import ixy_numba"],
                    "first_packet_cached": [sys.executable, *FORWARD_ONE]}
        for compiler in rivals.compilers()[:1]:
            commands[f"ixy_style_{compiler.name}"] = [rivals.program("main", compiler.name)]
        for _ in range(turns):
            for name, command in commands.items():
                found.setdefault(name, []).append(seconds(command, f"{cache}/0"))
    return [{"table": TABLE, "variant": name, "seconds": round(float(np.median(runs)), 4),
             "min": round(min(runs), 4), "max": round(max(runs), 4)} for name, runs in found.items()]


MEANINGS = {
    "python": "the interpreter alone", "import_numba": "… and import numba", "import": "… and import ixy_numba",
    "first_packet_cached": "fwd --packets 1, kernels from the cache",
    "first_packet_cold": "fwd --packets 1, kernels compiled (empty NUMBA_CACHE_DIR)",
}


def show(found):
    rows = {row["variant"]: row for row in found}
    order = [*(name for name in MEANINGS if name in rows), *(name for name in rows if name not in MEANINGS)]
    names = {MEANINGS.get(name, f"{name}: set-up and one empty pass, as a program"): name for name in order}
    return grid("seconds from a process's start to its end", names, ("seconds", "min", "max"),
                lambda name, column: f"{rows[names[name]][column]:.3f}")
