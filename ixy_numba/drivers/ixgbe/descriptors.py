"""The 82599's advanced descriptors (datasheet 7.1.6 receive, 7.2.3.2.4 transmit), legacy ones (7.1.5, 7.2.3.2.2)."""

import numpy as np

U = np.uint64

# Read format: `addr` is the buffer's address, `done` (the header buffer's) is 0. The device writes back over both.
RX = np.dtype([("addr", "u8"), ("done", "u8")])
DD, EOP = U(1), U(2)  # in `done`: descriptor done, end of packet
ERROR = U(1 << 29)  # RXE: the frame came with a MAC error (only when FCTRL.SBP lets those in)
LENGTH = U(0xFFFF << 32)  # in `done`: bytes in the buffer, without CRC; the place that a packet's handle has it

TX = np.dtype([("addr", "u8"), ("command", "u8")])
DATA = U(3 << 20 | 1 << 29)  # DTYP = data, DEXT = advanced
ONE_BUFFER = U(1 << 24 | 1 << 25)  # EOP and IFCS: a whole frame in one buffer, CRC by the device
RS = U(1 << 27)  # report status: write DD back
PAYLEN_SHIFT = U(46)
SENT = U(1 << 32)  # DD in the write-back

# Legacy: the same place for the buffer's address in both directions, and a write-back leaves it there.
LEGACY = np.dtype([("addr", "u8"), ("word", "u8")])  # `word`: length in bits 15:0; ONE_BUFFER and RS as above
LEGACY_DD, LEGACY_EOP, LEGACY_ERROR = U(1 << 32), U(1 << 33), U(1 << 40)  # received: as DD, EOP, ERROR above


def ring(descriptor, size):
    """A ring of `size` descriptors as one dtype."""
    return np.dtype([("desc", descriptor, (size,))])
