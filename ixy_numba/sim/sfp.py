"""The SFP+ module in the simulated 82599's cage: a 256-byte EEPROM (SFF-8472) behind a bit-banged I2C bus."""

SLAVE = 0xA0 >> 1
IDLE, ADDRESS, OFFSET, STORE, SEND = range(5)
_VENDOR, _PART, _SERIAL, _DATE = b"ixy_numba", b"SIM-10G-SR", b"1", b"260101"


def contents():
    """The EEPROM of a 10GBASE-SR module, its two checksums included. The OUI is Intel's: drivers ask for it."""
    data = bytearray(256)
    data[:4], data[11:13] = bytes((0x03, 0x04, 0x07, 0x10)), bytes((0x06, 103))  # SFP, LC, SR; 64B/66B, 10.3 Gbit/s
    data[20:36], data[37:40] = _VENDOR.ljust(16), bytes.fromhex("001b21")
    data[40:56], data[68:84], data[84:92] = _PART.ljust(16), _SERIAL.ljust(16), _DATE.ljust(8)
    data[63], data[95] = sum(data[:63]) & 0xFF, sum(data[64:95]) & 0xFF
    return data


class SfpModule:
    """An I2C slave. `drive` tells it what the master does to the bus's two lines."""

    def __init__(self):
        self.data = contents()
        self._offset = self._shift = self._bits = 0
        self._phase, self._clock, self._line, self._out = IDLE, True, True, True
        self._acknowledged = False

    def drive(self, clock, line):
        """The levels of clock and data as the master sets them; returns whether the slave lets the data line be high.

        Data changes while the clock is low and counts when it rises. A change while it is high starts or stops.
        """
        if clock and self._clock:
            if line != self._line:
                self._phase, self._bits, self._shift, self._out = IDLE if line else ADDRESS, 0, 0, True
        elif clock:
            self._rise(line)
        elif self._clock:
            self._fall()
        self._clock, self._line = clock, line
        return self._out

    def _rise(self, line):
        if self._phase == SEND:
            self._acknowledged = not line  # of interest after the eighth bit
        elif self._bits < 8:
            self._shift = (self._shift << 1 | line) & 0xFF
        self._bits += 1

    def _fall(self):
        """Eight bits, then one in which the other side acknowledges by pulling the line low."""
        if self._phase == IDLE:
            return
        if self._bits == 9:
            self._bits = 0
            self._next_byte()
        if self._phase == SEND:
            self._out = self._bits == 8 or bool(self.data[self._offset] >> 7 - self._bits & 1)
        elif self._bits == 8 and self._phase == ADDRESS and self._shift >> 1 != SLAVE:
            self._phase, self._out = IDLE, True
        elif self._phase != IDLE:
            self._out = self._bits != 8

    def _next_byte(self):
        """A byte and its acknowledgement went over the bus."""
        byte, self._shift = self._shift, 0
        if self._phase == ADDRESS:
            self._phase = SEND if byte & 1 else OFFSET
        elif self._phase == OFFSET:
            self._offset, self._phase = byte, STORE
        elif self._phase == STORE:
            self._offset = self._offset + 1 & 0xFF  # the identity is write-protected
        elif self._phase == SEND:
            self._offset = self._offset + 1 & 0xFF
            if not self._acknowledged:
                self._phase, self._out = IDLE, True
