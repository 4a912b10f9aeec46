"""Registers as data: the 82599's table against literals typed from the datasheet, the lint, and checked access."""

import itertools
import re

import pytest

from ixy_numba.core import registers
from ixy_numba.core.errors import DeviceGoneError, IxyError, RegisterTimeout, UsageError
from ixy_numba.core.registers import ALL_ONES, Mode, Register, Registers, bit, bits, lint, reg, table
from ixy_numba.drivers.ixgbe import regs as r

# Typed by hand from the 82599 datasheet, chapter 8.2.3; nothing here is computed from the table.
OFFSETS = {
    "CTRL": 0x00000, "STATUS": 0x00008, "CTRL_EXT": 0x00018, "EEC": 0x10010, "EERD": 0x10014, "EICR": 0x00800,
    "EIMC": 0x00888, "FCTRL": 0x05080, "MTA[127]": 0x053FC, "RAL[1]": 0x0A208, "RAH[0]": 0x0A204, "MRQC": 0x0EC80,
    "RETA[31]": 0x0EB7C, "RSSRK[9]": 0x0EBA4, "RDBAL[0]": 0x01000, "RDBAH[1]": 0x01044, "RDLEN[2]": 0x01088,
    "RDH[0]": 0x01010, "RDT[63]": 0x01FD8, "SRRCTL[1]": 0x01054, "RXDCTL[3]": 0x010E8, "DCA_RXCTRL[0]": 0x0100C,
    "RDRXCTL": 0x02F00, "RXCTRL": 0x03000, "RXPBSIZE[7]": 0x03C1C, "DTXMXSZRQ": 0x08100, "DMATXCTL": 0x04A80,
    "TDBAL[0]": 0x06000, "TDBAH[0]": 0x06004, "TDLEN[1]": 0x06048, "TDH[0]": 0x06010, "TDT[63]": 0x06FD8,
    "TXDCTL[5]": 0x06168, "TXPBSIZE[1]": 0x0CC04, "TXPBTHRESH[7]": 0x0496C, "RTTDCS": 0x04900, "HLREG0": 0x04240,
    "MAXFRS": 0x04268, "AUTOC": 0x042A0, "LINKS": 0x042A4, "CRCERRS": 0x04000, "RLEC": 0x04040, "ROC": 0x040AC,
    "MPC[7]": 0x03FBC, "QPRC[1]": 0x01070, "QBRC_L[0]": 0x01034, "QBRC_H[15]": 0x013F8, "QPRDC[15]": 0x017F0,
    "GPTC": 0x04080, "GOTCL": 0x04090, "GOTCH": 0x04094,
}
MASKS = {
    "CTRL.RST": 0x04000000, "CTRL.LRST": 0x00000008, "CTRL.MASTER_DISABLE": 0x00000004,
    "STATUS.MASTER_ENABLED": 0x00080000, "EEC.AUTO_RD": 0x00000200, "FCTRL.MPE": 0x00000100, "FCTRL.UPE": 0x00000200,
    "FCTRL.BAM": 0x00000400, "RXDCTL.ENABLE": 0x02000000, "TXDCTL.ENABLE": 0x02000000, "TXDCTL.WTHRESH": 0x007F0000,
    "SRRCTL.DESCTYPE": 0x0E000000, "SRRCTL.DROP_EN": 0x10000000, "SRRCTL.BSIZEPACKET": 0x0000001F,
    "RDRXCTL.DMAIDONE": 0x00000008, "RDRXCTL.CRCSTRIP": 0x00000002, "RXCTRL.RXEN": 0x00000001,
    "DMATXCTL.TE": 0x00000001, "RTTDCS.ARBDIS": 0x00000040, "HLREG0.TXCRCEN": 0x00000001,
    "HLREG0.RXCRCSTRP": 0x00000002, "HLREG0.JUMBOEN": 0x00000004, "HLREG0.TXPADEN": 0x00000400,
    "HLREG0.LPBK": 0x00008000, "AUTOC.RESTART_AN": 0x00001000, "AUTOC.LMS": 0x0000E000, "LINKS.UP": 0x40000000,
    "LINKS.SPEED": 0x30000000, "RAH.AV": 0x80000000, "CTRL_EXT.NS_DIS": 0x00010000, "MAXFRS.MFS": 0xFFFF0000,
}


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_of_the_datasheet(name):
    register, _, index = name.rstrip("]").partition("[")
    found = getattr(r, register)
    assert (found[int(index)] if index else found).offset == OFFSETS[name]
    assert bool(index) == (found.count > 1)


@pytest.mark.parametrize("name", MASKS)
def test_fields_of_the_datasheet(name):
    register, field = name.split(".")
    assert getattr(getattr(r, register), field) == MASKS[name]


def test_the_table_is_clean_and_cites_its_sections():
    assert lint(r.TABLE, r.BAR_SIZE) == []
    assert all(register.at.startswith("8.2.3.") for register in r.TABLE.values())


@pytest.mark.parametrize("name", ["CRCERRS", "MPC", "QPRC", "QBRC_L", "QPRDC", "GPTC", "GOTCL", "GOTCH"])
def test_counters_clear_on_read(name):
    assert r.TABLE[name].mode is Mode.RC


# ---- the lint

@pytest.mark.parametrize("planted, words", [
    ({"B": reg(0x10, at="x")}, "B and A are both at 0x10"),
    ({"B": reg(0x08, stride=4, count=3, at="x")}, r"B\[2\] and A are both at 0x10"),
    ({"B": reg(0x22, at="x")}, "B at 0x22 is unaligned"),
    ({"B": reg(0x100, at="x")}, "outside the BAR of 0x100 bytes"),
    ({"B": reg(0xE0, stride=0x10, count=3, at="x")}, r"B\[2\] at 0x100 is .*outside the BAR"),
    ({"B": reg(-4, at="x")}, "outside the BAR"),
    ({"B": reg(0x20, at="x", LOW=bits(3, 0), HIGH=bits(7, 3))}, "B.HIGH overlaps another field"),
    ({"B": reg(0x20, at="x", HIGH=bits(32, 31))}, "B.HIGH has a bit beyond 31")])
def test_lint_finds(planted, words):
    found = lint(table({"A": reg(0x10, at="x"), **planted}), 0x100)
    assert len(found) == 1 and re.search(words, found[0]), found


def test_table_names_registers_and_nothing_else():
    space = {"A": reg(0, at="x"), "number": 3, "B": reg(4, count=2, at="y")}
    found = table(space)
    assert list(found) == ["A", "B"] and found["B"][1].name == "B[1]" and found["A"].name == "A"
    assert repr(found["A"]) == "<A at 0x0, read/write, x>"


# ---- fields

def test_fields_place_and_take_out():
    field = bits(11, 4)
    assert (field.of(0xAB), field.get(0xFFFFFABF), field) == (0xAB0, 0xAB, 0xFF0)
    assert bit(31).of(1) == 0x80000000 and bit(0).get(3) == 1
    for wrong in (0x100, -1):
        with pytest.raises(UsageError, match="does not fit the field with mask 0x00000ff0"):
            field.of(wrong)


def test_values_in_words():
    register = reg(0, at="x", ENABLE=bit(25), COUNT=bits(7, 0))
    assert register.show(0x02000012) == "0x02000012 (ENABLE COUNT=0x12)"
    assert register.show(0) == "0x00000000"


# ---- access

A = reg(0x10, at="x", GO=bit(0), N=bits(7, 4))
MANY = reg(0x40, at="x", stride=8, count=3)
READ_ONLY, WRITE_ONLY = reg(0x20, at="x", mode=Mode.RO), reg(0x24, at="x", mode=Mode.WO)
CLEAR_ON_READ, SEMAPHORE = reg(0x28, at="x", mode=Mode.RC), reg(0x2C, at="x", mode=Mode.RS)
WRITE_TO_CLEAR = reg(0x30, at="x", mode=Mode.W1C)
TABLE = table({name: value for name, value in globals().items() if isinstance(value, Register)})


class Device:
    """Memory behind Registers that notes every access."""

    def __init__(self):
        self.words, self.log = {}, []
        self.regs = Registers("dev", self.read, self.write)

    def read(self, offset):
        self.log.append(("r", offset))
        return self.words.get(offset, 0)

    def write(self, offset, value):
        self.log.append(("w", offset, value))
        self.words[offset] = value


@pytest.fixture
def device():
    return Device()


def test_read_write_set_clear(device):
    regs = device.regs
    regs.write(A, 0xF0)
    regs.set(A, A.GO)
    assert regs.read(A) == 0xF1
    regs.clear(A, A.N)
    assert device.words == {0x10: 0x01}
    regs.write(MANY[2], 5)
    assert device.words[0x50] == 5
    regs.clear(A, ALL_ONES)
    assert device.words[0x10] == 0


@pytest.mark.parametrize("access, words", [
    (lambda regs: regs.write(READ_ONLY, 1), "dev: READ_ONLY is read-only"),
    (lambda regs: regs.write(CLEAR_ON_READ, 1), "dev: CLEAR_ON_READ is clear on read"),
    (lambda regs: regs.set(READ_ONLY, 1), "dev: READ_ONLY is read-only"),
    (lambda regs: regs.read(WRITE_ONLY), "dev: WRITE_ONLY is write-only"),
    (lambda regs: regs.set(WRITE_ONLY, 1), "dev: WRITE_ONLY is write-only"),
    (lambda regs: regs.write(A, 1 << 32), "dev: A takes 32 bits, got 0x100000000"),
    (lambda regs: regs.write(A, -1), "dev: A takes 32 bits, got -0x1"),
    (lambda regs: regs.read(MANY), r"MANY is 3 registers: name one, MANY\[0\]"),
    (lambda regs: regs.write(MANY, 0), r"MANY is 3 registers"),
    (lambda regs: regs.read(MANY[3]), r"MANY\[3\]: expected an index from 0 to 2"),
    (lambda regs: regs.read(MANY[-1]), r"MANY\[-1\]: expected an index from 0 to 2")])
def test_refused_access_never_writes(device, access, words):
    with pytest.raises(IxyError, match=words):
        access(device.regs)
    assert not [entry for entry in device.log if entry[0] == "w"]


def test_the_other_modes_are_open(device):
    device.regs.write(WRITE_ONLY, 1)
    device.regs.write(WRITE_TO_CLEAR, ALL_ONES)
    assert [device.regs.read(one) for one in (READ_ONLY, CLEAR_ON_READ, SEMAPHORE)] == [0, 0, 0]


def test_trace_sees_every_access_in_order(device):
    seen = []
    device.regs.trace = lambda *entry: seen.append((*entry, len(device.log)))
    device.regs.set(A, A.GO)
    device.regs.write(MANY[1], 9)
    # a write is told before it happens (the device may never answer again), a read after
    assert [(way, one.name, value, done) for way, one, value, done in seen] == [
        ("R", "A", 0, 1), ("W", "A", 1, 1), ("W", "MANY[1]", 9, 2)]


def answers(device, *values):
    """Let A read as these values, the last for ever."""
    sequence = itertools.chain(values, itertools.repeat(values[-1]))
    device.regs = Registers("dev", lambda offset: next(sequence), device.write)
    return device.regs


def test_wait_until_set_and_until_a_value(device):
    assert answers(device, 0, 0, 0x31).wait(A, A.GO) == 0x31
    assert answers(device, 0x11, 0x21).wait(A, A.N, A.N.of(2)) == 0x21
    assert answers(device, 1, 0).wait(A, A.GO, 0) == 0


def test_wait_ends_at_its_deadline(device):
    with pytest.raises(RegisterTimeout) as caught:
        answers(device, 0x20).wait(A, A.GO, timeout_s=0.01, hint="is it on?")
    assert str(caught.value) == (
        "dev: A is 0x00000020 (N=0x2), expected 0x1 under mask 0x1 within 0.01 s; is it on?")
    assert isinstance(caught.value, TimeoutError) and caught.value.exit_code == 1


def test_wait_looks_once_more_after_its_deadline(device, monkeypatch):
    """A thread that did not run for long must not blame the device."""
    clock = iter([0.0, 0.5, 99.0])
    monkeypatch.setattr(registers.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(registers.time, "sleep", lambda seconds: None)
    assert answers(device, 0, 1).wait(A, A.GO, timeout_s=1.0) == 1


def test_a_device_that_is_gone_is_told_at_once(device):
    with pytest.raises(RegisterTimeout, match="A is 0xffffffff .*the device is gone or its memory space is off"):
        answers(device, ALL_ONES).wait(A, A.GO, timeout_s=3600)


def test_all_ones_is_a_value_unless_another_register_says_that_the_device_is_gone(device):
    regs = Registers("dev", device.read, device.write, never_ones=READ_ONLY)
    device.words[0x10] = ALL_ONES
    assert regs.read(A) == ALL_ONES  # READ_ONLY reads 0
    device.words[0x20] = ALL_ONES
    for access in (lambda: regs.read(A), lambda: regs.set(A, A.GO), lambda: regs.wait(A, A.GO)):
        with pytest.raises(DeviceGoneError, match="dev: A and READ_ONLY read all ones, the device is gone"):
            access()


def test_dump_shows_what_can_be_read_without_a_change(device):
    device.words.update({0x10: 0x11, 0x48: 3, 0x28: 9, 0x2C: 9})
    lines = device.regs.dump(TABLE)
    assert lines == [
        "A              0x00010  0x00000011 (GO N=0x1)", "MANY[1]        0x00048  0x00000003",
        "READ_ONLY      0x00020  0x00000000", "WRITE_TO_CLEAR 0x00030  0x00000000"]
    assert {offset for _, offset in device.log} == {0x10, 0x20, 0x30, 0x40, 0x48, 0x50}
