"""What all tables share: who measured (machine, commit, noise), worker processes, rows, output."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llvmlite
import numba
import numpy as np

from ixy_numba import __version__, kernel
from ixy_numba.core.errors import IxyError, UsageError
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.core.mmio import MACHINE, cycles

from . import rivals

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
MODES = ("checked", "fast")
PYTHON_HASH_SEED = "0"  # so that counted instructions do not depend on the order of sets


class Unavailable(IxyError):
    """This machine lacks what a table needs; `all` leaves the table out and says so."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def tell(text):
    """Print. The measurement goes on, and its JSON is written, when the reader has seen enough: `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- workers: one process a mode, since the mode is fixed when the package is imported


def worker_environment(mode="checked", **more):
    """Kernels of the benchmark are cached by its own sources too: the package's cache does not know them."""
    digest = hashlib.sha256()
    for source in sorted(HERE.glob("*.py")):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("NUMBA_CACHE_DIR") or Path(tempfile.gettempdir()) / f"ixy_numba-bench-{os.getuid()}")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "IXY_NUMBA_MODE": mode, "PYTHONHASHSEED": PYTHON_HASH_SEED, "PYTHONPATH": path,
            "NUMBA_CACHE_DIR": str(cache / digest.hexdigest()[:12]), **more}


def in_worker(table, mode, environment=None, wrapper=(), **options):
    """`worker(**options)` of bench/<table>.py in a process of its own; returns what it returns."""
    with Worker(table, mode, environment, wrapper) as worker:
        return worker.ask(**options)


class Worker:
    """A process that stays: `ask` has it call `worker` of bench/<table>.py, so that several can take turns.

    `mode` and `environment` are what its kernels are compiled for; `wrapper` goes before its command.
    """

    def __init__(self, table, mode, environment=None, wrapper=()):
        self._label = f"{table}, {mode} mode"
        self._process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "bench", "--worker", table], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=worker_environment(mode, **environment or {}), cwd=ROOT)

    def ask(self, **options):
        """What `worker(**options)` returns there; IxyError if it fails or the process ends."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(options) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise IxyError(f"{self._label}: the process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise IxyError(f"{self._label}: {answer['error']}")
        return answer["result"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def pin(which=-1):
    """Stay on one processor: the last allowed one, far from where interrupts usually go."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[which]})


# ---- the machine


def require_machine():
    """UsageError where the benchmark cannot measure."""
    if MACHINE != "x86_64":
        raise UsageError(f"the benchmark times with x86-64's time stamp counter; this machine is {MACHINE}")
    if INTERPRETED:
        raise UsageError("the benchmark times compiled code; unset NUMBA_DISABLE_JIT")


@kernel
def _spin(samples, iterations):
    """Time the same dependent arithmetic again and again."""
    total = np.uint64(1)
    for k in range(len(samples)):
        start = cycles()
        for _ in range(iterations):
            total = (total * np.uint64(3) + np.uint64(1)) & np.uint64(0xFFFFFFFF)
        samples[k] = cycles() - start
    return total


def steal_ticks():
    """(ticks that the hypervisor took, all ticks) since boot."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return fields[7], sum(fields)


class Noise:
    """How quiet the machine was while something ran."""

    def __init__(self):
        self._steal = steal_ticks()

    def summary(self):
        samples = np.zeros(2000, np.uint64)
        _spin(samples[:2], 10)
        _spin(samples, 5000)
        quick, typical, slow, worst = np.percentile(samples.astype(float), [0, 50, 99, 100])
        steal, total = (now - then for now, then in zip(steal_ticks(), self._steal, strict=True))
        return {"loop_median_over_min": round(typical / quick, 4), "loop_p99_over_min": round(slow / quick, 4),
                "loop_max_over_min": round(worst / quick, 2), "steal_percent": round(100 * steal / max(total, 1), 2),
                "load": round(os.getloadavg()[0], 2)}


def tsc_ghz():
    start, since = _now(), time.perf_counter()
    time.sleep(0.1)
    return round((_now() - start) / (time.perf_counter() - since) / 1e9, 3)


@kernel
def _now():
    return cycles()


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit():
    """The commit that was measured, with "+" if files were changed since; the version outside a repository."""
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    found = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "ixy_numba", "bench/*.py", "bench/c")
    return (found + "+" * bool(changed)) or f"version {__version__}"


def machine():
    from .nic import cache_bytes

    return {"cpu": cpu_model(), "cpus": len(os.sched_getaffinity(0)), "tsc_ghz": tsc_ghz(),
            "cache_bytes": {f"L{k}": cache_bytes(k) for k in (1, 2, 3)}, "kernel": platform.release(),
            "compilers": {c.name: c.version for c in rivals.compilers()}, "c_flags": " ".join(rivals.FLAGS),
            "python": platform.python_version(), "numba": numba.__version__, "llvmlite": llvmlite.__version__,
            "numpy": np.__version__}


LIMITS = ("What this does not show: a PCIe bus, real DMA and DDIO. The NIC is a model on the driver's own core; only "
          "the driver is timed, in cycles of the time stamp counter.")


def as_json(result):
    """One row a line: results are kept in the repository, and changes of them are read."""
    lists = {key: value for key, value in result.items() if isinstance(value, list)}
    head = json.dumps({key: value for key, value in result.items() if key not in lists}, indent=1)
    parts = [f' "{key}": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]" if rows else f' "{key}": []'
             for key, rows in lists.items()]
    return head[:-2] + "".join(f",\n{part}" for part in parts) + "\n}\n"


def headline(info):
    noise = info["noise"]
    found = ", ".join(info["compilers"].values()) or "no C compiler: the C columns are left out"
    return [f"{info['cpu']}, {info['cpus']} processors, TSC {info['tsc_ghz']} GHz, Linux {info['kernel']}",
            f"C: {found} ({info['c_flags']}); Python {info['python']}, numba {info['numba']}, numpy {info['numpy']}",
            f"noise: an empty loop's median is {noise['loop_median_over_min']} x its minimum, p99 "
            f"{noise['loop_p99_over_min']} x, maximum {noise['loop_max_over_min']} x; "
            f"steal {noise['steal_percent']} %, load {noise['load']}"]


def grid(title, rows, columns, cell):
    """Lines of a table: a line a name in `rows`, a column each of `columns`, `cell(row, column)` as text."""
    texts = [[str(row), *(cell(row, column) for column in columns)] for row in rows]
    head = [title, *map(str, columns)]
    widths = [max(len(line[k]) for line in [head, *texts]) for k in range(len(head))]
    return ["  ".join(text.ljust(width) if k == 0 else text.rjust(width)
                      for k, (text, width) in enumerate(zip(line, widths, strict=True))) for line in [head, *texts]]
