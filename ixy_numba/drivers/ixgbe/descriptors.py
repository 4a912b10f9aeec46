"""The advanced descriptors of the 82599: receive in datasheet section 7.1.6, transmit in 7.2.3.2.4."""

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


def ring(descriptor, size):
    """A ring of `size` descriptors as one dtype."""
    return np.dtype([("desc", descriptor, (size,))])
