"""The published table of protections, and our row of it: a mark is what its tests' results say, nothing else."""

import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from ixy_numba.core.errors import IxyError
from ixy_numba.core.jit import PROTECTIONS

from .common import ROOT, Unavailable, in_worker, say

YES, NO = "✓", "✗"
# Language: general memory (bounds, use after free), packet buffers (the same), integer overflow
PUBLISHED = {
    "C": (NO, NO, NO, NO, NO), "Rust": (YES, YES, "(✓)¹", YES, "(✓)⁴"), "Go": (YES, YES, "(✓)¹", "(✓)³", NO),
    "C#": (YES, YES, "(✓)¹", "(✓)³", "(✓)⁴"), "Java": (YES, YES, "(✓)¹", "(✓)³", NO),
    "OCaml": (YES, YES, "(✓)¹", "(✓)³", NO), "Haskell": (YES, YES, "(✓)¹", "(✓)³", "(✓)⁵"),
    "Swift": (YES, YES, "✗²", "(✓)³", YES), "JavaScript": (YES, YES, "(✓)¹", "(✓)³", "(✓)⁵"),
    "Python": (YES, YES, "(✓)¹", "(✓)³", "(✓)⁵"),
}
FOOTNOTES = ("¹ by a wrapper that unsafe or C code constructs", "² in debug builds only",
             "³ buffers only ever return to their pool", "⁴ off by default",
             "⁵ numbers do not wrap: floats, or integers of any size")
COLUMNS = ("memory bounds", "use after free", "packet bounds", "use after free ", "int overflow")


class Outcomes:
    """A pytest plugin: what became of each test with the marker `safety("<protection>", …)`, a protection at a time."""

    def __init__(self):
        self.found = {protection: {} for protection in PROTECTIONS}
        self._paths = {}

    def _set(self, node, protections, outcome):
        for protection in protections:
            self.found[protection][node] = outcome

    def pytest_itemcollected(self, item):
        for marker in item.iter_markers("safety"):
            self._set(item.nodeid, marker.args, "not run")

    def pytest_collectstart(self, collector):
        self._paths[collector.nodeid] = getattr(collector, "path", None)

    def pytest_collectreport(self, report):
        """A file that is skipped or broken as a whole: all that it would have shown is not shown."""
        path = self._paths.get(report.nodeid)
        if report.outcome != "passed" and path and path.is_file():
            text = path.read_text()
            if "mark.safety(" in text:
                self._set(report.nodeid, [name for name in PROTECTIONS if name in text], report.outcome)

    def pytest_runtest_logreport(self, report):
        mine = [protection for protection, tests in self.found.items() if report.nodeid in tests]
        if report.outcome != "passed" or hasattr(report, "wasxfail"):
            self._set(report.nodeid, mine, "failed" if report.failed else "skipped")
        elif report.when == "call":
            self._set(report.nodeid, mine, "passed")


def worker(tests):
    """{protection: {test: "passed", "failed", "skipped" or "not run"}} of the marked tests below `tests`."""
    import pytest

    outcomes = Outcomes()
    code = pytest.main(["-q", "-m", "safety", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), tests],
                       plugins=[outcomes])
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        raise IxyError("the tests cannot be run: python -m pytest -m safety")
    return outcomes.found


def measure(tests=ROOT / "tests"):
    """({protection: whether its mark is given}, {protection: {outcome: tests}}) in the default mode."""
    if not find_spec("pytest"):
        raise Unavailable("safety: the marks are given by tests, which need pytest; install ixy_numba[test]")
    say("safety: tests of the marks …")
    environment = {"IXY_NUMBA_WITHOUT": "", "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", "")}  # as in pytest
    found = in_worker("marks", "checked", environment, tests=str(Path(tests)))
    return ({protection: given(outcomes) for protection, outcomes in found.items()},
            {protection: dict(Counter(outcomes.values())) for protection, outcomes in found.items()})


def given(outcomes):
    """A mark needs a test, and all its tests to have run and passed."""
    return bool(outcomes) and set(outcomes.values()) == {"passed"}


def table(marks):
    """{language: five cells}, ours first."""
    return {"ixy_numba (tested)": tuple(YES if marks[protection] else NO for protection in PROTECTIONS), **PUBLISHED}


def reasons(tests):
    """A line a mark: what its tests said."""
    return [f"{protection}: " + (", ".join(f"{n} tests {outcome}" for outcome, n in sorted(tests[protection].items()))
                                 or "no test is marked for it") for protection in PROTECTIONS]
