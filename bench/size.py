"""How much code a driver and forwarder are: lines without blank ones and comments, and bytes after gzip -6."""

import gzip
import io
import json
import shutil
import subprocess
import tokenize
from pathlib import Path

from .common import ROOT, grid

TABLE = "size"
# What the published table counts: the driver and the forwarder with all they need, no register constants.
PARTS = {
    "driver": ("ixy_numba/drivers/__init__.py", "ixy_numba/drivers/ixgbe/__init__.py",
               "ixy_numba/drivers/ixgbe/descriptors.py", "ixy_numba/drivers/ixgbe/setup.py",
               "ixy_numba/drivers/ixgbe/kernels.py", "ixy_numba/device.py", "ixy_numba/datapath.py",
               "ixy_numba/waiting.py", "ixy_numba/bus/__init__.py"),
    "core": tuple(f"ixy_numba/core/{name}.py" for name in (
        "__init__", "checked", "dispatch", "errors", "fingerprint", "integers", "jit", "libc", "lifetime", "memory",
        "mmio", "packet", "pool", "raw", "registers", "thread")),
    "forwarder": ("ixy_numba/__init__.py", "ixy_numba/cli.py", "ixy_numba/forwarder.py", "ixy_numba/fwd.py"),
}
# Not in the total, as the published table leaves out what not every driver has.
EXTRAS = {"in_place": ("ixy_numba/in_place.py", "ixy_numba/drivers/ixgbe/in_place.py")}
CONSTANTS = "ixy_numba/drivers/ixgbe/regs.py"
# The published Table 7: language, lines, lines of C among the sources, kB after gzip -6
PUBLISHED = (("C", 831, 831, 12.9), ("Rust", 961, 0, 10.4), ("Go", 1640, 0, 20.6), ("C#", 1266, 34, 13.1),
             ("Java", 2885, 188, 31.8), ("OCaml", 1177, 28, 12.3), ("Haskell", 1001, 0, 9.6), ("Swift", 1506, 0, 15.9),
             ("JavaScript", 1004, 262, 13.0), ("Python", 1242, 77, 14.2))


def lines_of_code(source):
    """Lines of Python with code on them: no blank lines, comments or docstrings (strings that are a statement)."""
    code, statement = set(), []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            continue
        if token.type != tokenize.NEWLINE:
            statement.append(token)
            continue
        if any(part.type != tokenize.STRING for part in statement):
            code.update(line for part in statement for line in range(part.start[0], part.end[0] + 1))
        statement = []
    return len(code)


def cloc(paths):
    """What cloc counts, or None where it is not installed."""
    if not shutil.which("cloc"):
        return None
    done = subprocess.run(["cloc", "--json", "--quiet", *map(str, paths)], capture_output=True, text=True)
    return json.loads(done.stdout)["SUM"]["code"]


def measure(quick):
    made, everything = [], [path for paths in PARTS.values() for path in paths]
    for part, names in {**PARTS, "total": everything, **EXTRAS}.items():
        paths = [ROOT / name for name in names]
        made.append({"table": TABLE, "variant": part, "files": len(paths), "cloc": cloc(paths),
                     "lines": sum(lines_of_code(path.read_text()) for path in paths),
                     "gzip_kb": round(len(gzip.compress(b"".join(map(Path.read_bytes, paths)), 6)) / 1000, 1)})
    return made


def label(part):
    return f"ixy_numba: {part}" + ", on top" * (part in EXTRAS)


def show(found):
    rows = {label(row["variant"]): (row["lines"], 0, row["gzip_kb"]) for row in found}
    rows |= {f"{language} (published)": tuple(values) for language, *values in PUBLISHED}
    columns = ("lines", "of C", "gzip -6 kB")
    counted = {row["variant"]: row["cloc"] for row in found}["total"]
    check = "cloc is not installed" if counted is None else f"cloc counts {counted} lines in all"
    return [*grid("source code", rows, columns, lambda name, column: str(rows[name][columns.index(column)])), "",
            f"Without blank lines, comments, docstrings and register constants; {check}. No C: the kernels are Python."]
