"""The architecture of docs/design.md, held by the sources themselves: imports run one way, kernels stay small."""

import ast
import sys
from pathlib import Path

import pytest

import ixy_numba

PACKAGE = Path(ixy_numba.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
THIRD_PARTY = {"numba", "numpy", "llvmlite"}
KERNEL_LINES, KERNEL_PARAMETERS = 40, 5

# Who may import what, inside of ixy_numba; the first entry that fits a module holds. `*` is the module's own driver.
ALLOWED = {
    "core": ["core"],
    "bus": ["core", "bus"],
    "waiting": ["core"],
    "datapath": ["core", "waiting"],
    "in_place": ["core", "datapath", "waiting"],
    "device": ["core", "drivers"],
    "drivers.*.regs": ["core"],
    "drivers.*.descriptors": ["core"],
    "drivers.*.kernels": ["core", "datapath", "waiting", "drivers.*.descriptors", "drivers.*.regs"],
    "drivers.*": ["core", "bus", "device", "datapath", "in_place", "waiting", "drivers.*"],
    "drivers": ["core"],
    "sim.__main__": ["core", "bus", "cli", "sim"],  # an app
    # A fault that the model shared with the driver would cancel itself: of the driver it sees only what is the NIC's.
    "sim": ["core", "bus", "sim", "drivers.ixgbe.regs", "drivers.ixgbe.descriptors"],
    "forwarder": ["core", "device", "datapath", "in_place", "waiting"],
    "cli": ["core", "bus", "device", "forwarder", "sim"],
    "": ["core", "device", "datapath", "waiting", "forwarder", "cli"],  # the apps, and the public names
}


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in SOURCES}
TREES = {name_of(path): ast.parse(path.read_text()) for path in SOURCES}
FOLDERS = {name_of(path) for path in SOURCES if path.name == "__init__.py"}


def imports(name):
    """What a module imports, anywhere in it: ours relative to the package (`core.jit`), others with a leading dot."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["ixy_numba", *name.split(".")] if name else ["ixy_numba"]
                here = here[: len(here) - node.level + (name in FOLDERS)]
                base = ".".join([*here, *([node.module] if node.module else [])])
            full = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in full:
            root, _, rest = target.partition(".")
            if root != "ixy_numba":
                found.add(f".{root}")
            else:
                found.add(rest if rest in NAMES else rest.rpartition(".")[0])
    return found


def fits(name, pattern):
    return pattern == "" or name == pattern or name.startswith(pattern + ".")


def rule_for(name):
    parts = name.split(".")
    own = parts[1] if parts[0] == "drivers" and len(parts) > 1 else None
    for pattern, allowed in ALLOWED.items():
        if "*" in pattern and own is None:
            continue
        if fits(name, pattern.replace("*", own or "")):
            return [one.replace("*", own or "") for one in allowed]
    raise AssertionError(name)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_run_one_way(name):
    ours = {target for target in imports(name) if not target.startswith(".")} - {"", name}
    wrong = {target for target in ours if not any(fits(target, allowed) for allowed in rule_for(name))}
    assert not wrong, f"ixy_numba.{name} must not import {wrong}"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_only_the_declared_dependencies(name):
    """Neither the tests nor anything that is not installed with the package."""
    others = {target[1:] for target in imports(name) if target.startswith(".")}
    assert others <= THIRD_PARTY | set(sys.stdlib_module_names)


def test_the_rules_find_what_they_are_for(monkeypatch):
    for name, line, wrong in (
            ("core.pool", "from ..device import open_device", "device"),
            ("core.pool", "import ixy_numba.drivers.ixgbe.setup", "drivers.ixgbe.setup"),
            ("drivers.ixgbe.kernels", "from . import setup", "drivers.ixgbe.setup"),
            ("drivers.ixgbe.kernels", "def f():\n    from ...forwarder import Forwarder", "forwarder"),
            ("drivers.ixgbe", "from ...sim import model", "sim.model"),
            ("sim.model", "from ..drivers.ixgbe import kernels", "drivers.ixgbe.kernels"),
            ("sim", "from ..drivers import ixgbe", "drivers.ixgbe"),
            ("fwd", "from .drivers.ixgbe import setup", "drivers.ixgbe.setup")):
        monkeypatch.setitem(TREES, name, ast.parse(line))
        with pytest.raises(AssertionError, match="must not import"):
            test_imports_run_one_way(name)
        assert imports(name) == {wrong}
    for line in ("import pytest", "from tests import tinynic", "import bench"):
        monkeypatch.setitem(TREES, "core.pool", ast.parse(line))
        with pytest.raises(AssertionError):
            test_only_the_declared_dependencies("core.pool")


def functions(name):
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]


def decorators(node):
    return {part.id for decorator in node.decorator_list for part in ast.walk(decorator) if isinstance(part, ast.Name)}


@pytest.mark.parametrize("name", sorted(name for name in NAMES if not fits(name, "sim")))
def test_kernels_are_small(name):
    for node in functions(name):
        if "kernel" in decorators(node):
            start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
            assert node.end_lineno - start < KERNEL_LINES, f"{name}.{node.name} is too long"
            assert len(node.args.args) <= KERNEL_PARAMETERS, f"{name}.{node.name} has too many parameters"


@pytest.mark.parametrize("name", sorted(NAMES - {"core.jit"}))
def test_everything_compiled_is_a_kernel(name):
    """Numba's own decorators would bypass the mode and the cache."""
    used = {node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not used & {"njit", "jit", "vectorize", "guvectorize", "cfunc", "jitclass"}


@pytest.mark.parametrize("folder", ["ixy_numba", "tests", "bench", "tools", "docs"])
def test_the_first_line_says_what_a_file_is_for(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = path.read_text().splitlines()
        first = lines[1] if lines[0].startswith("#!") else lines[0]
        assert first.startswith('"""') and len(first) > 20, path
