"""The memory that a vfio-user client gives a device for DMA: mapped here, in the model's DMA map, and taken back."""

import fcntl
import os
import stat

from ..core.errors import IxyError, UsageError
from ..core.memory import map_file
from .state import MAX_MAPPINGS

READ, WRITE = 1, 2  # flags of DMA_MAP


class GuestMemory:
    """The DMA regions of one client. All errors are IxyError with the reason in one line."""

    def __init__(self, model):
        self._model = model
        self._regions = {}  # iova: (size, whether the device can reach it)

    def map(self, iova, size, offset, flags, descriptor):
        """Enter `size` bytes of a memory file from `offset` on at `iova`. The descriptor stays the caller's."""
        # DEVIATION(sim-dma-regions): regions without a file, or that are read-only (ROMs), are noted and not reached.
        if len(self._regions) == MAX_MAPPINGS:
            raise UsageError(f"more than {MAX_MAPPINGS} DMA regions")
        if size <= 0 or iova + size >= 1 << 64 or any(  # an end is a 64-bit word of the device's map
                iova < start + length and start < iova + size for start, (length, _) in self._regions.items()):
            raise UsageError(f"DMA region of {size} bytes at {iova:#x} is empty, reaches 2**64 or overlaps another")
        reached = descriptor is not None and bool(flags & WRITE)
        if reached:
            array = _map_file(descriptor, offset, size)
            self._model.map(iova, size, array.ctypes.data, owner=array)
        self._regions[iova] = size, reached

    def unmap(self, iova, size):
        """Take back all regions in the range; none may lie across its ends."""
        inside = [start for start, (length, _) in self._regions.items()
                  if start < iova + size and iova < start + length]
        if any(start < iova or start + self._regions[start][0] > iova + size for start in inside):
            raise UsageError(f"DMA regions lie across the ends of {iova:#x} + {size:#x}")
        for start in inside:
            if self._regions[start][1]:
                self._model.unmap(start)
            del self._regions[start]

    def clear(self):
        self.unmap(0, 1 << 64)


def _map_file(descriptor, offset, size):
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or offset + size > status.st_size:
        raise IxyError(f"DMA region of {size} bytes at {offset} of a file of {status.st_size}")
    try:
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:  # a client that cuts it off would kill the server with SIGBUS
        raise IxyError("DMA memory that could shrink; use a memfd, in QEMU memory-backend-memfd,share=on") from None
    try:
        return map_file(descriptor, offset, size)
    except OSError as error:
        raise IxyError(f"DMA region of {size} bytes cannot be mapped: {error}") from None
