"""A packet as a handler sees it: exactly the frame's bytes, each access checked, nothing that could dangle.

In a kernel a `Packet` is a pointer, a length and the port it came from, without reference counts:

    packet[i], packet[i] = v        one byte; a negative index is refused, not wrapped
    len(packet), packet.port        bytes in the frame (no CRC); index of the port it was received on
    packet[a:b]                     a narrower view; 0 <= a <= b <= len, or IndexError
    packet[a:b] = other             copies a view of the same length
    packet.be16(i) be32 be64        network-order loads of 2, 4, 8 bytes at offset i (no alignment needed)
    packet.set_be16(i, v) …         the stores

Checked mode: IndexError where an access leaves the packet, OverflowError for a value that does not fit its bytes. The
class below is the same in plain Python.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import (
    NativeValue,
    intrinsic,
    make_attribute_wrapper,
    models,
    overload_method,
    register_model,
    typeof_impl,
    unbox,
)

from .jit import INTERPRETED, OPTIONS, PROTECTED
from .mmio import _call
from .pool import BUFFER_SIZE, GENERATIONS, LENGTH_MASK, LENGTH_SHIFT, U, index_of, kernel, owns

_OUTSIDE, _SLICE = "access outside the packet", "slice outside the packet"
_I8, _I64 = ir.IntType(8), ir.IntType(64)


class PacketType(types.Type):
    def __init__(self):
        super().__init__("ixy_numba.Packet")


packet_type = PacketType()


@register_model(PacketType)
class _PacketModel(models.StructModel):
    def __init__(self, manager, kind):
        members = [("data", types.CPointer(types.uint8)), ("length", types.uint64), ("port", types.int64)]
        super().__init__(manager, kind, members)


make_attribute_wrapper(PacketType, "port", "port")


def _struct(context, builder, value=None):
    return cgutils.create_struct_proxy(packet_type)(context, builder, value)


def _refuse(context, builder, condition, message):
    if "packet_bounds" in PROTECTED:
        with builder.if_then(condition, likely=False):
            context.call_conv.return_user_exc(builder, IndexError, (message,))


def _address(context, builder, packet, index_type, index, size):
    """Pointer to bytes index .. index + size - 1, checked with one unsigned compare: a negative index is huge."""
    view = _struct(context, builder, packet)
    index_type = types.unliteral(index_type)
    index = context.cast(builder, index, index_type, types.int64 if index_type.signed else types.uint64)
    end = view.length
    if size > 1:
        end = _call(builder, _I64, "llvm.usub.sat.i64", end, _I64(size - 1))
    _refuse(context, builder, builder.icmp_unsigned(">=", index, end), _OUTSIDE)
    return builder.gep(view.data, [index], inbounds=True)


@infer_global(operator.getitem)
class _GetItem(AbstractTemplate):
    def generic(self, args, kws):
        packet, index = args
        if isinstance(packet, PacketType) and isinstance(index, types.Integer):
            return signature(types.uint8, packet, index)
        if isinstance(packet, PacketType) and isinstance(index, types.SliceType) and not index.has_step:
            return signature(packet, packet, index)


@infer_global(operator.setitem)
class _SetItem(AbstractTemplate):
    def generic(self, args, kws):
        packet, index, value = args
        if isinstance(packet, PacketType) and isinstance(index, types.Integer) and isinstance(value, types.Integer):
            return signature(types.none, packet, index, types.unliteral(value))
        if isinstance(packet, PacketType) and isinstance(index, types.SliceType) and isinstance(value, PacketType):
            return signature(types.none, packet, index, value)


@infer_global(len)
class _Len(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], PacketType):
            return signature(types.int64, *args)


@lower_builtin(operator.getitem, PacketType, types.Integer)
def _get_byte(context, builder, sig, args):
    return builder.load(_address(context, builder, args[0], sig.args[1], args[1], 1))


@lower_builtin(operator.setitem, PacketType, types.Integer, types.Integer)
def _set_byte(context, builder, sig, args):
    pointer = _address(context, builder, args[0], sig.args[1], args[1], 1)
    builder.store(context.cast(builder, args[2], sig.args[2], types.uint8), pointer)
    return context.get_dummy_value()


@lower_builtin(len, PacketType)
def _length(context, builder, sig, args):
    return _struct(context, builder, args[0]).length


def _narrow(context, builder, slice_type, packet, bounds):
    """packet[a:b] as a view; a missing a is 0, a missing b is the end, anything else must lie inside."""
    view = _struct(context, builder, packet)
    bounds = context.make_helper(builder, slice_type, bounds)
    missing = builder.icmp_signed("==", bounds.stop, _I64(types.intp.maxval))
    stop = builder.select(missing, view.length, bounds.stop)
    outside = builder.or_(builder.icmp_unsigned(">", stop, view.length),
                          builder.icmp_unsigned(">", bounds.start, stop))
    _refuse(context, builder, outside, _SLICE)
    part = _struct(context, builder)
    part.data = builder.gep(view.data, [bounds.start], inbounds=True)
    part.length, part.port = builder.sub(stop, bounds.start), view.port
    return part


@lower_builtin(operator.getitem, PacketType, types.SliceType)
def _get_slice(context, builder, sig, args):
    return _narrow(context, builder, sig.args[1], *args)._getvalue()


@lower_builtin(operator.setitem, PacketType, types.SliceType, PacketType)
def _set_slice(context, builder, sig, args):
    target = _narrow(context, builder, sig.args[1], args[0], args[1])
    source = _struct(context, builder, args[2])
    _refuse(context, builder, builder.icmp_unsigned("!=", target.length, source.length), "slices differ in length")
    cgutils.raw_memmove(builder, target.data, source.data, target.length, _I64(1))
    return context.get_dummy_value()


def _network_order(size):
    """(load, store) of a big-endian integer of `size` bytes at any offset."""
    kind, llvm_type = getattr(types, f"uint{8 * size}"), ir.IntType(8 * size)

    @intrinsic
    def load(typingctx, packet, offset):
        if not isinstance(offset, types.Integer):
            raise TypingError(f"a packet offset is an integer, not {offset}")

        def codegen(context, builder, sig, args):
            pointer = _address(context, builder, args[0], sig.args[1], args[1], size)
            return builder.bswap(builder.load(builder.bitcast(pointer, llvm_type.as_pointer()), align=1))

        return kind(packet, offset), codegen

    @intrinsic
    def store(typingctx, packet, offset, value):
        if not (isinstance(offset, types.Integer) and isinstance(value, types.Integer)):
            raise TypingError(f"expected (offset, integer), got ({offset}, {value})")

        def codegen(context, builder, sig, args):
            pointer = _address(context, builder, args[0], sig.args[1], args[1], size)
            value = builder.bswap(context.cast(builder, args[2], sig.args[2], kind))
            builder.store(value, builder.bitcast(pointer, llvm_type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.none(packet, offset, value), codegen

    @overload_method(PacketType, f"be{8 * size}", jit_options=OPTIONS)
    def be(packet, offset):
        return lambda packet, offset: load(packet, offset)

    @overload_method(PacketType, f"set_be{8 * size}", jit_options=OPTIONS)
    def set_be(packet, offset, value):
        return lambda packet, offset, value: store(packet, offset, value)


for _size in (2, 4, 8):
    _network_order(_size)


@intrinsic
def _view(typingctx, buffer, length, port):
    """The first `length` bytes of a pool's buffer; the caller has checked that `length` fits."""
    offset = buffer.offset("octets")

    def codegen(context, builder, sig, args):
        view = _struct(context, builder)
        view.data = cgutils.get_record_member(builder, args[0], offset, _I8)
        view.length = context.cast(builder, args[1], sig.args[1], types.uint64)
        view.port = context.cast(builder, args[2], sig.args[2], types.int64)
        return view._getvalue()

    return packet_type(buffer, length, port), codegen


class Packet:
    """A packet in plain Python: over any uint8 array, with the kernel view's rules.

    Bytes and fields are Python's integers, which are exact: in a kernel, arithmetic on them has 64 bits.
    """

    def __init__(self, data, port=0):
        self.data, self.port = data, port

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Packet(self.data[self._inside(index)], self.port)
        return int(self.data[self._at(index, 1)])

    def __setitem__(self, index, value):
        if isinstance(index, slice):
            target = self.data[self._inside(index)]
            if len(target) != len(value):
                raise IndexError(f"slices differ in length: {len(target)} and {len(value)} bytes")
            target[:] = value.data.copy()
        else:
            self._store(index, 1, value)

    def _at(self, index, size):
        index = operator.index(index)
        if not 0 <= index <= len(self.data) - size:
            raise IndexError(f"{_OUTSIDE}: {size} byte(s) at offset {index} of {len(self.data)}")
        return index

    def _inside(self, index):
        start = 0 if index.start is None else operator.index(index.start)
        stop = len(self.data) if index.stop is None else operator.index(index.stop)
        if index.step is not None or not 0 <= start <= stop <= len(self.data):
            raise IndexError(f"{_SLICE}: [{start}:{stop}] of {len(self.data)} bytes")
        return slice(start, stop)

    def _load(self, offset, size):
        start = self._at(offset, size)
        return int.from_bytes(self.data[start : start + size].tobytes(), "big")

    def _store(self, offset, size, value):
        start = self._at(offset, size)
        value, limit = operator.index(value), 1 << 8 * size
        if "integer_overflow" in PROTECTED and not 0 <= value < limit:
            raise OverflowError(f"{value} does not fit {size} byte(s)")
        self.data[start : start + size] = np.frombuffer((value % limit).to_bytes(size, "big"), np.uint8)

    @property
    def _address(self):
        return self.data.ctypes.data

    @property
    def _length(self):
        return len(self.data)

    def be16(self, offset):
        return self._load(offset, 2)

    def be32(self, offset):
        return self._load(offset, 4)

    def be64(self, offset):
        return self._load(offset, 8)

    def set_be16(self, offset, value):
        self._store(offset, 2, value)

    def set_be32(self, offset, value):
        self._store(offset, 4, value)

    def set_be64(self, offset, value):
        self._store(offset, 8, value)


@typeof_impl.register(Packet)
def _typeof_packet(value, context):
    if not isinstance(value.data, np.ndarray) or value.data.dtype != np.uint8 or value.data.ndim != 1 or not (
            value.data.flags.c_contiguous and value.data.flags.writeable):
        raise TypeError("a kernel takes a Packet over a contiguous, writable, one-dimensional uint8 array")
    return packet_type


@unbox(PacketType)
def _unbox_packet(kind, value, context):
    """Lets plain Python, such as a handler under test, call kernels with its `Packet`: they work on the same bytes."""
    members = []
    for name in ("_address", "_length", "port"):
        member = context.pyapi.object_getattr_string(value, name)
        members.append(context.unbox(types.int64, member).value)
        context.pyapi.decref(member)
    view = _struct(context.context, context.builder)
    view.data = context.builder.inttoptr(members[0], _I8.as_pointer())
    view.length, view.port = members[1:]
    failed = cgutils.is_not_null(context.builder, context.pyapi.err_occurred())
    return NativeValue(view._getvalue(), is_error=failed)


if INTERPRETED:

    def _view(buffer, length, port):
        return Packet(buffer.octets[: int(length)], int(port))


@kernel(inline=True)
def view(memory, index, length, port):
    """The first `length` bytes of buffer `index`, whose owner the caller knows. For drivers and loops."""
    return _view(memory.buffer[index], length, port)


@kernel(inline=True)
def packet(pool, handle):
    """The bytes of the packet `handle` as a `Packet`; `pool` is a device's or a queue's `.pool`.

    IndexError for a handle that is not, or no longer, the application's. The view is good until the packet is sent or
    freed; keep the handle, not the view.
    """
    length = handle >> LENGTH_SHIFT & LENGTH_MASK
    if GENERATIONS and (not owns(pool, handle) or length > U(BUFFER_SIZE)):
        raise IndexError("this handle is no packet of the application's: sent, freed, of another pool or forged")
    return view(pool.memory, index_of(pool.table, handle), length, 0)


@kernel(inline=True)
def resize(handle, length):
    """The handle with its length set to `length` bytes (uint64 in and out); fill the new bytes through `packet`."""
    if U(length) > U(BUFFER_SIZE):
        raise IndexError("a packet has at most 2048 bytes")
    return (handle & ~(LENGTH_MASK << LENGTH_SHIFT)) | U(length) << LENGTH_SHIFT
