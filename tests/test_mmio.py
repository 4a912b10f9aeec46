"""Ordered access: the instructions on both machines, what it does, and what it refuses."""

import re
import threading

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba.core.errors import TypingError

from ixy_numba.core import mmio
from ixy_numba.core.jit import CHECKED, INTERPRETED, kernel
from ixy_numba.core.memory import new_record
from ixy_numba.core.mmio import (
    cycles,
    fence,
    fence_acquire,
    fence_release,
    load_acquire,
    pause,
    prefetch,
    store_doorbell,
    store_release,
)

U = np.uint64
I32, I64 = ir.IntType(32), ir.IntType(64)
MACHINES = ["x86_64", "aarch64"]
compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")


def assembly(machine, build, cpu=""):
    """Instructions, optimised, of `long probe(int *p, long *q, int v)` that `build(builder, p, q, v)` fills in."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = f"{machine}-unknown-linux-gnu"
    module = ir.Module()
    module.triple = triple
    kind = ir.FunctionType(I64, [I32.as_pointer(), I64.as_pointer(), I32])
    builder = ir.IRBuilder(ir.Function(module, kind, "probe").append_basic_block())
    result = build(builder, *builder.function.args)
    builder.ret(I64(ir.Undefined) if result is None else result)
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    lines = target.emit_assembly(parsed).split("probe:")[1].split(".Lfunc_end")[0].splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and ".p2align" not in line]


def position(lines, pattern):
    """The only line that matches."""
    found = [k for k, line in enumerate(lines) if re.search(pattern, line)]
    assert len(found) == 1, (pattern, lines)
    return found[0]


@pytest.mark.parametrize("machine, cpu, load", [
    ("x86_64", "", r"movl \(%rdi\)"), ("aarch64", "generic", r"\bldar w"), ("aarch64", "neoverse-n1", r"\bldapr w")])
def test_polling_load_stays_in_its_loop(machine, cpu, load):
    def poll(builder, p, q, v):
        loop, done = (builder.append_basic_block(name) for name in ("loop", "done"))
        builder.branch(loop)
        builder.position_at_end(loop)
        value = mmio.emit_load_acquire(builder, p, 32)
        mmio.emit_pause(builder, machine)
        builder.cbranch(builder.icmp_unsigned("==", value, I32(0)), loop, done)
        builder.position_at_end(done)

    lines = assembly(machine, poll, cpu)
    start = position(lines, r"^\.L.*:")
    again = position(lines, r"\.L\w+$")  # the jump back
    assert start < position(lines, load) < again
    assert start < position(lines, {"x86_64": "pause", "aarch64": "yield"}[machine]) < again


@pytest.mark.parametrize("machine, data, release", [
    ("x86_64", r"movq .*\(%rsi\)", r"movl %edx, \(%rdi\)"), ("aarch64", r"str x\d+, \[x1\]", r"stlr w2, \[x0\]")])
def test_release_store_follows_the_data(machine, data, release):
    def publish(builder, p, q, v):
        builder.store(I64(1 << 40), q)
        mmio.emit_store_release(builder, v, p, 32)

    lines = assembly(machine, publish)
    assert position(lines, data) < position(lines, release)


def test_a_doorbell_is_a_plain_store_on_x86():
    lines = assembly("x86_64", lambda b, p, q, v: mmio.emit_store_doorbell(b, v, p, 32, "x86_64"))
    position(lines, r"movl %edx, \(%rdi\)")
    assert not [line for line in lines if "fence" in line or "lock" in line]


def test_a_doorbell_on_aarch64_waits_for_memory_as_the_device_sees_it():
    def ring(builder, p, q, v):
        builder.store(I64(7), q)
        mmio.emit_store_doorbell(builder, v, p, 32, "aarch64")

    lines = assembly("aarch64", ring)
    assert position(lines, r"\[x1\]") < position(lines, "dmb oshst") < position(lines, r"str w2, \[x0\]")


@pytest.mark.parametrize("machine, ordering, instruction", [
    ("x86_64", "seq_cst", r"mfence|lock orl"), ("x86_64", "acquire", None), ("x86_64", "release", None),
    ("aarch64", "seq_cst", "dmb ish$"), ("aarch64", "acquire", "dmb ishld"), ("aarch64", "release", "dmb ish$")])
def test_fences(machine, ordering, instruction):
    lines = assembly(machine, lambda b, *_: mmio.emit_fence(b, ordering))
    fences = [line for line in lines if re.search("fence|lock|dmb", line)]
    assert len(fences) == (instruction is not None)
    assert instruction is None or re.search(instruction, fences[0])


@pytest.mark.parametrize("machine, build, instruction", [
    ("x86_64", mmio.emit_cycles, "rdtsc"), ("aarch64", mmio.emit_cycles, "mrs x0, CNTVCT_EL0")])
def test_the_counter_is_read_each_time(machine, build, instruction):
    once = assembly(machine, lambda b, *_: build(b, machine))
    position(once, instruction)
    twice = assembly(machine, lambda b, *_: b.sub(build(b, machine), build(b, machine)))
    assert sum("rdtsc" in line or "CNTVCT" in line for line in twice) == 2


@pytest.mark.parametrize("machine, instruction", [
    ("x86_64", r"prefetcht0 \(%rdi\)"), ("aarch64", r"prfm pldl1keep, \[x0\]")])
def test_prefetch_instruction(machine, instruction):
    position(assembly(machine, lambda b, p, q, v: mmio.emit_prefetch(b, p)), instruction)


# What the functions do in kernels, or as plain Python.

RECORD = np.dtype([("pad", "u8"), ("word", "u4"), ("half", "u2"), ("wide", "u8"), ("ratio", "f8")])


@kernel
def touch_record(record):
    prefetch(record, "wide")
    store_release(record, "word", U(5))
    store_doorbell(record, "wide", U(1 << 63))
    fence_acquire()
    fence_release()
    fence()
    pause()
    return load_acquire(record, "word"), load_acquire(record, "wide")


def test_record_fields():
    record = new_record(RECORD)
    record.half = 7
    assert touch_record(record) == (5, 1 << 63)
    assert (record.pad, record.word, record.half, record.wide) == (0, 5, 7, 1 << 63)


@kernel
def load(array, index):
    return load_acquire(array, index)


@kernel
def store(array, index, value):
    store_release(array, index, value)


@kernel
def ring(array, index, value):
    store_doorbell(array, index, value)


@kernel
def fetch(array, index):
    prefetch(array, index)


@pytest.mark.parametrize("dtype", ["u4", "u8", "i8"])
@pytest.mark.parametrize("step", [1, 2])
def test_array_elements(dtype, step):
    whole = np.arange(16, dtype=dtype)
    array = whole[::step]
    assert load(array, U(3)) == 3 * step and load(array, 3) == 3 * step
    store(array, U(1), U(77))
    ring(array, len(array) - 1, U(78))
    fetch(array, U(0))
    expected = np.arange(16, dtype=dtype)
    expected[step], expected[(len(array) - 1) * step] = 77, 78
    assert whole.tolist() == expected.tolist()


@compiled_only
@pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast has no checks")
@pytest.mark.parametrize("index", [4, -1, -4, 1 << 62, -(1 << 63), U(4), U((1 << 64) - 1)])
def test_outside_the_array_is_refused(index):
    memory = np.full(12, 0xAA, np.uint32)
    array = memory[4:8]
    for access in (lambda: load(array, index), lambda: store(array, index, U(1)), lambda: ring(array, index, U(1)),
                   lambda: fetch(array, index)):
        with pytest.raises(IndexError, match="outside the array"):
            access()
    assert (memory == 0xAA).all()


@kernel
def load_ratio(record):
    return load_acquire(record, "ratio")


@kernel
def store_ratio(record):
    store_release(record, "word", 0.5)


@kernel
def load_matrix(array):
    return load_acquire(array, 0)


@compiled_only
@pytest.mark.parametrize("function, argument, words", [
    (load_ratio, new_record(RECORD), "ordered access is to an integer, .*float64"),
    (store_ratio, new_record(RECORD), "ordered access is to an integer, not to float64"),
    (load_matrix, np.zeros((2, 2), np.uint64), r"expected \(record, 'field'\) or \(1-d array, index\)")])
def test_other_types_are_refused_by_name(function, argument, words):
    with pytest.raises(TypingError, match=words):
        function(argument)


@kernel
def wait_for(flags):
    polls = U(0)
    while load_acquire(flags, 0) == U(0):
        pause()
        polls += U(1)
    return polls


def test_polling_ends_when_another_thread_stores():
    flags, polls = np.zeros(1, np.uint64), []
    wait_for(np.ones(1, np.uint64))  # compiled
    thread = threading.Thread(target=lambda: polls.append(wait_for(flags)), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    flags[0] = 1
    thread.join(20)
    assert not thread.is_alive() and polls[0] > 0


@kernel
def two_readings():
    before = cycles()
    for _ in range(100):
        pause()
    return before, cycles()


def test_the_counter_counts():
    before, after = two_readings()
    assert 0 < before < after


def test_everything_is_documented():
    assert all(getattr(mmio, name).__doc__ for name in mmio.ORDERED_ACCESS)
