"""The EEPROM of the simulated 82599: its MAC address and a checksum that drivers accept."""

SIZE = 0x4000  # 16-bit words that EERD can address
CORE_POINTER, CORE, CHECKSUM, SUM = 0x09, 0x50, 0x3F, 0xBABA


class Eeprom:
    """`words`, 16 bits each. The LAN core section has the MAC; word 0x3F makes the sum of words and sections 0xBABA."""

    def __init__(self, mac):
        self.mac = mac
        self.words = [0xFFFF] * SIZE
        self.words[: CHECKSUM + 1] = [0] * (CHECKSUM + 1)
        section = [int.from_bytes(mac[k : k + 2], "little") for k in (0, 2, 4)]
        self.words[CORE_POINTER] = CORE
        self.words[CORE : CORE + 4] = [len(section), *section]
        self.words[CHECKSUM] = (SUM - sum(self.words[:CHECKSUM]) - sum(section)) & 0xFFFF

    @property
    def mac_words(self):
        """The address as RAL and RAH have it."""
        return int.from_bytes(self.mac[:4], "little"), int.from_bytes(self.mac[4:], "little")
