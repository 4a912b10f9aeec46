"""The `kernel` decorator and its cache: fast where it may be, never stale, and never in the way."""

import itertools
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import ANY

import numba
import numpy as np
import pytest

import ixy_numba
from ixy_numba.core import jit
from ixy_numba.core.jit import INTERPRETED, MODE, fingerprint

ROOT = Path(ixy_numba.__file__).parent.parent
TESTS = Path(__file__).parent
compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")

MAIN = """
import sys
from enum import IntEnum
from typing import NamedTuple
import numpy as np
import helpers, package.limits
from helpers import add_limit
from package.levels import Level
from ixy_numba import kernel
from ixy_numba.core.jit import compiled_signatures

OWN = 1000
TABLE = np.array([5, 6, 7])

class Pair(NamedTuple):
    a: np.ndarray
    b: np.ndarray

@kernel
def work(pair):
    try:
        step = pair.a[0]
        step += TABLE[1]
    except Exception:
        step = 0
    return step + add_limit(pair.b[0]) + OWN + helpers.LIMIT + package.limits.MAX + Level.HIGH

if __name__ == "__main__":
    value = work(Pair(np.ones(1, np.int64), np.ones(1, np.int64)))
    alone = add_limit(1)
    print(value, *compiled_signatures(work), alone, *compiled_signatures(add_limit))
"""
HELPERS = """
from ixy_numba import kernel
LIMIT = 30000

@kernel
def add_limit(x):
    return x + 200000
"""


FILES = {
    "main.py": MAIN, "helpers.py": HELPERS, "package/__init__.py": "", "package/limits.py": "MAX = 4000000\n",
    "package/levels.py": "from enum import IntEnum\nclass Level(IntEnum):\n    HIGH = 50000000\n"}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


class Project:
    """A user's program beside a copy of the package, each run in a new process on one cache directory."""

    def __init__(self, folder):
        self.folder = folder
        self.writes = itertools.count(1)
        shutil.copytree(ROOT / "ixy_numba", folder / "ixy_numba")
        for name, text in FILES.items():
            self.write(name, text)
        self.cache = folder / "cache"

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        later = path.stat().st_mtime + 2 * next(self.writes)
        os.utime(path, (later, later))  # Python tells a .pyc's age in whole seconds

    def edit(self, name, old, new):
        text = (self.folder / name).read_text()
        assert text.count(old) == 1, (name, old)
        self.write(name, text.replace(old, new))

    def run(self, *args, fails=False, **environment):
        """Words that the program printed, and its stderr."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "IXY_NUMBA_"))}
        done = subprocess.run(
            [sys.executable, *(args or ("main.py",))], cwd=self.folder, capture_output=True, text=True, timeout=300,
            env={**inherited, "PYTHONPATH": f"{self.folder}{os.pathsep}{TESTS}",
                 "NUMBA_CACHE_DIR": str(self.cache), **environment})
        assert (done.returncode != 0) == fails, done.stderr
        return done.stdout.split(), done.stderr

    def numbers(self, *args, **environment):
        words, errors = self.run(*args, **environment)
        assert errors == ""
        return [int(word) for word in words]


SUM = 1 + 6 + 200001 + 1000 + 30000 + 4000000 + 50000000


def test_a_second_process_compiles_nothing(project):
    assert project.numbers() == [SUM, 1, 0, 200001, 1, 0]
    assert project.numbers() == [SUM, 1, 1, 200001, 1, 1]
    assert project.numbers(PYTHONHASHSEED="7") == [SUM, 1, 1, 200001, 1, 1]
    # imported, it is another kernel: its classes have other names
    work = "import main, numpy as np; print(main.work(main.Pair(np.ones(1, np.int64), np.ones(1, np.int64))), " \
           "*main.compiled_signatures(main.work))"
    assert [project.numbers("-c", work) for _ in range(2)] == [[SUM, 1, 0], [SUM, 1, 1]]


def test_whatever_a_kernel_refers_to_may_change(project):
    project.numbers()
    total, helper = SUM, 200001
    for what, file, old, new, change in (
            ("a constant of its own module", "main.py", "OWN = 1000", "OWN = 1007", 7),
            ("an array", "main.py", "[5, 6, 7]", "[5, 9, 7]", 3),
            ("a module's constant", "helpers.py", "LIMIT = 30000", "LIMIT = 30009", 9),
            ("a constant of a package's module", "package/limits.py", "4000000", "4000001", 1),
            ("an enumeration", "package/levels.py", "50000000", "50000002", 2),
            ("itself", "main.py", "step = pair.a[0]", "step = pair.a[0] + 1", 1)):
        project.edit(file, old, new)
        total += change
        assert project.numbers() == [total, 1, 0, helper, 1, 1], what
    project.edit("helpers.py", "x + 200000", "x + 200005")  # a helper kernel of another module
    assert project.numbers() == [total + 5, 1, 0, helper + 5, 1, 0]
    for name, text in FILES.items():
        project.write(name, text)
    assert project.numbers() == [SUM, 1, 1, helper, 1, 1]  # what was compiled before is still good


@compiled_only
def test_code_that_differs_only_in_what_a_try_covers():
    """The bytecode is the same, its exception table is not."""
    def inside(a):
        try:
            x = a[0]
            x = a[1]
        except Exception:
            x = 0
        return x

    def outside(a):
        try:
            x = a[0]
        except Exception:
            x = 0
        else:
            x = a[1]
        return x

    assert fingerprint(inside) != fingerprint(outside)


def test_fingerprints_see_closures_defaults_and_intrinsics():
    def made(value, default=1):
        def function(x, y=default):
            return x + value + y
        return fingerprint(function)

    assert len({made(1), made(2), made(1, default=2), made(1.0), made("1"), made((1, 2)), made((2, 1))}) == 7
    assert made(1) == made(1)
    assert made(frozenset("abc")) == made(frozenset("cba")) != made(frozenset("abd"))
    assert made(np.zeros(3)) != made(np.zeros(3, np.int64)) and made(np.zeros(3)) == made(np.zeros(3))

    @numba.extending.intrinsic
    def one(context):
        return numba.types.int64(), lambda *_: None

    @numba.extending.intrinsic
    def two(context):
        return numba.types.int32(), lambda *_: None

    assert made(one) != made(two)


PRELUDE = """
import enum, functools, numba, numpy as np, types
from collections import namedtuple
from numba.extending import overload
from ixy_numba import kernel
from ixy_numba.core.jit import OPTIONS

def same(x): return x
def neg(x): return -x

def with_closure(module):
    return lambda x: x + module.K
m = types.ModuleType("m")
closed = with_closure(m)
"""
EDITS = {  # what a user changes elsewhere: before, after, and the expression that a kernel has it in
    "keyword parameters": ("def g(value, offset): return value - offset", "def g(offset, value): return offset - value",
                           "g(value=x, offset=1)"),
    "keyword default": ("def g(x, *, by=1): return x + by", "def g(x, *, by=2): return x + by", "g(x)"),
    "wrapper": ("@functools.wraps(np.sum)\ndef g(x): return x + 1", "@functools.wraps(np.sum)\ndef g(x): return x + 2",
                "g(x)"),
    "compiler option": ("g = numba.njit(same)", "g = numba.njit(fastmath=True)(same)", "g(x)"),
    "order of functions": ("K = (same, neg)", "K = (neg, same)", "same(x) + neg(x) + K[0](x)"),
    "overload": ("def g(x): pass\n@overload(g, jit_options=OPTIONS)\ndef _(x): return lambda x: x + 1",
                 "def g(x): pass\n@overload(g, jit_options=OPTIONS)\ndef _(x): return lambda x: x + 2", "g(x)"),
    "module in a closure": ("m.K = 1", "m.K = 2", "closed(x)"),
    "Numba type": ("K = numba.uint8", "K = numba.int64", "K(x)"),
    "NamedTuple": ("K = namedtuple('C', 'a b')(1, 2)", "K = namedtuple('C', 'b a')(1, 2)", "x + K.a"),
    "NamedTuple class": ("C = namedtuple('C', 'a b')", "C = namedtuple('C', 'b a')", "C(1, x).a"),
    "NamedTuple default": ("C = namedtuple('C', 'a', defaults=[1])", "C = namedtuple('C', 'a', defaults=[2])", "C().a"),
    "enumeration looked up": ("K = enum.IntEnum('K', {'A': 1})", "K = enum.IntEnum('K', {'A': 2})", "K['A'] + x"),
    "nesting": ("K = ((1, 2), 3)", "K = ((1, 2, 3),)", "len(K[0])"),
    "list or tuple": ("K = [1, 2]", "K = (1, 2)", "K[0]"),
    "dictionary": ("K = {'a': 1}", "K = {'a': 2}", "K['a']"),
    "set": ("K = {1, 2}", "K = {1, 3}", "x in K"),
    "partial": ("K = functools.partial(same, 1)", "K = functools.partial(same, 2)", "K()"),
    "NumPy scalar": ("K = np.float64(1)", "K = np.array(1.0)", "x + K"),
    "array order": ("K = np.zeros((2, 2))", "K = np.zeros((2, 2), order='F')", "K[0]"),
}


@compiled_only
@pytest.mark.parametrize("what", EDITS)
def test_a_fingerprint_tells_one_from_the_other(what):
    def told(definition):
        names = {"__name__": "helpers"}
        exec(f"{PRELUDE}\n{definition}\n@kernel\ndef f(x): return {expression}", names)
        return fingerprint(names["f"])

    before, after, expression = EDITS[what]
    assert told(before) == told(before) != told(after)


def test_constants_that_are_equal_or_look_alike_are_told_apart():
    def told(value):
        return fingerprint(lambda: value)

    alike = [1, True, 1.0, 1 + 0j, "1", b"1", np.int8(1), np.uint8(1), np.bool_(1), (1,), [1], {1}, {1: 1}, None,
             "None", 0.0, -0.0, "", b"", (), int, "int", np.dtype("<u4"), np.dtype(">u4"), numba.uint32, "uint32", ...]
    assert len(set(map(told, alike))) == len(alike)


OPAQUE = """
from numba.extending import overload
from ixy_numba import handler, kernel
from ixy_numba.core.jit import OPTIONS, compiled_signatures

class Settings:
    pass
settings = Settings()
settings.step = 1

def step():
    pass
@overload(step, jit_options=OPTIONS)
def _step():
    value = settings.step
    return lambda: value

@kernel
def work(x):
    return x + step()
@handler
def drop(packet):
    return -step()
@kernel
def ask(handler):
    return 7
print(work(1), *compiled_signatures(work), ask(drop), *compiled_signatures(ask))
"""


@compiled_only
def test_what_refers_to_an_object_that_nothing_is_known_of_is_not_kept(project):
    for step in (1, 5):
        project.write("opaque.py", OPAQUE.replace("step = 1", f"step = {step}"))
        words, errors = project.run("opaque.py")
        assert [int(word) for word in words] == [1 + step, 1, 0, 7, 1, 0] and not files(project)
        for name in ("work", "drop"):
            assert errors.count(f"{name} is compiled anew at each start: it refers to an object of __main__.Se") == 1


# ---- the package itself

RESIZE = ("-c", "import numpy as np\nfrom ixy_numba import resize\nfrom ixy_numba.core.jit import compiled_signatures\n"
          "try:\n    resize(np.uint64(0), np.uint64(2000))\nexcept IndexError:\n    print(-1, end=' ')\n"
          "print(*compiled_signatures(resize))")


def test_an_edited_constant_of_the_package_is_seen(project):
    """`resize` imports it from another module: neither its source nor its bytecode changes."""
    assert [project.numbers(*RESIZE) for _ in range(2)] == [[1, 0], [1, 1]]
    project.edit("ixy_numba/core/pool.py", "BUFFER_SIZE = 2048", "BUFFER_SIZE = 1024")
    assert [project.numbers(*RESIZE) for _ in range(2)] == [[-1, 1, 0], [-1, 1, 1]]


def test_a_users_kernels_are_compiled_anew_for_another_package(project):
    project.numbers()
    project.edit("ixy_numba/core/errors.py", "class IxyError(", "# upgraded\nclass IxyError(")
    assert project.numbers() == [SUM, 1, 0, 200001, 1, 0]
    assert project.numbers() == [SUM, 1, 1, 200001, 1, 1]


PEEK = """
import numpy as np
from ixy_numba.core.jit import compiled_signatures, kernel
@kernel
def peek(a, i):
    return a[i]
try:
    print(peek(np.arange(8)[:4], 6), end=" ")
except IndexError:
    print("refused", end=" ")
print(*compiled_signatures(peek), "out of bounds" in next(iter(peek.inspect_llvm().values()), "out of bounds"))
"""


@compiled_only
def test_no_mode_runs_the_code_of_another(project):
    """And in the fast mode the checks are compiled out, not skipped."""
    project.write("peek.py", PEEK)
    checked, fast, forced = {}, {"IXY_NUMBA_MODE": "fast"}, {"IXY_NUMBA_MODE": "fast", "NUMBA_BOUNDSCHECK": "1"}
    for mode, outcome, hits, checks in (
            (checked, "refused", "0", "True"), (fast, "6", "0", "False"), (forced, "refused", "0", "True"),
            (checked, "refused", "1", ANY), (fast, "6", "1", ANY), (forced, "refused", "1", ANY)):
        assert project.run("peek.py", **mode)[0] == [outcome, "1", hits, checks], (mode, hits)


@pytest.mark.parametrize("mode", ["quick", ""])
def test_a_mode_that_is_none(project, mode):
    _, errors = project.run("-c", "import ixy_numba", fails=True, IXY_NUMBA_MODE=mode)
    assert errors.splitlines()[-1].endswith(
        f"UsageError: IXY_NUMBA_MODE is {mode!r}: expected 'checked' (the default) or 'fast'")


def test_numbas_own_settings_are_left_alone(project):
    script = """
import numba, os
before = {k: v for k, v in vars(numba.config).items() if k.isupper()}, dict(os.environ)
import ixy_numba.fwd
after = {k: v for k, v in vars(numba.config).items() if k.isupper()}, dict(os.environ)
assert before == after
@numba.njit(cache=True)
def own(x):
    return x + 1
own(1)
print(own.stats.cache_path)
"""
    project.write("own.py", script)
    words, _ = project.run("own.py")
    assert "ixy_numba" not in Path(words[0]).relative_to(project.cache).parts


# ---- where the cache lies

def find(monkeypatch, **places):
    """cache_directory() for these settings, NUMBA_CACHE_DIR, XDG_CACHE_HOME, HOME and temporary directory."""
    nowhere = "/proc/nowhere"
    jit.warn.cache_clear()
    monkeypatch.setattr(jit.config, "CACHE_DIR", str(places.get("numba", "")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(places.get("xdg", "")))
    monkeypatch.setenv("HOME", str(places.get("home", nowhere)))
    monkeypatch.setattr(tempfile, "tempdir", str(places.get("temporary", nowhere)))
    return jit.cache_directory.__wrapped__()


def test_the_first_writable_place_is_taken(monkeypatch, tmp_path):
    one, two, three, four = (tmp_path / name for name in "abcd")
    four.mkdir()
    places = {"numba": one, "xdg": two, "home": three, "temporary": four}
    for name, expected in (("numba", one / "ixy_numba"), ("xdg", two / "ixy_numba"),
                           ("home", three / ".cache/ixy_numba"), ("temporary", four / f"ixy_numba-{os.getuid()}")):
        found = find(monkeypatch, **places)
        assert found.parent == expected and found.name.startswith(MODE + "-") and found.is_dir()
        assert stat.S_IMODE(found.stat().st_mode) == 0o700
        places[name] = "/dev/null/x"  # a file: no directory can be made there
    with pytest.warns(RuntimeWarning, match="no writable cache directory, .* set NUMBA_CACHE_DIR"):
        assert find(monkeypatch, **places) is None


def test_relative_places(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find(monkeypatch, numba="here").parent == tmp_path / "here/ixy_numba"
    assert find(monkeypatch, xdg="not/absolute", home=tmp_path / "home").parent != tmp_path / "not/absolute/ixy_numba"
    assert not (tmp_path / "not").exists()  # as the XDG specification asks


def shared(tmp_path, kind):
    """A private directory's name, taken by somebody else in a shared temporary directory."""
    private = tmp_path / f"ixy_numba-{os.getuid()}"
    if kind == "symlink":
        (tmp_path / "theirs").mkdir()
        private.symlink_to(tmp_path / "theirs")
    elif kind == "file":
        private.touch()
    else:
        private.mkdir()
        private.chmod(0o770 if kind == "group" else 0o707 if kind == "world" else 0o755 if kind == "read" else 0o700)
        if kind == "owner":
            os.chown(private, 65534, 65534)
    return private


@pytest.mark.parametrize("kind", ["owner", "group", "world", "read", "symlink", "file"])
def test_a_shared_directory_of_others_is_not_used(monkeypatch, tmp_path, kind):
    """What lies there is executed."""
    if kind == "owner" and os.getuid() != 0:
        pytest.skip("needs root: a directory of another user")
    private = shared(tmp_path, kind)
    with pytest.warns(RuntimeWarning, match="no writable cache directory"):
        assert find(monkeypatch, temporary=tmp_path) is None
    assert kind == "file" or list(private.iterdir()) == []


def test_no_writable_place_at_all(project):
    """Not even a temporary directory: it works, with one warning."""
    project.write("start.py", "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']\n"
                  "import runpy\nrunpy.run_path('main.py', run_name='__main__')\n")
    before = sorted(project.folder.rglob("*"))
    nowhere = {"NUMBA_CACHE_DIR": "/dev/null/a", "XDG_CACHE_HOME": "/dev/null/b", "HOME": "/proc/nowhere",
               "PYTHONDONTWRITEBYTECODE": "1"}
    for _ in range(2):
        words, errors = project.run("-W", "always", "start.py", **nowhere)
        assert [int(word) for word in words] == [SUM, 1, 0, 200001, 1, 0]
        assert errors.count("Warning") == errors.count("no writable cache directory") == 1
    assert sorted(project.folder.rglob("*")) == before


def test_code_typed_at_a_prompt_works(project):
    script = "from ixy_numba import kernel\n@kernel\ndef twice(x):\n    return 2 * x\nprint(twice(21))\n"
    assert project.run("-c", script)[0] == ["42"]


# ---- files that are damaged, missing or cannot be written

def files(project):
    return sorted(project.cache.rglob("*.nbc"))


def test_a_damaged_file_costs_a_compilation(project):
    project.numbers()
    for what, damage in {
            "empty": lambda data: b"", "one byte short": lambda data: data[:-1],
            "a flipped bit": lambda data: data[:2000] + bytes([data[2000] ^ 64]) + data[2001:]}.items():
        for path in files(project):
            path.write_bytes(damage(path.read_bytes()))
        assert project.numbers() == [SUM, 1, 0, 200001, 1, 0], what
    assert project.numbers() == [SUM, 1, 1, 200001, 1, 1]


def test_a_file_of_another_kernel_is_not_run(project):
    """As after a copy gone wrong: whole, but of another signature."""
    project.numbers()
    names = {path: path.name for path in files(project)}
    (work,) = (path for path, name in names.items() if "work" in name)
    (helper,) = (path for path, name in names.items() if "add_limit" in name)
    shutil.copy(helper, work)
    assert project.numbers() == [SUM, 1, 0, 200001, 1, 1]


def test_a_full_disk_only_warns(project):
    limit = ("import resource, runpy\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
             "runpy.run_path('main.py', run_name='__main__')\n")
    project.write("limited.py", limit)
    words, errors = project.run("limited.py")
    assert [int(word) for word in words] == [SUM, 1, 0, 200001, 1, 0]
    assert errors.count("cannot save compiled kernels in") == 1 and "File too large" in errors
    assert not any(path.is_file() for path in project.cache.rglob("*"))  # no fragments
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100


def test_a_directory_that_lets_nothing_be_removed_only_warns(project):
    """As one of another user's does, and for every user one that is a file by now."""
    project.write("replaced.py", "import runpy\nfrom ixy_numba.core.jit import cache_directory\n"
                  "cache_directory().rmdir()\ncache_directory().touch()\n"
                  "runpy.run_path('main.py', run_name='__main__')\n")
    words, errors = project.run("replaced.py")
    assert [int(word) for word in words] == [SUM, 1, 0, 200001, 1, 0]
    assert errors.count("cannot save compiled kernels in") == 1 and "Not a directory" in errors


def test_processes_that_save_at_once(project):
    """Each compiles for another type at the same time; none gets the other's code."""
    project.write("many.py", """
import sys, numpy as np
from ixy_numba import kernel
from ixy_numba.core.jit import compiled_signatures
@kernel
def total(a):
    s = a[0]
    for x in a:
        s += x
    return s
print(float(total(np.arange(10).astype(sys.argv[1]))), *compiled_signatures(total))
""")
    kinds = ["u4", "i8", "f8"]
    environment = {**os.environ, "PYTHONPATH": str(project.folder), "NUMBA_CACHE_DIR": str(project.cache)}
    for hits in (0, 1):
        running = [subprocess.Popen([sys.executable, "many.py", kind], cwd=project.folder, env=environment, text=True,
                                    stdout=subprocess.PIPE) for kind in kinds]
        outputs = [process.communicate(timeout=300)[0].split() for process in running]
        assert outputs == [["45.0", "1", str(hits)]] * 3
    assert len(files(project)) == 3 and not list(project.cache.rglob("*.tmp*"))


# ---- handlers

HANDLER = """
import time
from typing import NamedTuple
import numpy as np
from tinynic import attach
from ixy_numba import Forwarder, Pool, handler
from ixy_numba.core.jit import compiled_signatures
from ixy_numba.datapath import forward_loop

class State(NamedTuple):
    seen: np.ndarray
    total: np.ndarray

@handler
def count(packet, state):
    state.seen[0] += 1
    state.total[0] += packet[0] + 0
    return 0

pool = Pool(128)
device, nic = attach(pool)
state = State(np.zeros(1, np.int64), np.zeros(1, np.int64))
for k in range(3):
    nic.receive(bytes([k + 1] * 60))
with Forwarder([device], count, state=state, packets=3) as forwarder:
    while not forwarder.finished:
        forwarder.check()
        time.sleep(0.01)
device.close()
print(*state.seen, *state.total, *compiled_signatures(forward_loop))
"""


@compiled_only
def test_a_second_start_does_not_compile_a_handler_again(project):
    project.write("one.py", HANDLER)
    assert project.numbers("one.py") == [3, 6, 1, 0]
    assert project.numbers("one.py") == [3, 6, 1, 1]
    project.edit("one.py", "packet[0] + 0", "packet[0] + 1")
    assert [project.numbers("one.py") for _ in range(2)] == [[3, 9, 1, 0], [3, 9, 1, 1]]


# ---- the other mode

@compiled_only
def test_everything_runs_interpreted():
    """The tests of kernels once more with NUMBA_DISABLE_JIT=1; an overflow that machine code would hide is an error."""
    names = ["test_mmio.py", "test_pool.py", "test_packet.py", "test_handler.py", "test_verbs.py",
             "test_virtio.py", "test_safety_virtio.py"]
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider",
         *(str(TESTS / name) for name in names)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "IXY_NUMBA_NO_SKIP": ""})  # what is about machine code is skipped
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout)


def test_kernels_are_plain_functions_when_interpreted():
    script = "from ixy_numba import kernel, resize\nprint(type(resize).__name__, type(kernel(lambda x: x)).__name__)"
    words = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
                           env={**os.environ, "NUMBA_DISABLE_JIT": "1"}).stdout.split()
    assert words == ["function", "function"]
