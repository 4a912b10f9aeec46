"""The fingerprint of a kernel: a hash of its code and of all that this refers to, in whatever module."""

import dis
import functools
import hashlib
import inspect
import sys
import types as pytypes
import warnings
from enum import Enum, EnumType
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.dispatcher import Dispatcher
from numba.core.typing.templates import builtin_registry

PACKAGE = Path(__file__).resolve().parent.parent
UNKNOWN = "<unknown>"  # in a fingerprint: what it is of must not be kept on disk
_VERSIONED = ("numpy", "math", "numba", "llvmlite")  # their versions tell what is in them
_NAMED = (*_VERSIONED, PACKAGE.name)  # functions that a name tells: the cache hashes all of our own sources
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


def fingerprint(function):
    """Hash of a function's code and of everything that its globals and closure bring into the compiled result.

    An object that nothing is known of could change without a trace: then there is UNKNOWN in it, and a warning.
    """
    digest = _Digest()
    try:
        digest.value(function)
    except _Unknown as unknown:
        warn(f"{function.__qualname__} is compiled anew at each start: it refers to {unknown}, a change of which would "
             "not be seen; pass it as an argument")
        return f"{UNKNOWN}{id(function)}"
    return digest.sha.hexdigest()[:32]


def module_of(function):
    """The name that a function's module is imported by, also where `python -m` runs it as `__main__`."""
    return _imported_as(function.__module__)


def _imported_as(name):
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if name == "__main__" and spec is not None else name


def _root(value):
    """The outermost package that a module, or a function's code, is in: `functools.wraps` lies in `__module__`."""
    names = vars(value) if isinstance(value, pytypes.ModuleType) else value.__globals__
    return (_imported_as(names.get("__name__")) or "").partition(".")[0]


def describe(kind):
    """A Numba type in words that are the same in every process."""
    parts, python_class = [str(kind)], getattr(kind, "instance_class", None)
    if python_class is not None:
        parts.append(f"{python_class.__module__}.{python_class.__qualname__}{getattr(python_class, '_fields', '')}")
    if isinstance(kind, types.BaseTuple):
        parts += map(describe, kind.types)
    return " ".join(parts)


@functools.cache  # once each: Numba resets what Python's own filter remembers
def warn(message):
    warnings.warn(f"ixy_numba: {message}", RuntimeWarning, stacklevel=3)


class _Unknown(Exception):
    """What a kernel refers to that could change without a trace."""


class _Digest:
    """Everything goes in with its type and its length: no two different things may look the same."""

    def __init__(self):
        self.sha, self.functions = hashlib.sha256(), {}  # functions: in the order they were met
        self.overloads = [each for each in builtin_registry.functions  # users'; what Numba generates has no module
                          if hasattr(each, "_overload_func") and _root(each._overload_func) not in ("", *_NAMED)]

    def words(self, *words):
        for word in words:
            data = word if isinstance(word, bytes) else str(word).encode()
            self.sha.update(b"%d:" % len(data) + data)

    def values(self, what, *values):
        self.words(what, len(values))
        for value in values:
            self.value(value)

    def value(self, value):
        for overload in [each for each in self.overloads if each.key is value]:
            self.values("overload", overload._overload_func, overload._jit_options)
        if isinstance(value, Dispatcher):
            self.values("options", value.targetoptions)
        # a kernel, an intrinsic or a handler stands for its source; what users wrap may hold more than that
        value = inspect.unwrap(value, stop=lambda each: type(each).__module__.partition(".")[0] not in _NAMED)
        if isinstance(value, pytypes.FunctionType):
            self.function(value)
        elif type(value) in _PLAIN:
            self.words(type(value).__name__, repr(value))
        elif isinstance(value, type):
            self.type(value)
        elif isinstance(value, Enum):
            self.values("member", type(value), value.name, value.value)
        elif isinstance(value, (tuple, list)):
            self.values("sequence", type(value), *value)
        elif isinstance(value, (set, frozenset)):
            self.values("set", type(value), *sorted(value, key=repr))
        elif isinstance(value, (dict, pytypes.MappingProxyType)):
            self.values("mapping", type(value), *value.items())
        elif isinstance(value, functools.partial):
            self.values("partial", value.func, value.args, value.keywords)
        elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            self.values("array", type(value), value.dtype, value.shape, value.strides, value.tobytes())
        elif isinstance(value, np.dtype):
            self.words("dtype", repr(value))
        elif isinstance(value, ir.IntType):
            self.words("llvm", value)
        elif isinstance(value, types.Type):
            self.words("numba", type(value).__qualname__, describe(value))
        elif isinstance(value, pytypes.ModuleType):
            self.words("module", value.__name__, getattr(value, "__version__", ""))
        elif isinstance(value, pytypes.BuiltinFunctionType):
            self.values("builtin", value.__qualname__, value.__self__)
        elif isinstance(value, np.ufunc):
            self.words("ufunc", value.__name__)
        else:
            raise _Unknown(f"an object of {type(value).__module__}.{type(value).__qualname__}")

    def type(self, value):
        if hasattr(value, "class_type"):
            raise _Unknown("a jitclass")  # its methods are compiled as well
        self.words("class", value.__module__, value.__qualname__)
        if isinstance(value, EnumType):
            self.values("members", *((name, member.value) for name, member in value.__members__.items()))
        if issubclass(value, tuple) and hasattr(value, "_fields"):
            self.values("fields", value._fields, value._field_defaults)

    def function(self, function):
        if function in self.functions:
            self.words("function", self.functions[function])
            return
        self.functions[function] = len(self.functions)
        cells = inspect.getclosurevars(function).nonlocals
        self.values("closure", *cells.values())
        if _root(function) not in _VERSIONED:
            self.values("defaults", function.__defaults__, function.__kwdefaults__)
        if _root(function) in _NAMED and len(self.functions) > 1:
            self.words(function.__module__, function.__qualname__)
        else:
            self.code(function.__code__, {**function.__globals__, **cells})

    def code(self, code, variables):
        self.words(code.co_code, code.co_exceptiontable, code.co_flags, code.co_argcount, code.co_posonlyargcount,
                   code.co_kwonlyargcount, len(code.co_consts))
        self.values("names", code.co_varnames, code.co_cellvars, code.co_freevars, code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, pytypes.CodeType):
                self.code(constant, variables)
            else:
                self.value(constant)
        read = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF")}
        scopes, entered = [{name: variables[name] for name in sorted(read) if name in variables}], set()
        names = dict.fromkeys((*code.co_names, *code.co_freevars))
        for scope in scopes:  # which grows: `helpers.limits.MAX` has all three of its names in co_names
            for value in [scope[name] for name in names if name in scope]:
                if isinstance(value, pytypes.ModuleType) and _root(value) not in _VERSIONED and value not in entered:
                    entered.add(value)
                    scopes.append(vars(value))
        for name in names:
            self.values(name, *[scope[name] for scope in scopes if name in scope])
