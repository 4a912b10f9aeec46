"""The errors a user can meet. Each message says: device, expected, seen, remedy."""

import traceback


class IxyError(Exception):
    """Something outside the program is wrong (device, memory, file, peer). Apps exit with code 1."""

    exit_code = 1


class UsageError(IxyError, ValueError):
    """The caller asked for something that cannot be (option, device spec, argument). Apps exit with code 2."""

    exit_code = 2


class RegisterTimeout(IxyError, TimeoutError):
    """A register did not take the expected value before its deadline."""


class DeviceGoneError(IxyError):
    """The device does not answer any more: it was removed, or lost its power or its memory space."""


class DmaError(IxyError, MemoryError):
    """DMA memory could not be had, or cannot be reached by the device."""


class KernelError(IxyError, RuntimeError):
    """A kernel was stopped by one of its own checks: an index, an overflow, a division by zero."""

    @classmethod
    def of(cls, error):
        """The exception that a compiled kernel ended with, as one line that names kernel, file and line."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        return cls(f"{place.filename}:{place.lineno}: kernel {place.name}: {type(error).__name__}: {error}")


class ClosedError(IxyError, ValueError):
    """A device, a pool or DMA memory was used after it was closed."""
