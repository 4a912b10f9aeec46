"""How checked mode compiles: integers do not wrap, indices do not count from the end, and nothing slips through.

Numba turns the typed form of a function into LLVM with the help of one object, the target context: it emits every
conversion (`cast`) and knows how every operation and call is implemented (`get_function`). While a kernel is lowered,
`_Context` takes its place, so that whatever can lose a value or leave an array has to pass it:

    + - * // unary -, abs    OverflowError where the result does not fit the type that Numba gives it
    << >>                    OverflowError for an amount that is no bit of the type; bits shifted out are dropped
    conversions              OverflowError where the value does not fit: np.uint8(x), stores into narrower fields and
                             elements, arguments, mixed signs, a float that becomes an integer
    array[i], array[a:b]     IndexError for anything negative, which Numba would count from the end

What cannot be checked is refused when the kernel is compiled, by name and line. Arithmetic that is meant to wrap is
written with `core.integers`. A check costs a comparison that LLVM drops where it can prove it; the message and the
place (kernel, file, line) are constants, which Numba appends to the traceback.
"""

import copy
import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, compiler, lowering, typed_passes, typing
from numba.core.callconv import CPUCallConv
from numba.core.compiler_machinery import register_pass
from numba.core.cpu import CPUContext
from numba.core.errors import UnsupportedError
from numba.core.typing.templates import _IntrinsicTemplate, _OverloadFunctionTemplate


class CheckedCompiler(compiler.CompilerBase):
    """Numba's pipeline, but for its last step. Kernels may call whatever is compiled by a class of this kind."""

    lowering = None

    def define_pipelines(self):
        manager = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [(self.lowering if step is typed_passes.NativeLowering else step, words)
                          for step, words in manager.passes]
        manager.finalize()
        return [manager]


def pipeline(overflow, bounds):
    """The compiler class that checks integers for `overflow`, arrays for `bounds`, both, or (Numba's own) neither."""
    if not (overflow or bounds):
        return compiler.Compiler

    class Lower(_Lower):
        checks = overflow, bounds

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(typed_passes.BaseNativeLowering):
        _name = f"lowering with checks {overflow:d}{bounds:d}"
        lowering_class = Lower

    return type("CheckedCompiler", (CheckedCompiler,), {"lowering": Lowering})


class _Lower(lowering.Lower):
    checks = None

    def __init__(self, context, *args, **kws):
        super().__init__(_Context.of(context, self, *self.checks), *args, **kws)

    def refuse(self, what, remedy):
        raise UnsupportedError(f"{what}: {remedy}", loc=self.loc)

    def lower_expr(self, resty, expr):
        if expr.op == "arrayexpr" and self.context.overflow:
            if any(map(_holds_integers, [resty, *(self.typeof(var.name) for var in expr.list_vars())])):
                self.refuse("arithmetic on a whole array of integers is not checked for overflow", "write the loop")
        elif expr.op == "static_getitem":
            self._refuse_negative(expr.value, expr.index)
        return super().lower_expr(resty, expr)

    def lower_inst(self, inst):
        if isinstance(inst, lowering.ir.StaticSetItem):
            self._refuse_negative(inst.target, inst.index)
        return super().lower_inst(inst)

    def _refuse_negative(self, array, index):
        """A constant one; others are checked when they are used."""
        if self.context.bounds and isinstance(self.typeof(array.name), types.Buffer):
            indices = index if isinstance(index, tuple) else (index,)
            for part in indices:
                for number in (part.start, part.stop) if isinstance(part, slice) else (part,):
                    if isinstance(number, int) and number < 0:
                        self.refuse(f"index {number} would count from the end of the array", "write len(array) - …")

    def lower_dynamic_raise(self, inst):
        self.refuse("an exception with a run-time argument leaks memory when it is caught", "use a constant message")

    lower_try_dynamic_raise = lower_dynamic_raise

    def _lower_call_FunctionType(self, fnty, expr, signature):
        self.refuse("a call of a function that is a value cannot be checked", "call the kernel by its name")

    _lower_call_ObjModeDispatcher = _lower_call_FunctionType


class _CallConv(CPUCallConv):
    """Every error carries its place, also where Numba's own code leaves it out."""

    def return_user_exc(self, builder, exc, exc_args=None, loc=None, func_name=None):
        lower = self.context.lower
        super().return_user_exc(builder, exc, exc_args, loc or lower.loc, func_name or lower.func_ir.func_id.func_name)


class _Context(CPUContext):
    """The target context while one kernel is lowered."""

    @classmethod
    def of(cls, context, lower, overflow, bounds):
        made = copy.copy(context)  # as the context's own `subtarget` does, to change a copy
        made.__class__ = cls
        made.original, made.lower, made.overflow, made.bounds = context, lower, overflow, bounds
        return made

    @property
    def call_conv(self):
        return _CallConv(self)

    def raise_if(self, builder, condition, error, message):
        with builder.if_then(condition, likely=False):
            self.call_conv.return_user_exc(builder, error, (message,))

    def cast(self, builder, val, fromty, toty):
        if self.overflow and isinstance(toty, types.Integer) and not isinstance(fromty, types.Literal):
            outside = None
            if isinstance(fromty, types.Integer):
                outside = _outside(builder, val, fromty, toty)
            elif isinstance(fromty, types.Float):
                outside = _outside_float(builder, val, toty)
            if outside is not None:
                self.raise_if(builder, outside, OverflowError, f"{fromty} value does not fit {toty}")
        return super().cast(builder, val, fromty, toty)

    def get_function(self, fn, sig, _firstcall=True):
        key = getattr(fn, "typing_key", fn)
        if self.bounds and key in (operator.getitem, operator.setitem):
            if isinstance(sig.args[0], types.NumpyFlatType):
                self.lower.refuse("array.flat is not checked", "use the array's own indices")
            if isinstance(sig.args[0], types.Buffer):
                return self._indexing(key, sig)
        if isinstance(fn, types.Callable):
            self._require_checked(fn, key, sig)
        found = super().get_function(fn, sig, _firstcall)
        if self.overflow and key in _CHECKS and (key is enumerate or isinstance(sig.args[0], types.Number)
                                                 and _holds_integers(sig.return_type)):
            return lambda builder, args, loc=None: _CHECKS[key](self, builder, sig, args, found)
        return found

    def compile_subroutine(self, *args, **kws):
        """Numba's implementations of what kernels may use: compiled as for everybody, and shared with everybody."""
        return self.original.compile_subroutine(*args, **kws)

    def _indexing(self, key, sig):
        """array[index], with negative numbers taken for huge ones.

        One comparison then finds whatever is outside, where Numba has two: it is left to check slices and the like.
        """
        array, index, *value = sig.args
        parts = index.types if isinstance(index, types.BaseTuple) else (index,)
        if any(isinstance(part, types.Array) for part in parts):
            self.lower.refuse("an array as an index is not checked", "write the loop")
        unsigned = [types.uintp if isinstance(part, types.Integer) else part for part in parts]
        new_index = types.BaseTuple.from_types(unsigned) if isinstance(index, types.BaseTuple) else unsigned[0]
        plain = len(parts) <= array.ndim and all(isinstance(part, types.Integer) for part in parts)
        context = self._without_bounds() if plain else self
        found = CPUContext.get_function(context, key, typing.signature(sig.return_type, array, new_index, *value))

        def call(builder, args, loc=None):
            whole = isinstance(index, types.BaseTuple)
            numbers = [builder.extract_value(args[1], k) for k in range(len(parts))] if whole else [args[1]]
            for k, part in enumerate(parts):
                if isinstance(part, types.Integer):
                    numbers[k] = bits(self, builder, numbers[k], part, types.uintp)
                elif isinstance(part, types.SliceType):
                    self._refuse_negative_slice(builder, part, numbers[k])
            if plain:
                shape = cgutils.unpack_tuple(builder, self.make_array(array)(self, builder, args[0]).shape)
                for number, size in zip(numbers, shape, strict=False):
                    outside = builder.icmp_unsigned(">=", number, size)
                    self.raise_if(builder, outside, IndexError, "index is out of bounds")
            new = self.make_tuple(builder, new_index, numbers) if whole else numbers[0]
            return found(builder, [args[0], new, *args[2:]])

        return call

    def _without_bounds(self):
        made = copy.copy(self)
        made.enable_boundscheck = False
        return made

    def _refuse_negative_slice(self, builder, kind, value):
        ends = self.make_helper(builder, kind, value)
        given = builder.icmp_signed("!=", ends.stop, ends.stop.type(types.intp.minval))  # which a[…::-1] has for none
        wrong = builder.or_(_negative(builder, ends.start), builder.and_(given, _negative(builder, ends.stop)))
        self.raise_if(builder, wrong, IndexError, "a slice that counts from the end of the array")

    def _require_checked(self, fn, key, sig):
        """Refuse calls of what is neither compiled with these checks nor known to need none."""
        given = [kind for kind in _flat(_kinds(fn, sig)) if not isinstance(kind, types.Omitted)]
        words = ", ".join(str(types.unliteral(kind)) for kind in given)
        if isinstance(fn, types.Dispatcher):
            if not _is_checked(fn.dispatcher._compiler.pipeline_class):
                self.lower.refuse(f"{fn.dispatcher.py_func.__name__} is compiled without checks",
                                  "decorate it with @kernel instead of Numba's own decorator")
        elif self.overflow and key in _INEXACT and isinstance(sig.return_type, types.Float) and all(
                isinstance(kind, types.Integer) for kind in given):
            self.lower.refuse(f"{key.__name__} of {words} would be a {sig.return_type}",
                              "convert them to one type, with np.uint64(…) or np.int64(…)")
        elif isinstance(fn, (types.Function, types.BoundFunction)) and _unchecked(fn, key, sig, self.overflow):
            name = key[-1] if isinstance(key, tuple) else getattr(key, "__name__", key)  # a method: (type, name)
            self.lower.refuse(f"{name} of {words} is not checked", "write it out in a kernel of your own")


def bits(context, builder, value, source, kind):
    """The low bits of an integer of type `source` as the integer type `kind`: what does not fit is dropped."""
    return CPUContext.cast(context, builder, value, types.unliteral(source), kind)


def _negative(builder, value):
    return builder.icmp_signed("<", value, value.type(0))


def _outside(builder, value, source, kind):
    """Whether an integer of type `source` is none of the integer type `kind`; None if it always is."""
    tests = []
    if source.maxval > kind.maxval:
        compare = builder.icmp_signed if source.signed else builder.icmp_unsigned
        tests.append(compare(">", value, value.type(kind.maxval)))
    if source.minval < kind.minval:
        tests.append(builder.icmp_signed("<", value, value.type(kind.minval)))
    return builder.or_(*tests) if len(tests) == 2 else tests[0] if tests else None


def _outside_float(builder, value, kind):
    """Whether a float, its fraction cut off, is no integer of type `kind`; a NaN is none."""
    exact = np.float32 if value.type == ir.FloatType() else np.float64
    below = exact(kind.minval - 1)
    compare, low = (">", below) if int(below) == kind.minval - 1 else (">=", kind.minval)
    inside = builder.and_(builder.fcmp_ordered(compare, value, value.type(float(low))),
                          builder.fcmp_ordered("<", value, value.type(float(kind.maxval + 1))))
    return builder.not_(inside)


# ---- operations on integers: each emits its check, and then itself or what Numba has for it


def _arithmetic(name, symbol):
    def emit(context, builder, sig, args, found):
        kind = sig.return_type
        left, right = (context.cast(builder, *pair, kind) for pair in zip(args, sig.args, strict=True))
        method = getattr(builder, f"{'s' if kind.signed else 'u'}{name}_with_overflow")
        result = method(left, right)
        context.raise_if(builder, builder.extract_value(result, 1), OverflowError, f"{kind} overflow in {symbol}")
        return builder.extract_value(result, 0)

    return emit


def _shift(context, builder, sig, args, found):
    width = args[1].type(sig.return_type.bitwidth)
    context.raise_if(builder, builder.icmp_unsigned(">=", args[1], width), OverflowError,
                     f"shift of {sig.return_type} by less than 0 or more than {sig.return_type.bitwidth - 1} bits")
    return found(builder, args)


def _and(context, builder, sig, args, found):
    """With mixed signs Numba makes both signed first, for which a large unsigned number is too large. Not so here."""
    if sig.args[0].signed == sig.args[1].signed:
        return found(builder, args)
    left, right = (bits(context, builder, *pair, sig.return_type) for pair in zip(args, sig.args, strict=True))
    result = builder.and_(left, right)
    context.raise_if(builder, _negative(builder, result), OverflowError, f"result does not fit {sig.return_type}")
    return result


def _negate(context, builder, sig, args, found):
    kind = sig.return_type
    value = context.cast(builder, args[0], sig.args[0], kind)
    wrong = builder.icmp_signed("==" if kind.signed else "!=", value, value.type(kind.minval))
    context.raise_if(builder, wrong, OverflowError, f"-x does not fit {kind}")
    return builder.neg(value)  # Numba's own negates in the narrow type


def _absolute(context, builder, sig, args, found):
    kind = sig.return_type
    if kind.signed:
        wrong = builder.icmp_signed("==", args[0], args[0].type(kind.minval))
        context.raise_if(builder, wrong, OverflowError, f"abs(x) does not fit {kind}")
    return found(builder, args)


def _divide(context, builder, sig, args, found):
    kind = getattr(sig.return_type, "dtype", sig.return_type)  # divmod: of two
    if kind.signed:
        left, right = (context.cast(builder, *pair, kind) for pair in zip(args, sig.args, strict=True))
        wrong = builder.and_(builder.icmp_signed("==", left, left.type(kind.minval)),
                             builder.icmp_signed("==", right, right.type(-1)))
        context.raise_if(builder, wrong, OverflowError, f"quotient does not fit {kind}")
    return found(builder, args)


def _range(context, builder, sig, args, found):
    """Numba counts the steps in the signed type of the same width."""
    kind = sig.args[0]
    start, stop = (args[0].type(0), args[0]) if len(args) == 1 else args[:2]
    if not kind.signed:
        for value in args:
            context.raise_if(builder, _negative(builder, value), OverflowError, "a range beyond 2**63")
    elif len(args) > 1:
        distance = builder.ssub_with_overflow(stop, start)
        length = builder.extract_value(distance, 0)
        wrong = builder.or_(builder.extract_value(distance, 1),
                            builder.icmp_signed("==", length, length.type(kind.minval)))
        context.raise_if(builder, wrong, OverflowError, f"a range longer than {kind} can count")
    return found(builder, args)


def _enumerate(context, builder, sig, args, found):
    if len(args) > 1 and isinstance(sig.args[1], types.Integer):
        start = context.cast(builder, args[1], types.unliteral(sig.args[1]), types.intp)
        wrong = builder.icmp_signed(">=", start, start.type(1 << 62))  # nobody counts as far as from there to the end
        context.raise_if(builder, wrong, OverflowError, "enumerate from 2**62 on")
    return found(builder, args)


def _int(context, builder, sig, args, found):
    return context.cast(builder, args[0], types.unliteral(sig.args[0]), sig.return_type)


_CHECKS = {
    operator.neg: _negate, abs: _absolute, divmod: _divide, range: _range, enumerate: _enumerate, int: _int,
    **{key: emit for name, emit in {
        "add": _arithmetic("add", "+"), "sub": _arithmetic("sub", "-"), "mul": _arithmetic("mul", "*"),
        "lshift": _shift, "rshift": _shift, "floordiv": _divide, "and": _and}.items()
       for key in (getattr(operator, f"__{name}__"), getattr(operator, f"__i{name}__"))}}

# ---- what kernels may call besides each other


def _named(*names):
    """The operators of these names, and their in-place forms."""
    return {getattr(operator, form) for name in names for form in (f"__{name}__", f"__i{name}__")}


_INEXACT = {min, max} | _named("add", "sub", "mul", "floordiv", "mod")
_POWERS = {pow} | _named("pow", "matmul")
_ARITHMETIC = {operator.neg, operator.pos, operator.invert} | _POWERS | _named(
    "add", "sub", "mul", "floordiv", "mod", "truediv", "lshift", "rshift", "and", "or", "xor")
# Numba's own that are given integers and cannot overflow: they choose among their arguments, which all fit the result
# (else it would be a float, which is refused), convert to a float, look at them, or count what is in memory.
_HARMLESS = {min, max, float, bool, isinstance, print, len, zip, iter, next, tuple, slice, np.empty, np.zeros,
             "list.append"}


def _is_checked(compiler_class):
    return isinstance(compiler_class, type) and issubclass(compiler_class, CheckedCompiler)


def _is_numbas(thing):
    return (thing.__module__ or "numba").partition(".")[0] in ("numba", "abc")  # abc: classes that it makes on the fly


def _unchecked(fn, key, sig, overflow):
    """Whether a function or method in Numba's sense could overflow or leave an array without anybody noticing."""
    templates = getattr(fn, "templates", None) or [fn.template]
    for each in templates:
        if issubclass(each, _OverloadFunctionTemplate) and not _is_numbas(each._overload_func):
            if not _is_checked(each._jit_options.get("pipeline_class")):
                return True
    if not (overflow and any(map(_holds_integers, [sig.return_type, *_kinds(fn, sig)]))):
        return False
    if key in _ARITHMETIC:
        return key in _POWERS and _holds_integers(sig.return_type) or any(map(_is_array, sig.args))
    if key in _HARMLESS or key in _CHECKS or key in vars(operator).values():  # the other operators compare and look up
        return False
    return any(_is_numbas(getattr(each, "_overload_func", each)) for each in templates
               if not issubclass(each, _IntrinsicTemplate))


def _kinds(fn, sig):
    """The types of the arguments, with what a method is of."""
    return [fn.this, *sig.args] if isinstance(fn, types.BoundFunction) else sig.args


def _flat(kinds):
    for kind in kinds:
        yield from _flat(kind.types) if isinstance(kind, types.BaseTuple) else [kind]


def _holds_integers(kind):
    return any(isinstance(getattr(part, "dtype", part), types.Integer) for part in _flat([kind]))


def _is_array(kind):
    return isinstance(kind, (types.Array, types.NumpyFlatType))
