"""A kernel in a thread of its own: it holds no GIL there, and the main thread stays free for Ctrl-C."""

import contextlib
import os
import threading
import time
import weakref

import numpy as np
from numba.core.dispatcher import Dispatcher
from numba.core.typing.typeof import typeof

from .errors import IxyError, KernelError

AT_ONCE = np.uint64(2)  # in a stop word: now, not after what can still be finished


class KernelThread(threading.Thread):
    """Runs `kernel(*args)` once started.

    Attributes: `began` and `ended`, time.monotonic() around the run, without the time to compile or load it (None
    before); `error`, what it raised, a KernelError where a check stopped it. It is a daemon: `tell` it to stop and join
    it. Closing a device, a pool or memory that it works on does that: see `stop_kernels`. `wake`: an eventfd that ends
    the kernel's sleep, and is the thread's from now on.
    """

    def __init__(self, kernel, *args, wake=None):
        super().__init__(name=kernel.__name__, daemon=True)
        self.kernel, self.args, self._wake, self._lock = kernel, args, wake, threading.Lock()
        self.began = self.ended = self.error = None
        self._close_wake = None if wake is None else weakref.finalize(self, os.close, wake)

    def tell(self, stop):
        """Set the kernel's stop words to `stop`, and wake it."""
        for record in self.records():
            if "stop" in record.dtype.names:
                record.stop = stop
        with self._lock:
            if self._close_wake is not None and self._close_wake.alive:
                os.eventfd_write(self._wake, 1)

    def end(self, timeout_s):
        """Wait `timeout_s` seconds for its end; returns whether it has ended.

        The time that it is being compiled does not count: that can take long, and cannot be interrupted.
        """
        asked = time.monotonic()
        while self.is_alive() and (self.began is None or time.monotonic() - max(asked, self.began) < timeout_s):
            self.join(0.005)
        return not self.is_alive()

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
            for record in self.records():  # a kernel that ended by an error keeps no queue
                if "busy" in record.dtype.names:
                    record.busy = 0
            with self._lock:
                if self._close_wake is not None:
                    self._close_wake()

    def records(self):
        """All records among the arguments, however deep in tuples."""
        found = list(self.args)
        for value in found:  # which grows
            if isinstance(value, tuple):
                found.extend(value)
        return [value for value in found if isinstance(value, np.record)]


def stop_kernels(uses, timeout_s):
    """End every KernelThread with a record in its arguments for which `uses(record)`: tell it to stop, wait for it.

    IxyError if one that is compiled has not ended after `timeout_s` seconds.
    """
    threads = [thread for thread in threading.enumerate() if isinstance(thread, KernelThread)
               and thread is not threading.current_thread() and any(map(uses, thread.records()))]
    for thread in threads:
        thread.tell(AT_ONCE)
    for thread in threads:
        if not thread.end(timeout_s):
            raise IxyError(f"{thread.name} still runs on it {timeout_s} s after it was told to stop; nothing was "
                           "unmapped, end that kernel and close again")

