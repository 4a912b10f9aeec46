"""A kernel in a thread of its own: it holds no GIL there, and the main thread stays free for Ctrl-C."""

import contextlib
import threading
import time

from numba.core.dispatcher import Dispatcher
from numba.core.typing.typeof import typeof

from .errors import KernelError


class KernelThread(threading.Thread):
    """Runs `kernel(*args)` once started.

    Attributes: `began` and `ended`, time.monotonic() around the run, without the time to compile or load it (None
    before); `error`, what it raised, a KernelError where a check stopped it. It is a daemon: set the kernel's stop word
    and join it.
    """

    def __init__(self, kernel, *args):
        super().__init__(name=kernel.__name__, daemon=True)
        self.kernel, self.args = kernel, args
        self.began = self.ended = self.error = None

    def run(self):
        try:
            with contextlib.suppress(ValueError):  # arguments without a type: the call will say what is wrong with them
                if isinstance(self.kernel, Dispatcher):
                    self.kernel.compile(tuple(map(typeof, self.args)))
            self.began = time.monotonic()
            self.kernel(*self.args)
        except (ArithmeticError, LookupError) as error:
            self.error = KernelError.of(error)
            self.error.__cause__ = error
        except BaseException as error:
            self.error = error
        finally:
            self.ended = time.monotonic()
