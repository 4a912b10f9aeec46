"""`kernel`, the one decorator for compiled code, and the JIT cache that does not run stale code.

Numba keys a cached function by its own bytecode only: an edited helper in another module, or another compile mode,
silently runs the old machine code. Here the cache directory is named by the mode and a hash of every source of this
package, and kernels from elsewhere are keyed by a fingerprint of all that they reference as well (`core.fingerprint`).
"""

import contextlib
import functools
import hashlib
import io
import os
import pickle
import re
import stat
import sys
import tempfile
import threading
from pathlib import Path

import numba
import numpy as np
from numba.core import caching, config, serialize, sigutils
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher

from . import checked
from .errors import UsageError
from .fingerprint import PACKAGE, UNKNOWN, describe, fingerprint, module_of, warn

PROTECTIONS = ("memory_bounds", "memory_use_after_free", "packet_bounds", "packet_use_after_free", "integer_overflow")


def _chosen():
    """(mode, protections): IXY_NUMBA_MODE, less what IXY_NUMBA_WITHOUT leaves out for tests and measurements."""
    mode, without = os.environ.get("IXY_NUMBA_MODE", "checked"), os.environ.get("IXY_NUMBA_WITHOUT", "")
    left_out = set(filter(None, without.split(",")))
    message = None
    if mode not in ("checked", "fast"):
        message = f"IXY_NUMBA_MODE is {mode!r}: expected 'checked' (the default) or 'fast'"
    elif not left_out <= set(PROTECTIONS):
        message = f"IXY_NUMBA_WITHOUT is {without!r}: expected names from {', '.join(PROTECTIONS)}, separated by commas"
    if message and sys.argv[:1] == ["-m"]:  # `python -m ixy_numba.fwd` is importing us: nobody is there to catch it
        print(f"error: {message}", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    if message:
        raise UsageError(message)
    return mode, frozenset() if mode == "fast" else frozenset(PROTECTIONS) - left_out


MODE, PROTECTED = _chosen()  # PROTECTED: what the kernels are compiled to check
CHECKED = MODE == "checked"
INTERPRETED = bool(config.DISABLE_JIT)  # NUMBA_DISABLE_JIT=1: every kernel is a plain Python function
# What all compiled code is compiled with: kernels, and the `jit_options` of overloads.
OPTIONS = {"boundscheck": "memory_bounds" in PROTECTED,
           "pipeline_class": checked.pipeline("integer_overflow" in PROTECTED, "memory_bounds" in PROTECTED)}


def kernel(function=None, *, inline=False):
    """Compile `function` with Numba: without the GIL, cached on disk, every index and integer operation checked.

    IndexError and OverflowError are what the checks raise (`core.checked` says when); `core.integers` has operations
    that are meant to wrap. IXY_NUMBA_MODE=fast compiles the checks out. `inline=True` forces the body into its callers
    (the steps of a loop); leave it off for whatever is called once a batch. Usable on any module-level function, the
    user's own included.
    """
    if function is None:
        return functools.partial(kernel, inline=inline)
    if INTERPRETED:
        return function
    compiled = numba.njit(nogil=True, forceinline=inline, **OPTIONS)(function)
    cache = _cache_for(function, inline)
    if cache is not None:
        compiled._cache = cache
    return compiled


@functools.cache
def cache_directory():
    """Where compiled kernels are kept, or None where nothing is writable.

    The first writable of $NUMBA_CACHE_DIR, $XDG_CACHE_HOME, ~/.cache, then a private directory under the temporary
    one. Numba's own settings are left alone.
    """
    digest = hashlib.sha256()
    for source in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(source.relative_to(PACKAGE)).encode() + source.read_bytes())
    digest.update(" ".join(sorted(PROTECTED)).encode())
    leaf = f"{MODE}-{'boundscheck-' if config.BOUNDSCHECK else ''}{digest.hexdigest()[:16]}"
    places = (config.CACHE_DIR and os.path.abspath(config.CACHE_DIR), os.environ.get("XDG_CACHE_HOME", ""),
              os.path.expanduser("~/.cache"))
    for root in filter(os.path.isabs, places):
        found = _writable(Path(root) / "ixy_numba" / leaf)
        if found:
            return found
    # Cached code is executed: in a shared place only a directory that is ours and closed to others will do.
    with contextlib.suppress(FileNotFoundError):  # gettempdir: not even a temporary directory
        private = Path(tempfile.gettempdir()) / f"ixy_numba-{os.getuid()}"
        if _writable(private):
            info = private.lstat()
            if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077:
                return _writable(private / leaf)
    warn("no writable cache directory, kernels are compiled anew at each start; set NUMBA_CACHE_DIR to a writable "
         "directory")
    return None


def _writable(path):
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError:
        return None
    return path


def _cache_for(function, inline):
    if not os.path.exists(function.__code__.co_filename) or cache_directory() is None:
        return None  # typed at a prompt: nothing on disk to key by
    return _KernelCache(function, inline)


class _KernelCache(caching.NullCache):
    """The machine code of one kernel: a file a version, named by a hash of all that went into it.

    Numba's own cache keeps an index a function instead. Two processes that save at once can mix its entries up, and it
    cannot be read where one entry's types cannot be imported, as those of another application's handler.
    """

    def __init__(self, function, inline):
        self._function, self._inline = function, inline

    @property
    def cache_path(self):
        return str(cache_directory())

    def _path(self, signature, target_context):
        """The file of one version; None if it must not be kept."""
        function = self._function
        parts = [numba.__version__, np.__version__, sys.version, target_context.codegen().magic_tuple(),
                 fingerprint(function), self._inline, os.path.abspath(function.__code__.co_filename),
                 function.__code__.co_firstlineno,
                 [describe(kind) for kind in sigutils.normalize_signature(signature)[0]]]
        if UNKNOWN in repr(parts):  # the kernel's own, or that of a handler among the arguments
            return None
        name = re.sub(r"[^\w.]", "", f"{module_of(function)}.{function.__qualname__}")[:100]
        return cache_directory() / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.nbc"

    def load_overload(self, sig, target_context):
        target_context.refresh()
        try:
            data = self._path(sig, target_context).read_bytes()
            digest, payload = data[:32], data[32:]
            if hashlib.sha256(payload).digest() != digest:
                return None
            loaded = CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # absent or not to be used: that must cost a compilation, not the run
            return None
        return loaded if loaded.signature.args == sigutils.normalize_signature(sig)[0] else None

    def save_overload(self, sig, data):
        if data.library.has_dynamic_globals:
            warn(f"{self._function.__qualname__} is compiled anew at each start: it uses pointers or large global "
                 "arrays; pass them as arguments")
            return
        path = self._path(sig, data.target_context)
        if path is None:
            return
        fresh = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            payload = _dumps(data._reduce())
            fresh.write_bytes(hashlib.sha256(payload).digest() + payload)
            fresh.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):  # a directory that another user owns
                fresh.unlink(missing_ok=True)
            warn(f"cannot save compiled kernels in {cache_directory()}: {error.strerror}")


class _Pickler(serialize.NumbaPickler):
    """Numba's, but a script's own classes go by name, so that the next process finds its own class there."""

    def reducer_override(self, obj):
        if isinstance(obj, type) and vars(sys.modules["__main__"]).get(obj.__qualname__) is obj:
            return obj.__qualname__
        return super().reducer_override(obj)


def _dumps(value):
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()


def compiled_signatures(function):
    """How many versions of a kernel are in memory, and how many of them came from disk: (versions, from_disk)."""
    if not isinstance(function, Dispatcher):
        return 0, 0
    return len(function.signatures), sum(function.stats.cache_hits.values())
