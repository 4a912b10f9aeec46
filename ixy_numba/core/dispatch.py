"""One name for many kernels: which one it means is decided when its caller is compiled, by the first argument."""

import functools

from numba import types
from numba.core.errors import TypingError
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature


def dispatched(stub, choose, returns=types.Type):
    """A function that calls the kernel which `choose(first argument, its class)` gives, on that slice of the arguments.

    Works on values in plain Python, and on types while Numba compiles a caller: that fails where the kernel's result is
    of a type that is none of `returns`.
    """

    @functools.wraps(stub)
    def call(*args):
        chosen, part = choose(args[0], type(args[0]))
        return chosen(*args[part])

    def at_compile_time(kinds):
        return choose(kinds[0], getattr(kinds[0], "instance_class", None))

    class Template(AbstractTemplate):
        key = call

        def generic(self, args, kws):
            chosen, part = at_compile_time(args)
            template, _, inner, kws = chosen.get_call_template(args[part], kws)
            result = template(self.context).apply(inner, kws).return_type
            return signature(result, *args) if isinstance(result, returns) else None

    infer_global(call, types.Function(Template))

    @lower_builtin(call, types.VarArg(types.Any))
    def lower(context, builder, sig, args):
        chosen, part = at_compile_time(sig.args)
        inner = signature(sig.return_type, *sig.args[part])
        return context.get_function(types.Dispatcher(chosen), inner)(builder, args[part])

    return call


def verb(stub):
    """Make `stub` (a name and its contract) a verb; drivers add `@stub.implement(QueueClass)` kernels."""
    kernels = {}

    def choose(queue, queue_class):
        if queue_class not in kernels:
            raise TypingError(f"{stub.__name__}: expected a queue of a device as the first argument, got {queue}")
        return kernels[queue_class], slice(None)

    def implement(queue_class):
        return lambda function: kernels.setdefault(queue_class, function)

    call = dispatched(stub, choose)
    call.implement = implement
    return call
