"""The EEPROM of the simulated 82599: its address, the sections that drivers look for, a checksum that they accept."""

SIZE = 0x4000  # 16-bit words that EERD can address
NOTHING = 0xFFFF  # a pointer to no section, the end of a list
CHECKSUM, SUM = 0x3F, 0xBABA

# Words of the first 64 that point to sections, and where those are here
CORE_POINTER, CORE = 0x09, 0x50
FIRMWARE_POINTER, FIRMWARE, PATCH = 0x0F, 0x80, 0x90
MODULES_POINTER, MODULES, MODULE_SETTINGS = 0x2B, 0x60, 0x70
SECOND_ADDRESS_POINTER, WWN_POINTER = 0x28, 0x27
PART_NUMBER = 0x15  # two words
# Kinds of SFP+ modules: a copper cable, an optical module at the first and at the second port
MODULE_KINDS = (3, 5, 6)


class Eeprom:
    """`words`, 16 bits each. The LAN core section has the MAC; word 0x3F makes the sum of words and sections 0xBABA."""

    def __init__(self, mac):
        self.mac = mac
        self.words = [NOTHING] * SIZE
        self.words[: CHECKSUM + 1] = [0] * (CHECKSUM + 1)
        for pointer, at, content in (
                (CORE_POINTER, CORE, [3, *(int.from_bytes(mac[k : k + 2], "little") for k in (0, 2, 4))]),
                # Which settings of the analog part go with a kind of module: a list of pairs. Here none are needed.
                (MODULES_POINTER, MODULES, [7, *sum(([kind, MODULE_SETTINGS] for kind in MODULE_KINDS), []), NOTHING]),
                (None, MODULE_SETTINGS, [1, NOTHING]),
                # The firmware's sections: drivers ask for its version before they trust optical modules to it.
                (FIRMWARE_POINTER, FIRMWARE, [7, NOTHING, NOTHING, NOTHING, PATCH, NOTHING, NOTHING, NOTHING]),
                (None, PATCH, [7, 0, 0, 0, 0, 0, 0, 6])):
            if pointer is not None:
                self.words[pointer] = at
            self.words[at : at + len(content)] = content
        self.words[SECOND_ADDRESS_POINTER] = self.words[WWN_POINTER] = NOTHING
        self.words[PART_NUMBER : PART_NUMBER + 2] = [0x8259, 0x9000]
        section = self.words[CORE + 1 : CORE + 1 + self.words[CORE]]  # the only one that the checksum covers
        self.words[CHECKSUM] = (SUM - sum(self.words[:CHECKSUM]) - sum(section)) & 0xFFFF

    @property
    def mac_words(self):
        """The address as RAL and RAH have it."""
        return int.from_bytes(self.mac[:4], "little"), int.from_bytes(self.mac[4:], "little")
