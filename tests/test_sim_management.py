"""The simulated 82599 beside its data path: EEPROM, semaphores, the SFP+ module over I2C, MDIO, flow director."""

import pytest
from sim_rig import MAC

from ixy_numba.sim.bus import SimBus
from ixy_numba.sim.spec import parse

EERD, EEC, SWSM, FWSM, SW_FW_SYNC, ESDP, I2CCTL = 0x10014, 0x10010, 0x10140, 0x10148, 0x10160, 0x20, 0x28
MSCA, MSRWD, FDIRCTRL, FDIRCMD, ANLP1, CTRL = 0x425C, 0x4260, 0xEE00, 0xEE2C, 0x42B0, 0x0
CLOCK_IN, CLOCK, DATA_IN, DATA = 1, 2, 4, 8


def open_device(device):
    return SimBus("sim", parse("sim", {"mac": MAC.hex(":"), "device": device}), manual=True)


@pytest.fixture
def bus():
    bus = open_device("10fb")
    yield bus
    bus.close()


# EEPROM


def word(bus, address):
    bus.write32(EERD, 1 | address << 2)
    value = bus.read32(EERD)
    assert value & 2 and value >> 2 & 0x3FFF == address
    return value >> 16


def test_a_read_is_done_at_once_and_only_when_it_is_started(bus):
    bus.write32(EERD, 0x3F << 2)
    assert bus.read32(EERD) == 0x3F << 2
    assert word(bus, 0x3FFF) == 0xFFFF  # nothing there


def test_the_size_is_that_of_an_eeprom_of_16_k_words(bus):
    bus.write32(EEC, 0)
    assert 1 << (bus.read32(EEC) >> 11 & 15) + 6 == 0x4000


def test_the_list_of_modules_knows_optical_ones_and_has_an_end(bus):
    at = word(bus, 0x2B) + 1
    kinds = []
    while word(bus, at) != 0xFFFF:
        kinds.append(word(bus, at))
        settings = word(bus, at + 1)
        assert word(bus, settings + 1) == 0xFFFF  # no settings for the analog part
        at += 2
    assert 5 in kinds and 6 in kinds


def test_the_firmware_says_a_version_that_drivers_trust(bus):
    section = word(bus, 0x0F)
    assert section not in (0, 0xFFFF)
    patch = word(bus, section + 4)
    assert word(bus, patch + 7) > 5


# Semaphores


def test_the_second_semaphore_is_granted_to_software(bus):
    assert bus.read32(SWSM) == 0
    bus.write32(SWSM, 3)
    assert bus.read32(SWSM) == 3
    bus.write32(SWSM, 0)
    assert bus.read32(SWSM) == 0


def test_resources_are_held_by_whoever_sets_their_bit(bus):
    bus.write32(SW_FW_SYNC, 0x7)
    assert bus.read32(SW_FW_SYNC) == 0x7
    assert bus.read32(FWSM) == 1 << 15
    bus.write32(FWSM, 0)
    assert bus.read32(FWSM) == 1 << 15


# I2C, driven bit by bit


class Master:
    """An I2C master on I2CCTL, slow and strict: it looks at the clock and the data that it sends."""

    def __init__(self, bus):
        self.bus = bus

    def set(self, clock, data):
        self.bus.write32(I2CCTL, CLOCK * clock | DATA * data)
        value = self.bus.read32(I2CCTL)
        assert bool(value & CLOCK_IN) == bool(clock)
        return bool(value & DATA_IN)

    def start(self):
        for clock, data in ((1, 1), (1, 0), (0, 0)):
            self.set(clock, data)

    def restart(self):
        self.set(0, 1)
        self.start()

    def stop(self):
        for clock, data in ((0, 0), (1, 0), (1, 1)):
            self.set(clock, data)

    def bit(self, data):
        self.set(0, data)
        got = self.set(1, data)
        self.set(0, data)
        return got

    def write(self, byte):
        """Whether it was acknowledged."""
        for k in range(7, -1, -1):
            assert self.bit(byte >> k & 1) == bool(byte >> k & 1), "somebody else pulls the line"
        return not self.bit(1)

    def read(self, acknowledge):
        byte = 0
        for _ in range(8):
            byte = byte << 1 | self.bit(1)
        self.bit(not acknowledge)
        return byte


def read_module(bus, offset, count, address=0xA0):
    """`count` bytes from `offset` on, or None if nobody answers."""
    master = Master(bus)
    master.start()
    if not master.write(address):
        master.stop()
        return None
    assert master.write(offset)
    master.restart()
    assert master.write(address | 1)
    data = bytes(master.read(acknowledge=k < count - 1) for k in range(count))
    master.stop()
    return data


def test_the_module_says_what_it_is(bus):
    data = read_module(bus, 0, 96)
    assert data[:4] == b"\x03\x04\x07\x10"  # SFP, two-wire identity, LC, 10GBASE-SR
    assert data[20:36] == b"ixy_numba       " and data[37:40] == b"\x00\x1b\x21"
    assert data[63] == sum(data[:63]) & 0xFF and data[95] == sum(data[64:95]) & 0xFF


@pytest.mark.parametrize("offset", [0, 3, 0x25, 0xFF])
def test_reads_may_begin_anywhere_and_wrap(bus, offset):
    whole = read_module(bus, 0, 256)
    assert read_module(bus, offset, 3) == bytes(whole[(offset + k) % 256] for k in range(3))


def test_writes_are_acknowledged_and_change_nothing(bus):
    before = read_module(bus, 0, 256)
    master = Master(bus)
    master.start()
    assert master.write(0xA0) and master.write(0) and master.write(0x55) and master.write(0xAA)
    master.stop()
    assert read_module(bus, 0, 256) == before


def test_reading_without_an_offset_goes_on_where_it_stopped(bus):
    whole = read_module(bus, 0, 20)
    read_module(bus, 0, 5)
    master = Master(bus)
    master.start()
    assert master.write(0xA1)
    assert master.read(acknowledge=False) == whole[5]
    master.stop()


def test_other_addresses_are_not_answered(bus):
    assert read_module(bus, 0, 1, address=0xA2) is None
    assert read_module(bus, 0, 1) == b"\x03"


def test_a_transfer_that_breaks_off_disturbs_nothing(bus):
    master = Master(bus)
    for bits in range(1, 30):
        master.start()
        for k in range(bits):
            master.bit(0xA0A0A0A0 >> 31 - k & 1)
        master.stop()
        assert read_module(bus, 0, 2) == b"\x03\x04"


def test_an_empty_cage():
    bus = open_device("10f7")
    bus.write32(ESDP, 0xFFFFFFFF)
    assert bus.read32(ESDP) & 4 == 0
    assert read_module(bus, 0, 1) is None
    bus.close()


def test_the_module_is_present_whatever_is_written(bus):
    bus.write32(ESDP, 0)
    assert bus.read32(ESDP) == 4


# MDIO


def mdio(bus, operation, address=0, port=1, device=3):
    bus.write32(MSCA, address | device << 16 | port << 21 | operation << 26 | 1 << 30)
    assert bus.read32(MSCA) & 1 << 30 == 0
    return bus.read32(MSRWD) >> 16


def test_no_phy_answers(bus):
    mdio(bus, 0, 2)
    assert mdio(bus, 3) == 0xFFFF


def test_a_phy_is_read_and_written(bus):
    phy = bus.model.management.phy
    phy.update({(1, 3, 2): 0x1234, (1, 3, 3): 0x5678, (1, 3, 4): 0x9ABC, (2, 3, 2): 0x1111})
    mdio(bus, 0, 2)
    assert mdio(bus, 3) == mdio(bus, 3) == 0x1234
    mdio(bus, 0, 2, port=2)
    assert mdio(bus, 3, port=2) == 0x1111 and mdio(bus, 3) == 0x1234  # each device has an address of its own
    assert [mdio(bus, 2) for _ in range(3)] == [0x1234, 0x5678, 0x9ABC]  # and step
    bus.write32(MSRWD, 0xBEEF)
    mdio(bus, 0, 4)
    mdio(bus, 1)
    assert phy[1, 3, 4] == 0xBEEF and mdio(bus, 3) == 0xBEEF
    assert bus.read32(MSRWD) & 0xFFFF == 0xBEEF
    mdio(bus, 0, 9)
    mdio(bus, 1)
    assert (1, 3, 9) not in phy


def test_mdio_moves_only_on_a_command(bus):
    bus.model.management.phy[1, 3, 2] = 0x1234
    mdio(bus, 0, 2)
    bus.write32(MSRWD, 0)
    bus.write32(MSCA, 3 << 16 | 1 << 21 | 3 << 26)
    assert bus.read32(MSRWD) == 0


# The rest


def test_flow_director_takes_commands_at_once(bus):
    bus.write32(FDIRCTRL, 2)
    assert bus.read32(FDIRCTRL) == 2 | 1 << 3
    bus.write32(FDIRCMD, 0x8001)
    assert bus.read32(FDIRCMD) == 0x8000


def test_link_training_is_over(bus):
    assert bus.read32(ANLP1) >> 16 & 15
    bus.write32(ANLP1, 0)
    assert bus.read32(ANLP1) >> 16 & 15


def test_a_reset_clears_the_control_register_too(bus):
    bus.write32(CTRL, 1 << 2 | 1 << 26)
    assert bus.read32(CTRL) == 0
