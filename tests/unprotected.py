"""Runs the violations of a test module with a protection left out, to show that it is what finds them.

A module's VIOLATIONS are {name: function without arguments}; each ends in an error while the protection is there.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def outcomes(violations):
    """{name: what it returned as text, or the name of its error}"""
    found = {}
    for name, violation in violations.items():
        try:
            found[name] = repr(violation())
        except Exception as error:
            found[name] = type(error).__name__
    return found


def outcomes_without(module, protections):
    """`outcomes` of the module's VIOLATIONS in a process that leaves out these protections."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "IXY_NUMBA_WITHOUT": protections}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, module], env=environment, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(outcomes(importlib.import_module(sys.argv[1]).VIOLATIONS)))
