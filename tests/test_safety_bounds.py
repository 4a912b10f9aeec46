"""Array bounds in kernels: every index at its edges, and none that counts from the end."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unprotected import outcomes, outcomes_without

from ixy_numba import kernel
from ixy_numba.core.jit import INTERPRETED, PROTECTED
from ixy_numba.core.mmio import load_acquire, prefetch, store_release

compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")
checked_only = pytest.mark.skipif("memory_bounds" not in PROTECTED, reason="bounds are not checked in this mode")
pytestmark = [compiled_only, checked_only, pytest.mark.safety("memory_bounds")]
U, I64 = np.uint64, np.int64
SIGNED = [np.int8, np.int32, np.int64]
KINDS = [*SIGNED, np.uint8, np.uint32, np.uint64]
SIZE = 5
RECORD = np.dtype([("before", "u8"), ("values", "i8", (SIZE,)), ("pairs", [("a", "u4"), ("b", "u4")], (SIZE,)),
                   ("after", "u8")])


def indices(kind):
    low, high = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    edges = [n for n in (low, -SIZE - 1, -SIZE, -2, -1, 0, 1, SIZE - 1, SIZE, SIZE + 1, high) if low <= n <= high]
    return st.one_of(st.sampled_from(edges), st.integers(low, high)).map(kind)


def outcome(function, *args):
    try:
        return function(*args)
    except IndexError:
        return IndexError


@kernel
def get(array, i):
    return array[i]


@kernel
def put(array, i, value):
    array[i] = value


@kernel
def add(array, i, value):
    array[i] += value


@kernel
def get_field(record, i):
    return record.values[i]


@kernel
def put_field(record, i, value):
    record.values[i] = value


@kernel
def get_pair(record, i):
    return record.pairs[i].b


@kernel
def put_pair(record, i, value):
    record.pairs[i].b = value


@kernel
def acquire(array, i):
    return load_acquire(array, i)


@kernel
def release(array, i, value):
    store_release(array, i, value)


@kernel
def touch(array, i):
    prefetch(array, i)
    return 0


def arrays():
    """The middle of a larger array, contiguous and not: (whole, part)."""
    whole = np.arange(4 * SIZE)
    yield whole, whole[SIZE : 2 * SIZE]
    whole = np.arange(4 * SIZE)
    yield whole, whole[SIZE : 3 * SIZE : 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [get, put, add, acquire, release, touch], ids=lambda kernel: kernel.__name__)
def test_arrays(function, kind):
    @given(indices(kind))
    def check(i):
        for whole, part in arrays():
            before, value = whole.copy(), [I64(77)] * (function in (put, add, release))
            found = outcome(function, part, i, *value)
            assert (found is IndexError) == (not 0 <= i < SIZE)
            if function in (get, acquire) and found is not IndexError:
                assert found == part[i]
            changed = np.flatnonzero(whole != before)
            assert len(changed) == (len(value) if found is not IndexError else 0)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_fields_of_records(kind):
    @given(indices(kind))
    def check(i):
        record = np.zeros(1, RECORD).view(np.recarray)[0]
        record.values[:], record.pairs["b"] = range(SIZE), range(SIZE)
        before, good = record.tobytes(), 0 <= i < SIZE
        assert outcome(get_field, record, i) == outcome(get_pair, record, i) == (i if good else IndexError)
        assert outcome(put_field, record, i, 7) == outcome(put_pair, record, i, 7) == (None if good else IndexError)
        assert (record.tobytes() != before) == good

    check()


@pytest.mark.parametrize("kind", SIGNED)
def test_two_dimensions(kind):
    grid = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)

    @given(indices(kind), indices(np.int64))
    def check(i, j):
        good = 0 <= i < SIZE and 0 <= j < SIZE
        assert outcome(get, grid, (i, j)) == (grid[i, j] if good else IndexError)
        assert outcome(put, grid.copy(), (i, j), 7) == (None if good else IndexError)

    check()


ENDS = st.one_of(st.none(), st.integers(-SIZE - 1, SIZE + 1), st.sampled_from([-(1 << 63) + 1, (1 << 63) - 2]))


@given(ENDS, ENDS, st.sampled_from([None, 1, 2, -1, -2]))
def test_slices(start, stop, step):
    """Cut off at the array's end as in Python; a negative end is refused."""
    array, part = np.arange(SIZE), slice(start, stop, step)
    good = (start is None or start >= 0) and (stop is None or stop >= 0)
    found = outcome(get, array, part)
    if good:
        assert found.tolist() == array[part].tolist()
    else:
        assert found is IndexError
    assert outcome(put, array.copy(), part, 7) == (None if good else IndexError)
    assert outcome(put, np.zeros((2, SIZE)), (1, part), 7.0) == (None if good else IndexError)


ARRAY = np.arange(SIZE)


# ---- what the protection is for: all of these stay inside of memory that is there


VIOLATIONS = {
    "negative": lambda: int(get(ARRAY, -1)),
    "beyond": lambda: int(get(ARRAY[: SIZE - 2], SIZE - 1)),
    "put": lambda: put(ARRAY.copy()[: SIZE - 2], SIZE - 1, 7),
    "negative in a record": lambda: int(get_field(np.ones(1, RECORD).view(np.recarray)[0], -1)),
    "two dimensions": lambda: int(get(ARRAY.reshape(1, SIZE), (0, -1))),
    "slice": lambda: get(ARRAY, slice(-2, SIZE)).tolist(),
    "constant": lambda: int(kernel(lambda x: x[-1])(ARRAY)),
    "index array": lambda: kernel(lambda x: x[x])(ARRAY).tolist(),
    "ordered": lambda: int(acquire(ARRAY[: SIZE - 2], SIZE - 1)),
}


def test_without_the_protection_nobody_notices():
    assert set(outcomes(VIOLATIONS).values()) == {"IndexError", "UnsupportedError"}
    assert outcomes_without("test_safety_bounds", "memory_bounds") == {
        "negative": "4", "beyond": "4", "put": "None", "negative in a record": "1", "two dimensions": "4",
        "slice": "[3, 4]", "constant": "4", "index array": "[0, 1, 2, 3, 4]", "ordered": "4"}


def test_each_protection_is_alone():
    """Without bounds integers are still checked, and the other way round; without both, callees may be anything."""
    for module, other in (("test_safety_overflow", "memory_bounds"), ("test_safety_bounds", "integer_overflow")):
        found = outcomes_without(module, other)
        assert set(found.values()) <= {"OverflowError", "'OverflowError'", "IndexError", "UnsupportedError"}, found
