"""`kernel`, the one decorator for compiled code, and the JIT cache that can never run stale code.

Numba keys a cached function by its own bytecode only: an edited helper in another module, or another compile mode,
silently runs the old machine code. Here the cache directory is named by the mode and a hash of every source of this
package, and kernels from elsewhere are keyed by a fingerprint of all that they reference as well.
"""

import functools
import hashlib
import os
import stat
import tempfile
import types as pytypes
import warnings
from pathlib import Path

import numba
import numpy as np
from numba.core import caching, config
from numba.core.dispatcher import Dispatcher

from .errors import UsageError

MODE = os.environ.get("IXY_NUMBA_MODE", "checked")
if MODE not in ("checked", "fast"):
    raise UsageError(f"IXY_NUMBA_MODE is {MODE!r}: expected 'checked' (the default) or 'fast'")
CHECKED = MODE == "checked"
INTERPRETED = bool(config.DISABLE_JIT)  # NUMBA_DISABLE_JIT=1: every kernel is a plain Python function

PACKAGE = Path(__file__).resolve().parent.parent


def kernel(function=None, *, inline=False):
    """Compile `function` with Numba: without the GIL, cached on disk, every array index checked.

    IXY_NUMBA_MODE=fast compiles the checks out. `inline=True` forces the body into its callers (the steps of a
    loop); leave it off for whatever is called once a batch. Usable on any module-level function, the user's own
    included.
    """
    if function is None:
        return functools.partial(kernel, inline=inline)
    if INTERPRETED:
        return function
    compiled = numba.njit(nogil=True, boundscheck=CHECKED, forceinline=inline)(function)
    cache = _cache_for(function)
    if cache is not None:
        compiled._cache = cache
    return compiled


def fingerprint(function):
    """Hash of a function's code and of everything that its globals and closure bring into the compiled result."""
    digest = hashlib.sha256()
    _absorb(digest, function, set())
    return digest.hexdigest()[:32]


def _absorb(digest, value, seen):
    value = getattr(value, "py_func", value)  # a compiled kernel stands for its source
    if isinstance(value, pytypes.FunctionType):
        if id(value) in seen or _is_ours(value):
            return
        seen.add(id(value))
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        _absorb_code(digest, value.__code__, value.__globals__, seen)
        for part in [*cells, *(value.__defaults__ or ())]:
            _absorb(digest, part, seen)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, (tuple, list, frozenset)):
        for part in sorted(value, key=repr) if isinstance(value, frozenset) else value:
            _absorb(digest, part, seen)
    elif isinstance(value, (type, pytypes.ModuleType, pytypes.BuiltinFunctionType)):
        digest.update(f"{value.__name__}{getattr(value, '__version__', '')}".encode())
    elif isinstance(value, (int, float, complex, str, bytes, np.generic, np.dtype, type(None), type(Ellipsis))):
        digest.update(f"{type(value).__name__}{value!r}".encode())
    else:
        digest.update(f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _absorb_code(digest, code, names, seen):
    digest.update(code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, pytypes.CodeType):
            _absorb_code(digest, constant, names, seen)
        else:
            _absorb(digest, constant, seen)
    modules = [names[name] for name in code.co_names if isinstance(names.get(name), pytypes.ModuleType)]
    own = [module for module in modules if module.__name__.split(".")[0] not in ("numpy", "math", "numba")]
    for name in code.co_names:
        digest.update(name.encode())
        if name in names:
            _absorb(digest, names[name], seen)
        for module in own:  # helpers.LIMIT: the attribute's name stands in co_names too
            if hasattr(module, name):
                _absorb(digest, getattr(module, name), seen)


def _is_ours(function):
    return function.__module__ is not None and function.__module__.split(".")[0] == PACKAGE.name


@functools.cache
def cache_directory():
    """Where compiled kernels are kept, or None where nothing is writable.

    The first writable of $NUMBA_CACHE_DIR, $XDG_CACHE_HOME, ~/.cache, then a private directory under the temporary
    one. Numba's own settings are left alone.
    """
    digest = hashlib.sha256()
    for source in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(source.relative_to(PACKAGE)).encode() + source.read_bytes())
    leaf = f"{MODE}-{'boundscheck-' if config.BOUNDSCHECK else ''}{digest.hexdigest()[:16]}"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for root in filter(os.path.isabs, (config.CACHE_DIR and os.path.abspath(config.CACHE_DIR), home)):
        found = _writable(Path(root) / "ixy_numba" / leaf)
        if found:
            return found
    # Cached code is executed: in a shared place only a directory that is ours and closed to others will do.
    private = Path(tempfile.gettempdir()) / f"ixy_numba-{os.getuid()}"
    if _writable(private):
        info = private.lstat()
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077:
            return _writable(private / leaf)
    warnings.warn("ixy_numba: no writable cache directory, kernels are compiled anew at each start; "
                  "set NUMBA_CACHE_DIR to a writable directory", RuntimeWarning, stacklevel=2)
    return None


def _writable(path):
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError:
        return None
    return path


def _cache_for(function):
    if not os.path.exists(function.__code__.co_filename) or cache_directory() is None:
        return None  # typed at a prompt: nothing on disk to key by
    return _KernelCache(function)


class _Locator:
    """Where one function's machine code lies (the part of Numba's locator protocol that its cache uses)."""

    def __init__(self, function):
        self._py_file = function.__code__.co_filename
        where = f"{os.path.abspath(self._py_file)}:{function.__code__.co_firstlineno}"
        self._disambiguator = hashlib.sha256(where.encode()).hexdigest()[:12]

    def get_cache_path(self):
        return str(cache_directory())

    def get_source_stamp(self):
        return None  # the directory's name and the index key say it all

    def get_disambiguator(self):
        return self._disambiguator

    def ensure_cache_path(self):
        pass

    @classmethod
    def from_function(cls, function, _file):
        return cls(function)


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _KernelCache(caching.FunctionCache):
    _impl_class = _Implementation

    def _index_key(self, sig, codegen):
        ours = _is_ours(self._py_func)
        return (*super()._index_key(sig, codegen), "" if ours else fingerprint(self._py_func))

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a damaged cache file must cost a compilation, not the run
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            warnings.warn(f"ixy_numba: cannot save compiled kernels in {cache_directory()}: {error.strerror}",
                          RuntimeWarning, stacklevel=2)
            self.disable()


def compiled_signatures(function):
    """How many versions of a kernel are in memory, and how many of them came from disk: (versions, from_disk)."""
    if not isinstance(function, Dispatcher):
        return 0, 0
    return len(function.signatures), sum(function.stats.cache_hits.values())
