"""Integer overflow: every operation and conversion at its edges against Python's integers."""

import operator

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unprotected import outcomes, outcomes_without

from ixy_numba import Packet, kernel, truncate, wrapping_add, wrapping_mul, wrapping_sub
from ixy_numba.core.jit import INTERPRETED, PROTECTED
from ixy_numba.core.mmio import store_release

compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")
checked_only = pytest.mark.skipif("integer_overflow" not in PROTECTED, reason="overflow is not checked in this mode")
U, I64 = np.uint64, np.int64
KINDS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
LOW, HIGH, TOP = -(1 << 63), (1 << 63) - 1, (1 << 64) - 1
RECORD = np.dtype([("small", "u2"), ("signed", "i1"), ("nested", "u1", (4,)), ("wide", "u8")])
pytestmark = pytest.mark.safety("integer_overflow")


def values(kind):
    """Numbers of a type, mostly near its ends, zero and the powers of two."""
    low, high = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    edges = [low, low + 1, -2, -1, 0, 1, 2, high // 2, high // 2 + 1, high - 1, high,
             *(1 << k for k in range(0, 64, 8)), *((1 << k) - 1 for k in range(8, 64, 8))]
    return st.one_of(st.sampled_from([n for n in edges if low <= n <= high]), st.integers(low, high)).map(kind)


def fits(number, kind):
    return np.iinfo(kind).min <= number <= np.iinfo(kind).max


def outcome(function, *args):
    try:
        return function(*args)
    except OverflowError:
        return OverflowError


# ---- arithmetic


@kernel
def add(a, b):
    return a + b


@kernel
def subtract(a, b):
    return a - b


@kernel
def multiply(a, b):
    return a * b


@kernel
def divide(a, b):
    return a // b


@kernel
def remainder(a, b):
    return a % b


@kernel
def both(a, b):
    return a & b


@kernel
def either(a, b):
    return a | b


@kernel
def shift_left(a, b):
    return a << b


@kernel
def shift_right(a, b):
    return a >> b


@kernel
def in_place(a, b):
    a += b
    return a


@kernel
def negate(a):
    return -a


@kernel
def magnitude(a):
    return abs(a)


PAIRS = [(np.uint64, np.uint64), (np.int64, np.int64), (np.uint64, np.int64), (np.int64, np.uint64),
         (np.uint8, np.int8), (np.int32, np.uint32), (np.uint16, np.uint16)]


@compiled_only
@checked_only
@pytest.mark.parametrize("kinds", PAIRS, ids=lambda kinds: f"{kinds[0].__name__}-{kinds[1].__name__}")
@pytest.mark.parametrize("function, exact", [
    (add, operator.add), (in_place, operator.add), (subtract, operator.sub), (multiply, operator.mul),
    (divide, operator.floordiv), (remainder, operator.mod), (both, operator.and_), (either, operator.or_)],
    ids=lambda value: value.__name__)
def test_arithmetic(function, exact, kinds):
    """The exact result if Numba's type for it (64 bits; signed if one of the two is) holds it and the operands."""
    result = I64 if any(np.issubdtype(kind, np.signedinteger) for kind in kinds) else U

    @given(values(kinds[0]), values(kinds[1]))
    def check(a, b):
        if exact in (operator.floordiv, operator.mod) and b == 0:
            return
        expected = exact(int(a), int(b))
        held = fits(expected, result) and (exact is operator.and_ or fits(int(a), result) and fits(int(b), result))
        assert outcome(function, a, b) == (expected if held else OverflowError)

    check()


@compiled_only
@checked_only
@pytest.mark.parametrize("kind", [np.uint64, np.int64, np.uint8, np.int32])
def test_shifts(kind):
    """An amount that is no bit of the (64-bit) result is refused; what is shifted out is dropped."""
    result = I64 if np.issubdtype(kind, np.signedinteger) else U

    @given(values(kind), st.one_of(st.integers(-2, 66), st.sampled_from([LOW, HIGH])).map(I64))
    def check(a, n):
        good = 0 <= n <= 63
        low = (int(a) << int(n) if good else 0) & TOP
        left = low - (TOP + 1 if result is I64 and low > HIGH else 0)
        assert outcome(shift_left, a, n) == (left if good else OverflowError)
        assert outcome(shift_right, a, n) == (int(a) >> int(n) if good else OverflowError)

    check()


@compiled_only
@checked_only
@pytest.mark.parametrize("kind", KINDS)
def test_negation_and_magnitude(kind):
    """Negation gives 64 bits, a magnitude the type that it is of."""
    result = I64 if np.issubdtype(kind, np.signedinteger) else U

    @given(values(kind))
    def check(a):
        assert outcome(negate, a) == (-int(a) if fits(-int(a), result) else OverflowError)
        assert outcome(magnitude, a) == (abs(int(a)) if fits(abs(int(a)), kind) else OverflowError)

    check()


# ---- conversions


def conversion(kind):
    @kernel
    def convert(value):
        return kind(value)

    return convert


CONVERT = {kind: conversion(kind) for kind in KINDS}


@compiled_only
@checked_only
@pytest.mark.parametrize("source", [np.uint64, np.int64, np.uint8, np.int32])
@pytest.mark.parametrize("kind", KINDS)
def test_conversion(kind, source):
    @given(values(source))
    def check(value):
        assert outcome(CONVERT[kind], value) == (int(value) if fits(int(value), kind) else OverflowError)

    check()


@compiled_only
@checked_only
@pytest.mark.parametrize("source", [np.float64, np.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_of_a_float(kind, source):
    """The fraction is cut off; what is then too large, and what is no number, is refused."""
    low, high = float(np.iinfo(kind).min), float(np.iinfo(kind).max)
    edges = [-np.inf, np.inf, np.nan, -0.5, -0.999, -1.0, low, low - 0.5, low - 1, high, high + 0.5, high + 1,
             *np.nextafter([low, low - 1, high, high + 1], -np.inf), *np.nextafter([low, high], np.inf)]

    @given(st.one_of(st.sampled_from(edges), st.floats(width=32)))
    def check(number):
        with np.errstate(over="ignore"):
            number = source(number)
        held = np.isfinite(number) and fits(int(number), kind)
        assert outcome(CONVERT[kind], number) == (int(number) if held else OverflowError)

    check()


@kernel
def store(record, array, where, value):
    if where == 0:
        record.small = value
    elif where == 1:
        record.signed = value
    elif where == 2:
        record.nested[1] = value
    elif where == 3:
        array[2] = value
    elif where == 4:
        array[0:3] = value
    elif where == 5:
        record["small"] = value
    elif where == 6:
        store_release(record, "small", value)
    elif where == 7:
        record.wide = value


@compiled_only
@checked_only
@pytest.mark.parametrize("source", [np.uint64, np.int64])
@pytest.mark.parametrize("where, kind", list(enumerate("uint16 int8 uint8 int16 int16 uint16 uint16 uint64".split())))
def test_stores(where, kind, source):
    """Into fields, nested arrays, elements, slices and ordered: what does not fit is refused, nothing is written."""
    @given(values(source))
    def check(value):
        record, array = np.zeros(1, RECORD).view(np.recarray)[0], np.zeros(4, np.int16)
        held = fits(int(value), np.dtype(kind).type)
        assert outcome(store, record, array, where, value) == (None if held else OverflowError)
        assert held or not any(record.tobytes()) and not array.any()
        if held:
            place = [record.small, record.signed, record.nested[1], array[2], array[1], record.small, record.small,
                     record.wide][where]
            assert int(place) == int(value)

    check()


@kernel
def unified(flag, narrow, wide):
    x = narrow
    if flag:
        x = wide
    return x


@kernel
def counted(n):
    total = 0
    for _ in range(n):
        total += 1
    return total


@kernel
def counted_between(start, stop, step):
    total = 0
    for _ in range(start, stop, step):
        total += 1
        if total > 3:
            break
    return total


@kernel
def numbered(array, start):
    total = 0
    for k, _ in enumerate(array, start):
        total ^= k
    return total


@compiled_only
@checked_only
def test_ranges_and_enumerations():
    assert unified(True, np.uint8(1), np.uint64(TOP)) == TOP
    assert counted(U(5)) == 5 and counted(-3) == 0
    with pytest.raises(OverflowError):
        counted(U(1 << 63))
    assert counted_between(HIGH - 2, HIGH, 1) == 2 and counted_between(LOW + 2, LOW, -1) == 2
    for start, stop, step in ((LOW, HIGH, 1), (-1, HIGH, 1), (HIGH, -1, -1), (1 << 62, -(1 << 62), -1)):
        with pytest.raises(OverflowError):
            counted_between(start, stop, step)
    assert numbered(np.zeros(2), 5) == 5 ^ 6 and numbered(np.zeros(3), -1) == -1 ^ 0 ^ 1
    with pytest.raises(OverflowError):
        numbered(np.zeros(2), HIGH)


# ---- meant to wrap


def wrapping(function):
    return kernel(lambda a, b: function(a, b))


def truncation(kind):
    return kernel(lambda value: truncate(value, kind))


WRAPPING = {wrapping(wrapping_add): operator.add, wrapping(wrapping_sub): operator.sub,
            wrapping(wrapping_mul): operator.mul}
TRUNCATE = {kind: truncation(kind) for kind in KINDS}


def wrapped(number, kind):
    width = 8 * np.dtype(kind).itemsize
    low = number % (1 << width)
    return low - (1 << width if low > np.iinfo(kind).max else 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kinds", PAIRS, ids=lambda kinds: f"{kinds[0].__name__}-{kinds[1].__name__}")
def test_wrapping(kinds):
    """Modulo the type of the first operand, compiled and in plain Python, without a warning."""
    @given(values(kinds[0]), values(kinds[1]))
    def check(a, b):
        for function, exact in WRAPPING.items():
            assert function(a, b) == wrapped(exact(int(a), int(b)), kinds[0])

    check()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_truncate(kind):
    @given(st.one_of(values(np.uint64), values(np.int64)))
    def check(value):
        assert TRUNCATE[kind](value) == wrapped(int(value), kind)

    check()
    assert isinstance(TRUNCATE[kind](U(1)), int if not INTERPRETED else kind)


@pytest.mark.filterwarnings("error")
def test_python_integers_are_64_bits_wide():
    add_wrapping = next(iter(WRAPPING))
    assert add_wrapping(HIGH, 1) == LOW and TRUNCATE[np.uint64](-1) == TOP


# ---- however it is called


@numba.njit(inline="always")
def inlined(x):
    return x + U(1)


@kernel
def calls_inlined(x):
    return inlined(x)


HALF = U(TOP // 2)


@kernel
def recursive(n):
    return HALF if n == U(0) else recursive(n - U(1)) + HALF


@compiled_only
@checked_only
def test_what_is_inlined_or_recursive_is_checked():
    assert calls_inlined(U(1)) == 2
    with pytest.raises(OverflowError):
        calls_inlined(U(TOP))
    assert recursive(U(1)) == TOP - 1
    with pytest.raises(OverflowError):
        recursive(U(2))


@kernel
def caught(a):
    try:
        a += U(1)
        kept = a
    except Exception:
        kept = U(7)
    return kept


@compiled_only
@checked_only
def test_an_overflow_is_caught_like_any_error():
    assert [caught(U(1)), caught(U(TOP))] == [2, 7]


# ---- what the protection is for


ARRAY = np.ones(3, np.int64)
VIOLATIONS = {
    "add": lambda: add(U(TOP), U(1)),
    "subtract": lambda: subtract(U(0), U(1)),
    "multiply": lambda: multiply(U(1 << 63), U(2)),
    "mixed": lambda: add(U(1 << 63), 1),
    "negate": lambda: negate(U(1)),
    "magnitude": lambda: magnitude(I64(LOW)),
    "divide": lambda: divide(I64(LOW), I64(-1)),
    "shift": lambda: shift_left(U(1), I64(64)) >= 0,  # whatever the processor makes of it
    "convert": lambda: CONVERT[np.uint8](I64(256)),
    "convert a float": lambda: CONVERT[np.uint8](256.0) >= 0,
    "store": lambda: [store(np.zeros(1, RECORD).view(np.recarray)[0], np.zeros(4, np.int16), where, U(1 << 16))
                      for where in range(7)],
    "packet": lambda: write_byte(Packet(np.zeros(4, np.uint8)), 256),
    "range": lambda: counted(U(1 << 63)),
    "caught": lambda: caught(U(TOP)) == 7 and "OverflowError",
    "array arithmetic": lambda: int(kernel(lambda x: x + x)(ARRAY)[0]),
    "power": lambda: kernel(lambda x: x**2)(1 << 32),
}


@kernel
def write_byte(packet, value):
    packet[0] = value
    return packet[0]


@compiled_only
@checked_only
def test_without_the_protection_nobody_notices():
    assert set(outcomes(VIOLATIONS).values()) <= {"OverflowError", "'OverflowError'", "UnsupportedError"}
    unnoticed = outcomes_without("test_safety_overflow", "integer_overflow")
    assert not {"OverflowError", "UnsupportedError"} & set(unnoticed.values())
    assert {name: unnoticed[name] for name in ("add", "subtract", "multiply", "mixed", "negate", "convert", "packet",
                                               "range", "caught", "power", "array arithmetic")} == {
        "add": "0", "subtract": str(TOP), "multiply": "0", "mixed": str(LOW + 1), "negate": str(TOP), "convert": "0",
        "packet": "0", "range": "0", "caught": "False", "power": "0", "array arithmetic": "2"}
