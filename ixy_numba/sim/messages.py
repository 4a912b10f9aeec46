"""The simulated 82599's interrupts as eventfds of a vfio-user client: MSI-X, MSI and INTx."""

import contextlib
import errno
import os

INTX, MSI, MSIX, FAULT = range(4)  # the last is never raised
_SIGNAL = (1).to_bytes(8, "little")


class Messages:
    """The port that a model's interrupts leave by. `function` is asked whether it may raise any now.

    An event that comes while its vector has no eventfd waits for one, as in the pending bits of MSI-X.
    """

    def __init__(self, function):
        self._function = function
        self._files = ({}, {}, {}, {})  # an index: {vector: eventfd}
        self._pending = set()
        self._level = self._masked = False

    def message(self, vector):
        if not self._function.mastering:
            return
        if self._files[MSIX]:
            if not self._signal(MSIX, vector):
                self._pending.add(vector)
        elif self._files[MSI]:
            self._signal(MSI, 0)

    def level(self, on):
        self._level = on
        self._raise_pin()

    def connect(self, index, vector, descriptor):
        """Use `descriptor` (None: nothing) for a vector from now on; it belongs to this object afterwards."""
        previous = self._files[index].get(vector)
        if previous is not None:
            os.close(previous)
        if descriptor is not None:
            os.set_blocking(descriptor, False)  # a client that never reads must not stop the device
        self._files[index][vector] = descriptor
        if index == MSIX and descriptor is not None and vector in self._pending:
            self._pending.discard(vector)
            self._signal(MSIX, vector)
        elif index == INTX:
            self._masked = False
            self._raise_pin()

    def disconnect(self, index):
        for descriptor in self._files[index].values():
            if descriptor is not None:
                os.close(descriptor)
        self._files[index].clear()
        if index == MSIX:
            self._pending.clear()

    def trigger(self, index, vector):
        """As if the device had raised it."""
        self._signal(index, vector)

    def mask_pin(self, masked):
        self._masked = masked
        self._raise_pin()

    def _raise_pin(self):
        """The pin is masked when it fires; once the client unmasks it, it fires again if it is still driven."""
        if self._level and not self._masked and self._function.pin_enabled and not (
                self._files[MSI] or self._files[MSIX]):
            self._masked = self._signal(INTX, 0)

    def _signal(self, index, vector):
        descriptor = self._files[index].get(vector)
        if descriptor is None:
            return False
        with contextlib.suppress(BlockingIOError):  # the counter is full: the client will see it anyway
            os.write(descriptor, _SIGNAL)
        return True

    def close(self):
        for index in range(len(self._files)):
            self.disconnect(index)


def check_eventfd(descriptor):
    """OSError unless `descriptor` is an eventfd: writing to anything else could block, or do harm."""
    if os.readlink(f"/proc/self/fd/{descriptor}") != "anon_inode:[eventfd]":
        raise OSError(errno.EINVAL, "expected an eventfd")
