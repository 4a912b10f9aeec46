"""Ordered access to memory that a device shares: descriptors, doorbells, stop words.

A plain polling loop on memory is compiled into an endless jump, and plain stores may be reordered. These functions
compile to what the architecture needs: on x86-64 a plain `mov` (loads are acquire, stores are release there), on
aarch64 `ldapr`/`ldar`, `stlr`, and for a doorbell the barrier that the device's domain sees. Each takes a record and
the literal name of a field, or a one-dimensional array and an index; with NUMBA_DISABLE_JIT=1 a plain-Python twin of
the same name is used.
"""

import os
import platform
import time

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from .jit import INTERPRETED, PROTECTED

MACHINE = platform.machine()
if MACHINE not in ("x86_64", "aarch64") and not INTERPRETED:
    raise ImportError(f"ixy_numba compiles for x86_64 and aarch64, this machine is {MACHINE}; "
                      "only NUMBA_DISABLE_JIT=1 (plain Python) works here")

_I32, _I64, _VOID = ir.IntType(32), ir.IntType(64), ir.VoidType()


# What each operation is in LLVM, apart from Numba so that a test can compile it for either machine.


def emit_load_acquire(builder, pointer, bits):
    return builder.load_atomic(pointer, "acquire", bits // 8, typ=ir.IntType(bits))


def emit_store_release(builder, value, pointer, bits):
    builder.store_atomic(value, pointer, "release", bits // 8)


def emit_store_doorbell(builder, value, pointer, bits, machine=MACHINE):
    """A release store that a device sees in order: on aarch64 `stlr` only orders for other processors."""
    if machine == "aarch64":
        _call(builder, _VOID, "llvm.aarch64.dmb", _I32(2))  # 2 = OSHST
        builder.store_atomic(value, pointer, "monotonic", bits // 8)
    else:
        emit_store_release(builder, value, pointer, bits)


def emit_fence(builder, ordering):
    builder.fence(ordering)


def emit_pause(builder, machine=MACHINE):
    if machine == "aarch64":
        _call(builder, _VOID, "llvm.aarch64.hint", _I32(1))  # 1 = YIELD
    else:
        _call(builder, _VOID, "llvm.x86.sse2.pause")


def emit_cycles(builder, machine=MACHINE):
    """The counter that user space may read: the TSC, or aarch64's virtual counter (its cycle counter traps)."""
    if machine == "aarch64":  # llvm.readsteadycounter becomes a constant 0 there
        register = builder.module.add_metadata(["cntvct_el0"])
        return _call(builder, _I64, "llvm.read_volatile_register.i64", register)
    return _call(builder, _I64, "llvm.x86.rdtsc")


def emit_prefetch(builder, pointer):
    byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    _call(builder, _VOID, "llvm.prefetch.p0", byte, _I32(0), _I32(3), _I32(1))  # read, keep in all levels, data


def _call(builder, result, name, *args):
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


# The same as Numba intrinsics.


def _element(where, key):
    """The type of the integer that `where` and `key` name."""
    if isinstance(where, types.Record) and isinstance(key, types.StringLiteral):
        element = where.typeof(key.literal_value)
    elif isinstance(where, types.Array) and where.ndim == 1 and isinstance(key, types.Integer):
        element = where.dtype
    else:
        raise TypingError(f"expected (record, 'field') or (1-d array, index), got ({where}, {key})")
    return element


def _integer(where, key):
    element = _element(where, key)
    if not isinstance(element, types.Integer):
        raise TypingError(f"ordered access is to an integer, {key} of {where} is {element}")
    return element


def _pointer(context, builder, where, key, values, llvm_type):
    if isinstance(where, types.Record):
        return cgutils.get_record_member(builder, values[0], where.offset(key.literal_value), llvm_type)
    array = context.make_array(where)(context, builder, values[0])
    index = context.cast(builder, values[1], key, types.intp if types.unliteral(key).signed else types.uintp)
    if "memory_bounds" in PROTECTED:  # a negative index is a huge unsigned one
        outside = builder.icmp_unsigned(">=", index, cgutils.unpack_tuple(builder, array.shape)[0])
        with builder.if_then(outside, likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("ordered access outside the array",))
    stride = cgutils.unpack_tuple(builder, array.strides)[0]
    return cgutils.pointer_add(builder, array.data, builder.mul(index, stride), llvm_type.as_pointer())


@intrinsic
def load_acquire(typingctx, where, key):
    element = _integer(where, key)

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, where, sig.args[1], args, ir.IntType(element.bitwidth))
        return emit_load_acquire(builder, pointer, element.bitwidth)

    return element(where, key), codegen


def _store(emit):
    @intrinsic
    def store(typingctx, where, key, value):
        element = _integer(where, key)
        if not isinstance(value, types.Integer):
            raise TypingError(f"ordered access is to an integer, not to {value}")

        def codegen(context, builder, sig, args):
            pointer = _pointer(context, builder, where, sig.args[1], args, ir.IntType(element.bitwidth))
            emit(builder, context.cast(builder, args[2], sig.args[2], element), pointer, element.bitwidth)
            return context.get_dummy_value()

        return types.void(where, key, value), codegen

    return store


store_release = _store(emit_store_release)
store_doorbell = _store(emit_store_doorbell)


def _fence(ordering):
    @intrinsic
    def fence(typingctx):
        def codegen(context, builder, sig, args):
            emit_fence(builder, ordering)
            return context.get_dummy_value()

        return types.void(), codegen

    return fence


fence_acquire, fence_release, fence = _fence("acquire"), _fence("release"), _fence("seq_cst")


@intrinsic
def pause(typingctx):
    def codegen(context, builder, sig, args):
        emit_pause(builder)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def cycles(typingctx):
    def codegen(context, builder, sig, args):
        return emit_cycles(builder)

    return types.uint64(), codegen


@intrinsic
def prefetch(typingctx, where, key):
    _element(where, key)

    def codegen(context, builder, sig, args):
        emit_prefetch(builder, _pointer(context, builder, where, sig.args[1], args, ir.IntType(8)))
        return context.get_dummy_value()

    return types.void(where, key), codegen


@intrinsic
def likely(typingctx, condition):
    if not isinstance(condition, types.Boolean):
        raise TypingError(f"expected a condition, got {condition}")

    def codegen(context, builder, sig, args):
        return _call(builder, ir.IntType(1), "llvm.expect.i1", args[0], ir.IntType(1)(1))

    return types.boolean(condition), codegen


DOCS = {
    "load_acquire": "The integer at `where`/`key`; no later access moves before it.",
    "store_release": "Store an integer at `where`/`key`; no earlier access moves behind it.",
    "store_doorbell": "Store to a device register after all earlier stores to memory, as the device sees them.",
    "fence_acquire": "No later access moves before an earlier load.",
    "fence_release": "No later store moves before an earlier access.",
    "fence": "A full fence: no access moves across it.",
    "pause": "Tell the processor that this is a spin loop.",
    "cycles": "The cycle counter (uint64): the TSC on x86-64, the virtual counter on aarch64.",
    "likely": "The condition, with the hint that it nearly always holds: what is rare moves out of the loop.",
    "prefetch": "Bring the cache line of `where`/`key` in; nothing else happens.",
}
ORDERED_ACCESS = list(DOCS)

if INTERPRETED:  # the twins: the interpreter itself reorders nothing that x86-64 or its own locks would not order

    def load_acquire(where, key):
        return where[key]

    def store_release(where, key, value):
        where[key] = value

    store_doorbell = store_release

    def fence():
        pass

    fence_acquire = fence_release = fence

    def pause():
        os.sched_yield()

    def cycles():
        return np.uint64(time.perf_counter_ns())

    def prefetch(where, key):
        pass

    def likely(condition):
        return condition

for _name in ORDERED_ACCESS:
    globals()[_name].__doc__ = DOCS[_name]
