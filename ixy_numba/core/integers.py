"""Integer arithmetic that is meant to wrap: checksums, hashes, random numbers, sequence numbers.

    wrapping_add(a, b), wrapping_sub(a, b), wrapping_mul(a, b)      modulo 2**bits of a's type, which the result has
    truncate(value, np.uint16)                                      the low bits of a value as another integer type

Kernels refuse an operation that overflows and a conversion that loses something; these say that it is meant. The same
in plain Python, without NumPy's warnings; a Python int counts as an int64 there, as it does in a kernel.
"""

import operator

import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from .checked import bits
from .jit import INTERPRETED


@intrinsic
def truncate(typingctx, value, kind):
    if not (isinstance(value, types.Integer) and isinstance(kind, types.NumberClass)
            and isinstance(kind.dtype, types.Integer)):
        raise TypingError(f"truncate takes an integer and an integer type such as np.uint16, got {value} and {kind}")

    def codegen(context, builder, sig, args):
        return bits(context, builder, args[0], sig.args[0], sig.return_type)

    return kind.dtype(value, kind), codegen


def _wrapping(name):
    @intrinsic
    def wrapping(typingctx, a, b):
        if not (isinstance(a, types.Integer) and isinstance(b, types.Integer)):
            raise TypingError(f"wrapping_{name} takes two integers, got {a} and {b}")

        def codegen(context, builder, sig, args):
            operands = (bits(context, builder, *pair, sig.return_type) for pair in zip(args, sig.args, strict=True))
            return getattr(builder, name)(*operands)

        return types.unliteral(a)(a, b), codegen

    return wrapping


if INTERPRETED:

    def truncate(value, kind):
        width = 8 * np.dtype(kind).itemsize
        low = operator.index(value) & ((1 << width) - 1)
        return kind(low - (1 << width) if low > np.iinfo(kind).max else low)

    def _wrapping(name):
        exact = getattr(operator, name)

        def wrapping(a, b):
            kind = type(a) if isinstance(a, np.integer) else np.int64
            return truncate(exact(operator.index(a), operator.index(b)), kind)

        return wrapping


wrapping_add, wrapping_sub, wrapping_mul = _wrapping("add"), _wrapping("sub"), _wrapping("mul")
