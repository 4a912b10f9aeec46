"""ixy_numba: network drivers in Python whose hot loop Numba compiles.

    handler, DROP, run, Forwarder         write a handler, run it between receive and transmit
    open_device, open_devices             bring devices up
    rx_batch, tx_batch, alloc_batch, free_batch, packet, resize, kernel
                                          the batch verbs, for loops of your own
    wrapping_add, wrapping_sub, wrapping_mul, truncate
                                          arithmetic that is meant to wrap; any other that overflows is an error
"""

from .cli import run
from .core.errors import ClosedError, DmaError, IxyError, KernelError, RegisterTimeout, UsageError
from .core.integers import truncate, wrapping_add, wrapping_mul, wrapping_sub
from .core.jit import kernel
from .core.packet import Packet, packet, resize
from .core.pool import MAX_BATCH, Pool, alloc_batch, free_batch
from .datapath import DROP, handler, rx_batch, tx_batch
from .device import Statistics, open_device, open_devices
from .forwarder import Forwarder

__version__ = "0.1.0"
__all__ = [
    "DROP", "MAX_BATCH", "ClosedError", "DmaError", "Forwarder", "IxyError", "KernelError", "Packet", "Pool",
    "RegisterTimeout", "Statistics", "UsageError", "alloc_batch", "free_batch", "handler", "kernel", "open_device",
    "open_devices", "packet", "resize", "run", "rx_batch", "truncate", "tx_batch", "wrapping_add", "wrapping_mul",
    "wrapping_sub",
]
