"""What cannot be checked is refused when a kernel is compiled, by name and line."""

import re

import numba
import numpy as np
import pytest

from ixy_numba import kernel
from ixy_numba.core.jit import INTERPRETED, OPTIONS, PROTECTED

compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")
checked_only = pytest.mark.skipif(not {"integer_overflow", "memory_bounds"} <= PROTECTED,
                                  reason="this mode lets through what cannot be checked")
pytestmark = [compiled_only, checked_only]
U = np.uint64


@numba.njit
def plain(x):
    return x + 1


def overloaded(x):
    return x


@numba.extending.overload(overloaded)
def _overloaded(x):
    return lambda x: x + 1


ARRAY, LAST, NUMBERS = np.ones(3, np.int64), -1, (U(1), 2)


def put_last(array):
    array[-1] = 7


def put_constant(array):
    array[LAST] = 7


def raises(number):
    raise ValueError(number)


REFUSED = [  # (function, argument, why)
    (lambda x: plain(x), 1, "plain is compiled without checks: decorate it with @kernel"),
    (lambda x: overloaded(x), 1, "overloaded of int64 is not checked"),
    (lambda x: x**2, 3, "pow of int64, int64 is not checked"),
    (lambda x: sum(x), (1, 2), "sum of int64, int64 is not checked"),
    (lambda x: np.sum(x), ARRAY, "sum of array(int64, 1d, C) is not checked"),
    (lambda x: x.sum(), ARRAY, "sum of array(int64, 1d, C) is not checked"),
    (lambda x: x.astype(np.uint8), ARRAY, "array.astype of array(int64, 1d, C), class(uint8) is not checked"),
    (lambda x: x + x, ARRAY, "arithmetic on a whole array of integers is not checked"),
    (lambda x: round(x), 1.5, "round of float64 is not checked"),
    (lambda x: hash(x), 1, "hash of int64 is not checked"),
    (lambda x: min(x[0], x[1]), NUMBERS, "min of uint64, int64 would be a float64"),
    (lambda x: x[-1], ARRAY, "index -1 would count from the end of the array"),
    (lambda x: x[1:-2], ARRAY, "index -2 would count from the end of the array"),
    (lambda x: x[-3:], ARRAY, "index -3 would count from the end of the array"),
    (lambda x: x[x], ARRAY, "an array as an index is not checked"),
    (lambda x: x.flat[2], ARRAY, "array.flat is not checked"),
    (put_last, ARRAY, "index -1 would count from the end of the array"),
    (put_constant, ARRAY, "index -1 would count from the end of the array"),
    (raises, 1, "an exception with a run-time argument leaks memory when it is caught: use a constant message"),
]


@pytest.mark.parametrize("function, argument, why", REFUSED, ids=[why for _, _, why in REFUSED])
def test_refused(function, argument, why):
    with pytest.raises(numba.core.errors.NumbaError) as refusal:
        kernel(function)(argument)
    text, line = str(refusal.value), function.__code__.co_firstlineno
    assert f"\n{why}" in text and re.search(rf'test_safety_refusals.py", line ({line}|{line + 1}):', text)


def closure(x):
    def twice(y):
        return y + y

    return twice(x) + max(x, 1)


def everyday(array, packet_length):
    """What kernels are made of goes on working."""
    total, best = 0, 0
    for k, (a, b) in enumerate(zip(array, array[1:])):  # noqa: B905 (Numba knows no strict)
        total += abs(min(a, b)) + int(isinstance(k, int)) + bool(a)
        best = max(best, a, b)
    inside = 1 if total in (3, 4) and not best else len(array)
    return total, best, inside, float(total), divmod(total, 2), -best, ~best, [n for n in range(3)], np.empty(2).size


def test_what_goes_on_working():
    assert kernel(closure)(5) == 15
    array = np.array([1, -2, 3])
    assert kernel(everyday)(array, 3) == everyday(array, 3)


def test_an_overload_can_be_checked():
    """As the package's own are, with the options that it compiles with."""
    numba.extending.overload(checked, jit_options=OPTIONS)(lambda x: lambda x: x + U(1))
    increment = kernel(lambda x: checked(x))
    assert increment(U(1)) == 2
    with pytest.raises(OverflowError):
        increment(U((1 << 64) - 1))


def checked(x):
    """Stands for the overload."""
