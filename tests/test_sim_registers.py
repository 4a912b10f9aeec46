"""The simulated 82599's registers, one behaviour of the datasheet at a time, with offsets typed by hand."""

import numpy as np
import pytest
from sim_rig import ENABLE, MAC, Rig, frame

from ixy_numba.core.errors import UsageError
from ixy_numba.core.registers import lint
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.sim import open_bus
from ixy_numba.sim import regs as m
from ixy_numba.sim.state import DEVICE, GORC, GPRC, MAPPING, PENDING, RX_QUEUE, TX_QUEUE

CTRL, STATUS, EEC, EERD, EICR, EICS, EIMS, EIMC = 0x0, 0x8, 0x10010, 0x10014, 0x800, 0x808, 0x880, 0x888
LINKS, AUTOC, RDRXCTL, SWSM, HLREG0, MAXFRS, FCTRL = 0x42A4, 0x42A0, 0x2F00, 0x10140, 0x4240, 0x4268, 0x5080


@pytest.fixture
def bus():
    bus = open_bus("sim", f"mac={MAC.hex(':')}", manual=True)
    yield bus
    bus.close()


@pytest.fixture
def rig():
    rig = Rig("frames=10")
    yield rig
    rig.close()


def test_the_tables_are_clean_and_do_not_contradict_the_drivers():
    assert lint(m.TABLE, r.BAR_SIZE) == []
    assert lint(m.ALL, r.BAR_SIZE) == []
    assert not set(m.TABLE) & set(r.TABLE)


def test_no_field_of_the_state_hides_behind_an_attribute_of_numpy_records():
    taken = set(dir(np.record))
    for dtype in (DEVICE, RX_QUEUE, TX_QUEUE, PENDING, MAPPING):
        assert not taken & set(dtype.names)


@pytest.mark.parametrize(("offset", "value"), [
    (CTRL, 0), (STATUS, 1 << 19 | 1 << 7), (EEC, 1 << 8 | 1 << 9 | 8 << 11), (LINKS, 1 << 30 | 3 << 28),
    (RDRXCTL, 1 << 3), (HLREG0, 1 | 2 | 1 << 10), (MAXFRS, 1518 << 16), (FCTRL, 0), (0x3000, 0), (0x4A80, 0x8100 << 16),
    (0x3C00, 512 << 10), (0x3C04, 0), (0xCC00, 160 << 10), (0x1014, 2), (0x1028, 0), (0x6028, 0), (0xA204 + 8, 0),
    (EIMS, 0)])
def test_reset_state(bus, offset, value):
    assert bus.read32(offset) == value


def test_the_address_comes_from_the_eeprom_with_its_valid_bit(bus):
    assert bus.read32(0xA200) == int.from_bytes(MAC[:4], "little")
    assert bus.read32(0xA204) == int.from_bytes(MAC[4:], "little") | 1 << 31


def test_unknown_registers_read_back_and_are_counted(bus):
    bus.write32(0x1F000, 0xDEADBEEF)
    assert bus.read32(0x1F000) == 0xDEADBEEF
    assert bus.model.unknown_accesses == {0x1F000: 2}


@pytest.mark.parametrize("offset", [-4, 2, 0x20000, 0x1FFFE])
def test_an_offset_that_is_no_register_is_refused(bus, offset):
    with pytest.raises(UsageError, match="expected a multiple of 4"):
        bus.read32(offset)


@pytest.mark.parametrize("offset", [STATUS, LINKS, 0x4000, 0x4074, 0x1030, 0x8D04])
def test_read_only_registers_ignore_writes(bus, offset):
    before = bus.read32(offset)
    bus.write32(offset, 0xFFFFFFFF)
    assert bus.read32(offset) == before


@pytest.mark.parametrize("bit", [3, 26])
def test_reset_clears_itself_and_everything_else(rig, bit):
    rig.step()
    rig.bus.write32(0xA200, 0)
    rig.bus.write32(EIMS, 5)
    rig.bus.write32(EICS, 5)
    rig.bus.write32(CTRL, 1 << bit)
    assert rig.bus.read32(CTRL) & (1 << 3 | 1 << 26) == 0
    assert rig.bus.read32(0x1028) & ENABLE == 0 and rig.bus.read32(0x6028) & ENABLE == 0
    assert rig.bus.read32(0x4074) == 0 and rig.bus.read32(0x1030) == 0  # GPRC, QPRC
    assert rig.bus.read32(0xA200) == int.from_bytes(MAC[:4], "little")
    assert rig.bus.read32(EIMS) == rig.bus.read32(EICR) == 0
    assert rig.bus.read32(0x1000) == 0 and rig.bus.read32(0x1010) == 0  # RDBAL, RDH
    assert rig.step() == 0  # and nothing moves


def test_reset_keeps_the_dma_map(rig):
    rig.write(r.CTRL, r.CTRL.RST)
    assert rig.model.state.mappings == 3


def test_master_disable_stops_dma_and_shows_in_status(rig):
    rig.bus.write32(CTRL, 1 << 2)
    assert rig.bus.read32(STATUS) & 1 << 19 == 0
    assert rig.step() == 0
    rig.bus.write32(CTRL, 0)
    assert rig.bus.read32(STATUS) & 1 << 19
    assert rig.step() == 10


def test_eeprom_auto_read_cannot_be_written_away(bus):
    bus.write32(EEC, 0)
    assert bus.read32(EEC) & 1 << 9


def read_word(bus, address):
    bus.write32(EERD, 1 | address << 2)
    value = bus.read32(EERD)
    assert value & 2 and value >> 2 & 0x3FFF == address
    return value >> 16


def test_the_eeprom_has_the_address_and_a_right_checksum(bus):
    total = sum(read_word(bus, k) for k in range(0x40))
    for pointer in range(0x03, 0x0F):  # the sections that drivers sum too
        at = read_word(bus, pointer)
        if at not in (0, 0xFFFF):
            total += sum(read_word(bus, at + 1 + k) for k in range(read_word(bus, at)))
    assert total & 0xFFFF == 0xBABA
    core = read_word(bus, 0x09)
    words = [read_word(bus, core + 1 + k) for k in range(3)]
    assert b"".join(word.to_bytes(2, "little") for word in words) == MAC


def test_autonegotiation_restart_clears_itself(bus):
    value = bus.read32(AUTOC)
    bus.write32(AUTOC, value | 1 << 12)
    assert bus.read32(AUTOC) == value


def test_dma_init_done_stays_set(bus):
    bus.write32(RDRXCTL, 2)
    assert bus.read32(RDRXCTL) == 2 | 1 << 3


def test_interrupt_causes_clear_on_read(bus):
    bus.write32(EICS, 0x30)
    assert bus.read32(EICR) == 0x30
    assert bus.read32(EICR) == 0


def test_interrupt_causes_clear_where_ones_are_written(bus):
    bus.write32(EICS, 0x31)
    bus.write32(EICR, 0x11)
    assert bus.read32(EICR) == 0x20


def test_interrupt_mask_is_set_and_cleared_by_a_pair(bus):
    bus.write32(EIMS, 0x0F)
    bus.write32(EIMS, 0x30)
    assert bus.read32(EIMS) == 0x3F
    bus.write32(EIMC, 0x05)
    assert bus.read32(EIMS) == 0x3A
    bus.write32(0xAA4, 3)  # EIMS_EX[1]
    bus.write32(0xAB4, 1)  # EIMC_EX[1]
    assert bus.read32(0xAA4) == 2 and bus.read32(0xAA0) == 0x3A


def test_the_semaphore_is_taken_by_reading(bus):
    assert bus.read32(SWSM) & 1 == 0
    assert bus.read32(SWSM) & 1 == 1
    bus.write32(SWSM, 0)
    assert bus.read32(SWSM) & 1 == 0


@pytest.mark.parametrize(("alias", "native"), [
    (0x2100, 0x1014), (0x2104, 0x1054), (0x2200, 0x100C), (0x223C, 0x13CC), (0x5400, 0xA200), (0x5404, 0xA204),
    (0x547C, 0xA27C), (0x5480, 0xEA00), (0x5818, 0xEC80), (0x5C00, 0xEB00), (0x5C7C, 0xEB7C), (0x5C80, 0xEB80),
    (0x5CA4, 0xEBA4)])
def test_the_82598s_addresses_lead_to_the_same_registers(bus, alias, native):
    bus.write32(alias, 0x1234)
    assert bus.read32(native) == 0x1234
    bus.write32(native, 0x4321)
    assert bus.read32(alias) == 0x4321


def test_a_queue_reads_as_enabled_once_it_is(bus):
    for control in (0x1028, 0x6028, 0xD028, 0x7028):
        bus.write32(control, ENABLE)
        assert bus.read32(control) & ENABLE
        bus.write32(control, 0)
        assert bus.read32(control) & ENABLE == 0


def test_a_queue_keeps_its_ring_until_it_is_enabled_again(rig):
    rig.write(r.RDLEN[0], 128)
    rig.step(5)
    assert int(rig.model.state.rx[0].length) == 64 and rig.read(r.RDH[0]) == 5
    rig.write(r.RXDCTL[0], 0)
    rig.write(r.RXDCTL[0], ENABLE)
    assert int(rig.model.state.rx[0].length) == 8


def test_counters_clear_on_read(rig):
    rig.step()
    for offset, value in ((0x4074, 10), (0x40D0, 10), (0x1030, 10), (0x405C, 10)):  # GPRC, TPR, QPRC, PRC64
        assert rig.bus.read32(offset) == value
        assert rig.bus.read32(offset) == 0


@pytest.mark.parametrize(("low", "high", "value"), [
    (0x4088, 0x408C, 640), (0x40C0, 0x40C4, 640), (0x1034, 0x1038, 600)])  # GORC and TOR with CRC, QBRC without
def test_octet_counters_clear_when_the_high_half_is_read(rig, low, high, value):
    rig.step()
    assert rig.bus.read32(low) == value
    assert rig.bus.read32(low) == value
    assert rig.bus.read32(high) == 0
    assert rig.bus.read32(low) == 0


def test_octets_that_arrive_between_the_halves_are_not_lost(rig):
    rig.step(4)
    assert rig.bus.read32(0x4088) == 256
    rig.step(6)
    assert rig.bus.read32(0x408C) == 0
    assert rig.bus.read32(0x4088) == 384


def test_octet_counters_have_36_bits_and_others_stick_at_32(rig):
    state = rig.model.state
    state.count[GORC] += np.uint64(5 << 32 | 7)
    assert rig.bus.read32(0x4088) == 7 and rig.bus.read32(0x408C) == 5
    state.count[GORC] += np.uint64(1 << 40)
    assert rig.bus.read32(0x4088) == 0xFFFFFFFF and rig.bus.read32(0x408C) == 15
    state.count[GPRC] += np.uint64(1 << 33)
    assert rig.bus.read32(0x4074) == 0xFFFFFFFF and rig.bus.read32(0x4074) == 0


def test_queues_count_where_rqsmr_and_tqsm_say():
    rig = Rig("frames=3", queues=2)
    rig.write(m.RQSMR[0], 5)
    rig.write(m.TQSM[0], 7 << 8)
    rig.send(frame(), q=1)
    rig.step()
    assert rig.read(m.ALL["QPRC"][5]) == 3 and rig.read(m.ALL["QPRC"][0]) == 0
    assert rig.read(m.ALL["QPTC"][7]) == 1 and rig.read(m.ALL["QBTC_L"][7]) == 60
    rig.close()


# The DMA map


def test_mappings_cannot_overlap_or_be_taken_back_twice(bus):
    bus.model.map(0x10000, 0x1000, 0x7000_0000)
    for iova, size in ((0x10000, 0x1000), (0xFFFF, 2), (0x10FFF, 1), (0xF000, 0x3000)):
        with pytest.raises(UsageError, match="overlaps"):
            bus.model.map(iova, size, 0)
    bus.model.map(0x11000, 1, 0)
    bus.model.unmap(0x10000)
    with pytest.raises(UsageError, match="no mapping begins there"):
        bus.model.unmap(0x10000)


@pytest.mark.parametrize(("iova", "size"), [
    (0, 0), (0, -1), (1 << 64, 1), ((1 << 64) - 1, 2), ((1 << 64) - 0x1000, 0x1000), (-1, 5)])
def test_a_mapping_outside_64_bits_is_refused(bus, iova, size):
    with pytest.raises(UsageError, match="expected a range that ends below"):
        bus.model.map(iova, size, 0)
    bus.model.map((1 << 64) - 0x1000, 0xFFF, 0)  # as high as can be, and nothing is left of what was refused


def test_the_map_has_a_limit(bus):
    for k in range(1024):
        bus.model.map(k << 12, 0x1000, 0)
    with pytest.raises(UsageError, match="all are in use"):
        bus.model.map(1 << 40, 1, 0)


def test_map_dma_gives_the_address_of_every_page():
    rig = Rig()
    memory = rig.tx_data
    rig.bus.unmap_dma(memory)
    pages = rig.bus.map_dma(memory)
    assert pages.tolist() == [memory.iova + k * memory.page_size for k in range(memory.size // memory.page_size)]
    rig.close()
