"""The errors a user can meet. Each message says: device, expected, seen, remedy."""


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


class ClosedError(IxyError, ValueError):
    """A device, a pool or DMA memory was used after it was closed."""
