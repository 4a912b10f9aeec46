"""The simulated 82599's interrupts: causes, masks, auto-clear, auto-mask, moderation and vectors. Section 7.3."""

import pytest
from sim_rig import TX_WHOLE, Rig, frame

from ixy_numba.drivers.ixgbe import regs as r

EICR, EICS, EIMS, EIMC, EIAC, EIAM, GPIE = 0x800, 0x808, 0x880, 0x888, 0x810, 0x890, 0x898
EIMS_EX, EIMC_EX, EICS_EX, EIAM_EX, IVAR, IVAR_MISC, EITR = 0xAA0, 0xAB0, 0xA90, 0xAD0, 0x900, 0xA00, 0x820
MULTIPLE_MSIX, OCD, EIAME = 1 << 4, 1 << 5, 1 << 30
LSC, OTHER_VALID = 1 << 20, 0x80 << 8


class Port:
    """Where the interrupts go: everything that arrives, in order."""

    def __init__(self):
        self.events, self.on = [], False

    def message(self, vector):
        self.events.append(vector)

    def level(self, on):
        self.on = on

    def take(self):
        events, self.events = self.events, []
        return events


class Wired(Rig):
    """A rig whose interrupts arrive in `self.port`; `msix`: with GPIE set up for many vectors."""

    def __init__(self, text="frames=100000", msix=True, **more):
        super().__init__(text, **more)
        self.port = Port()
        self.model.connect(self.port)
        if msix:
            self.reg(GPIE, MULTIPLE_MSIX)
            self.reg(EIAC, 0xFFFF)

    def reg(self, offset, value):
        self.bus.write32(offset, value)

    def get(self, offset):
        return self.bus.read32(offset)


@pytest.fixture
def wired():
    rigs = []

    def make(*args, **more):
        rigs.append(Wired(*args, **more))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_a_masked_cause_is_remembered_and_sent_once_unmasked(wired):
    rig = wired(msix=False)
    rig.reg(EICS, 1)
    assert rig.port.take() == [] and not rig.port.on
    rig.reg(EIMS, 1)
    assert rig.port.take() == [0] and rig.port.on
    rig.reg(EIMS, 2)
    rig.reg(EICS, 1)
    assert rig.port.take() == []  # it was set already
    rig.reg(EICS, 2)
    assert rig.port.take() == [0]
    rig.reg(EICR, 3)
    assert not rig.port.on
    rig.reg(EICS, 1)
    assert rig.port.take() == [0] and rig.port.on
    rig.reg(EIMC, 1)
    assert not rig.port.on
    rig.reg(EIMS, 1)
    assert rig.port.take() == [0]


def test_reading_the_causes_clears_them_but_eics_only_shows_them(wired):
    rig = wired(msix=False)
    rig.reg(EICS, 5 | LSC)
    assert rig.get(EICS) == 5 | LSC == rig.get(EICS)
    assert rig.get(EICR) == 5 | LSC and rig.get(EICR) == 0


def test_ocd_keeps_the_queues_causes_on_a_read(wired):
    rig = wired(msix=False)
    rig.reg(GPIE, OCD)
    rig.reg(EICS, 5 | LSC)
    assert rig.get(EICR) == 5 | LSC and rig.get(EICR) == 5
    rig.reg(EICR, 1)
    assert rig.get(EICR) == 4


def test_reading_the_causes_masks_what_eiam_says(wired):
    rig = wired(msix=False)
    rig.reg(EIAM, 1 | LSC)
    rig.reg(EIMS, 3 | LSC)
    rig.reg(EICS, 1)
    rig.get(EICR)
    assert rig.get(EIMS) == 2
    rig.reg(EIMS, 1)
    rig.reg(EICR, 1)
    assert rig.get(EIMS) == 2  # writing does too


@pytest.mark.parametrize(("queue", "offset", "shift"), [(0, 0x900, 0), (1, 0x900, 16)])
@pytest.mark.parametrize("vector", [0, 5, 15, 16, 63])
def test_ivar_leads_a_receive_queue_to_its_vector(wired, queue, offset, shift, vector):
    rig = wired(queues=2)
    if queue:  # everything is hashed, and queue 1 gets it
        rig.write(r.MRQC, 1 | 1 << 22 | 1 << 17)
        for k in range(32):
            rig.write(r.RETA[k], 0x01010101)
    rig.reg(offset, (0x80 | vector) << shift)
    rig.reg(EIMS_EX + 4 * (vector >= 32), 1 << vector % 32)
    rig.step(3)
    assert rig.port.take() == [vector]
    rig.step(1)
    assert rig.port.take() == [vector]  # its cause was cleared when it was sent


def test_ivar_leads_a_transmit_queue_to_its_vector_when_status_is_reported(wired):
    rig = wired("")
    rig.reg(IVAR, 0x82 << 8)
    rig.reg(EIMS, 4)
    rig.send(frame(), command=TX_WHOLE)
    rig.step()
    assert rig.port.take() == []
    rig.send(frame())
    rig.step()
    assert rig.port.take() == [2]


def test_an_entry_without_its_valid_bit_raises_nothing(wired):
    rig = wired()
    rig.reg(IVAR, 0x02)
    rig.reg(EIMS, 0xFFFF)
    rig.step(3)
    assert rig.port.take() == [] and rig.get(EICR) == 0


def test_without_auto_clear_a_vector_fires_again_only_after_its_cause_was_cleared(wired):
    rig = wired()
    rig.reg(EIAC, 0)
    rig.reg(IVAR, 0x80)
    rig.reg(EIMS, 1)
    rig.step(1)
    rig.step(1)
    assert rig.port.take() == [0] and rig.get(EICS) == 1
    rig.reg(EICR, 1)
    rig.step(1)
    assert rig.port.take() == [0]


def test_auto_mask_silences_a_vector_until_it_is_unmasked_and_nothing_is_lost(wired):
    rig = wired()
    rig.reg(GPIE, MULTIPLE_MSIX | EIAME)
    rig.reg(EIAM_EX, 0xFFFFFFFF)
    rig.reg(IVAR, 0x80)
    rig.reg(EIMS_EX, 3)
    rig.step(1)
    assert rig.port.take() == [0] and rig.get(EIMS_EX) == 2
    rig.step(1)  # while it is masked
    assert rig.port.take() == []
    rig.reg(EIMS_EX, 1)
    assert rig.port.take() == [0] and rig.get(EIMS_EX) == 2
    rig.reg(EIMS_EX, 1)
    assert rig.port.take() == []
    rig.reg(EICS_EX, 2)
    assert rig.port.take() == [1]


def test_reading_causes_masks_nothing_while_messages_do(wired):
    rig = wired()
    rig.reg(GPIE, MULTIPLE_MSIX | EIAME)
    rig.reg(EIAM, 0xFFFF)
    rig.reg(EIMS, 2)
    rig.get(EICR)
    assert rig.get(EIMS) == 2


def test_other_causes_have_a_vector_of_their_own(wired):
    rig = wired()
    rig.reg(IVAR_MISC, 3 << 8 | OTHER_VALID)
    rig.model.set_link(False)
    assert rig.port.take() == []
    rig.reg(EIMS, LSC)
    assert rig.port.take() == [3]
    rig.model.set_link(True)
    assert rig.port.take() == []  # the cause is set still
    rig.reg(EICR, LSC)
    rig.model.set_link(False)
    assert rig.port.take() == [3]
    rig.reg(EIAC, LSC)
    rig.reg(EICR, LSC)
    rig.model.set_link(True)
    assert rig.port.take() == [3] and rig.get(EICS) == 0  # cleared when it was sent


def test_moderation_holds_messages_back_and_loses_none(wired):
    rig = wired()
    rig.reg(EITR, 50 << 3)  # 100 us
    rig.reg(IVAR, 0x80)
    rig.reg(EIMS, 1)
    fired_at, now = [], 0
    for _ in range(100):
        rig.step(1, elapsed_us=7)
        now += 7
        fired_at += [now] * len(rig.port.take())
    gaps = [b - a for a, b in zip(fired_at, fired_at[1:], strict=False)]
    assert fired_at[0] == 7 and set(gaps) == {105}  # the first step past 100 us
    rig.model.state.limit = rig.model.state.taken  # no more frames: the last cause still gets its message
    rig.step(1, elapsed_us=99)
    assert rig.port.take() in ([], [0])
    rig.step(0, elapsed_us=200)
    rig.step(0, elapsed_us=200)
    assert rig.get(EICS) == 0


def test_each_vector_is_moderated_for_itself(wired):
    rig = wired()
    rig.reg(EITR, 511 << 3)
    rig.reg(0x12300, 511 << 3)  # of vector 24
    rig.reg(EIMS_EX, 1 << 24 | 3)
    rig.step(0, elapsed_us=1)
    for _ in range(3):
        rig.reg(EICS_EX, 1 << 24 | 3)
    assert rig.port.take() == [0, 1, 24, 1, 1]
    rig.step(0, elapsed_us=1021)
    assert rig.port.take() == []
    rig.step(0, elapsed_us=1)
    assert rig.port.take() == [0, 24]


def test_a_reset_forgets_everything(wired):
    rig = wired(msix=False)
    rig.reg(IVAR, 0x80)
    rig.reg(EIMS, 1)
    rig.reg(EICS, 1)
    rig.write(r.CTRL, r.CTRL.RST)
    assert not rig.port.on and rig.get(EIMS) == rig.get(EICS) == 0
    assert int(rig.model.state.rx[0].cause) == 0


def test_pulling_the_cable_shows_stops_frames_and_raises_lsc(wired):
    rig = wired(msix=False)
    rig.reg(EIMS, LSC)
    rig.model.set_link(False)
    assert rig.get(0x42A4) & 1 << 30 == 0 and rig.get(0x8) & 1 << 7 == 0
    assert rig.port.on and rig.get(EICR) == LSC and not rig.port.on
    assert rig.step() == 0
    rig.model.set_link(False)
    assert not rig.port.on  # no change, no cause
    rig.write(r.CTRL, r.CTRL.RST)
    assert rig.get(0x42A4) & 1 << 30 == 0  # a reset does not plug it in
    rig.model.set_link(True)
    assert rig.get(0x42A4) & 1 << 30


def test_the_other_end_of_a_cable_sees_that_it_was_pulled():
    here, there = Rig("link=pulled"), Rig("link=pulled")
    there.close()
    assert here.read(r.LINKS) & r.LINKS.UP == 0 and here.bus.read32(EICR) == LSC
    here.close()
