"""Memory by integer address, unchecked: for the model's side of DMA and for mapped files. No driver uses it.

`load8 … load64(address)`, `store8 … store64(address, value)` (little-endian, any alignment), the ordered
`load_acquire32/64`, `store_release32/64` (aligned), `copy(target, source, n)` (no overlap), `prefetch(address)` and
`address_of(packet)`. Addresses and values are uint64. Whoever calls has checked that the bytes are there.
"""

import ctypes

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import INTERPRETED
from .mmio import emit_load_acquire, emit_prefetch, emit_store_release
from .packet import _struct


def _accessors(bits):
    """(load, store, load_acquire, store_release) of `bits` at an address."""
    llvm_type = ir.IntType(bits)

    if INTERPRETED:
        kind = getattr(ctypes, f"c_uint{bits}")

        def load(address):
            return np.uint64(kind.from_address(int(address)).value)

        def store(address, value):
            kind.from_address(int(address)).value = int(value)

        return load, store, load, store

    def loader(emit):
        @intrinsic
        def load(typingctx, address):
            def codegen(context, builder, sig, args):
                pointer = builder.inttoptr(args[0], llvm_type.as_pointer())
                return builder.zext(emit(builder, pointer), ir.IntType(64)) if bits < 64 else emit(builder, pointer)

            return types.uint64(types.uint64), codegen

        return load

    def storer(emit):
        @intrinsic
        def store(typingctx, address, value):
            def codegen(context, builder, sig, args):
                pointer = builder.inttoptr(args[0], llvm_type.as_pointer())
                emit(builder, builder.trunc(args[1], llvm_type) if bits < 64 else args[1], pointer)
                return context.get_dummy_value()

            return types.void(types.uint64, types.uint64), codegen

        return store

    return (loader(lambda builder, pointer: builder.load(pointer, align=1)),
            storer(lambda builder, value, pointer: builder.store(value, pointer, align=1)),
            loader(lambda builder, pointer: emit_load_acquire(builder, pointer, bits)),
            storer(lambda builder, value, pointer: emit_store_release(builder, value, pointer, bits)))


load8, store8, _, _ = _accessors(8)
load16, store16, _, _ = _accessors(16)
load32, store32, load_acquire32, store_release32 = _accessors(32)
load64, store64, load_acquire64, store_release64 = _accessors(64)

if INTERPRETED:

    def copy(target, source, n):
        ctypes.memmove(int(target), int(source), int(n))

    def prefetch(address):
        pass

    def address_of(packet):
        return np.uint64(packet.data.ctypes.data)

else:

    @intrinsic
    def copy(typingctx, target, source, n):
        def codegen(context, builder, sig, args):
            pointers = [builder.inttoptr(arg, ir.IntType(8).as_pointer()) for arg in args[:2]]
            cgutils.raw_memcpy(builder, *pointers, args[2], ir.IntType(64)(1))
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, types.uint64), codegen

    @intrinsic
    def prefetch(typingctx, address):
        def codegen(context, builder, sig, args):
            emit_prefetch(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
            return context.get_dummy_value()

        return types.void(types.uint64), codegen

    @intrinsic
    def address_of(typingctx, packet):
        def codegen(context, builder, sig, args):
            return builder.ptrtoint(_struct(context, builder, args[0]).data, ir.IntType(64))

        return types.uint64(packet), codegen
