"""The simulated 82599's interrupts: causes, masks, moderation, and which message goes out. Section 7.3."""

from functools import partial

from ..core.registers import ALL_ONES
from ..drivers.ixgbe import regs as r
from . import regs as m

NEVER = (1 << 64) - 1
RTXQ, OTHER = 0xFFFF, 0x7FFF0000  # EICR's halves: causes of the queues, all others
LINK_CHANGE = 1 << 20  # LSC in EICR and its masks
MODERATION_S = 2e-6  # the unit of EITR.INTERVAL


def ones(word):
    """The numbers of the bits that are set in `word`, lowest first."""
    while word:
        yield (word & -word).bit_length() - 1
        word &= word - 1


def _word(name):
    """An attribute that is a word of the device's state."""
    return property(lambda self: int(self._state[name]), lambda self, value: self._state.__setitem__(name, value))


class Interrupts:
    """What `model` raises. `port.message(vector)` sends an MSI-X message (or MSI as number 0), `port.level(on)`
    drives the INTx pin; without a port nothing is raised, causes and masks work all the same.

    Queue causes are one 64-bit word: bits 15:0 are EICR's, and with GPIE.MULTIPLE_MSIX bit n is that of vector n. The
    engine adds to `state.happened`; it asks for `deliver` when something in `state.armed` happens, or at `state.alarm`.
    With `state.direct` vectors it sends the messages of queues itself: see `events`.
    """

    _queue_causes, _queue_mask, _queue_sent = _word("causes"), _word("mask"), _word("sent")

    def __init__(self, model):
        self._model, self._state = model, model.state
        self.port, self.pin = None, False  # whether the pin is driven
        self._other_causes = self._other_mask = self._other_sent = 0
        self._next = self._state.next
        self._state.moderation = round(MODERATION_S * model.per_second)
        model.on_read(r.EICR, self._read_causes)
        model.on_read(m.EICS, self._causes)  # the same, cleared by nothing
        model.on_read(m.EIMS, lambda: self._queue_mask & RTXQ | self._other_mask)
        model.on_write(r.EICR, self._clear_causes)
        model.on_write(m.EICS, self._set_causes)
        model.on_write(m.EIMS, self._set_mask)
        model.on_write(r.EIMC, self._clear_mask)
        for k in range(2):
            model.on_read(r.EIMS_EX[k], lambda k=k: self._queue_mask >> 32 * k & ALL_ONES)
            model.on_write(m.EICS_EX[k], partial(self._set_vectors, k))
            model.on_write(r.EIMS_EX[k], partial(self._set_vector_mask, k))
            model.on_write(r.EIMC_EX[k], partial(self._clear_vector_mask, k))
        model.after_write(r.GPIE, lambda index: self.deliver())
        model.after_write(r.IVAR, self._latch_allocation)

    def reset(self):
        self._queue_causes = self._queue_mask = self._queue_sent = 0
        self._other_causes = self._other_mask = self._other_sent = 0
        self._state.happened = self._state.armed = 0
        self._state.alarm = NEVER
        self._state.rx["cause"] = self._state.tx["cause"] = 0
        self.drive(False)

    def drive(self, on):
        """Drive the INTx pin or not; what is driven already may be driven again, for a port that did not let it out."""
        self.pin = on
        if self.port:
            self.port.level(on)

    def raise_other(self, causes):
        """Something that is no queue's: `causes` as bits of EICR."""
        self._other_causes |= causes
        self.deliver()

    # EICR, EICS, EIMS, EIMC and their extensions to 64 vectors

    def _multiple(self):
        return self._model.get(r.GPIE) & r.GPIE.MULTIPLE_MSIX

    def _collect(self):
        self._queue_causes |= int(self._state.happened)
        self._state.happened = 0

    def _causes(self):
        with self._model.held():
            self._collect()
            return self._queue_causes & RTXQ | self._other_causes

    def _read_causes(self):
        with self._model.held():
            value = self._causes()
            kept = RTXQ if self._model.get(r.GPIE) & r.GPIE.OCD else 0
            self._clear_causes(ALL_ONES & ~kept)
            return value

    def _clear_causes(self, value):
        self._collect()
        self._queue_causes &= ~(value & RTXQ)
        self._other_causes &= ~value
        if not self._model.get(r.GPIE) & r.GPIE.EIAME:
            self._auto_mask(RTXQ, OTHER)
        self.deliver()

    def _set_causes(self, value):
        self._queue_causes |= value & RTXQ
        self._other_causes |= value & OTHER
        self.deliver()

    def _set_vectors(self, k, value):
        self._queue_causes |= value << 32 * k
        self.deliver()

    def _set_mask(self, value):
        self._queue_mask |= value & RTXQ
        self._other_mask |= value & OTHER
        self.deliver()

    def _clear_mask(self, value):
        self._queue_mask &= ~(value & RTXQ)
        self._other_mask &= ~value
        self.deliver()

    def _set_vector_mask(self, k, value):
        self._queue_mask |= value << 32 * k
        self.deliver()

    def _clear_vector_mask(self, k, value):
        self._queue_mask &= ~(value << 32 * k)
        self.deliver()

    def _auto_mask(self, queue_bits, other_bits):
        """Mask what EIAM says of these causes; EIAM and EIAM_EX[0] share bits 15:0."""
        eiam, low, high = (self._model.get(one) for one in (m.EIAM, r.EIAM_EX[0], r.EIAM_EX[1]))
        self._queue_mask &= ~(queue_bits & (eiam & RTXQ | low | high << 32))
        self._other_mask &= ~(other_bits & eiam)

    def _latch_allocation(self, index):
        """IVAR: 8 bits for each of two queues' receive and transmit cause: valid, and the vector or bit of EICR."""
        value = self._model.get(r.IVAR[index])
        for k, direction in ((0, "rx"), (1, "tx"), (2, "rx"), (3, "tx")):
            entry = value >> 8 * k & 0xFF
            queue = getattr(self._state, direction)[2 * index + k // 2]
            queue.cause = 1 << (entry & 63) if entry & 0x80 else 0
        self.deliver()

    # What goes out: 7.3.1, 7.3.2

    def deliver(self):
        """Send what the causes, masks and moderation allow now, and tell the engine what would matter next."""
        with self._model.held():
            self._collect()
            self._state.alarm = NEVER
            multiple = self._multiple()
            if self.port:
                (self._send_vectors if multiple else self._send_one)()
                self._forget()
                waiting = self._queue_mask & ~self._queue_causes & (NEVER if multiple else RTXQ)
                self._state.armed = 0 if multiple and self._state.direct else waiting

    def _forget(self):
        """Causes that are gone or masked are not sent any more."""
        self._queue_sent &= self._queue_causes & self._queue_mask
        self._other_sent &= self._other_causes & self._other_mask

    def _send_vectors(self):
        for vector in ones(self._queue_causes & self._queue_mask & ~self._queue_sent):
            if self._may_fire(vector):
                self._sent(1 << vector, 0)
                self.port.message(vector)
        new, misc = self._other_causes & self._other_mask & ~self._other_sent, self._model.get(m.IVAR_MISC)
        vector = m.IVAR_MISC.OTHER.get(misc)
        if new and misc & m.IVAR_MISC.OTHER_VALID and self._may_fire(vector):
            self._sent(0, new)
            self.port.message(vector)

    def _send_one(self):
        """INTx, MSI, or MSI-X of one vector."""
        queues = self._queue_causes & RTXQ & self._queue_mask
        others = self._other_causes & self._other_mask
        if (queues & ~self._queue_sent or others & ~self._other_sent) and self._may_fire(0):
            self._sent(queues, others)
            self.port.message(0)
            self.drive(True)
        if not queues and not others:
            self.drive(False)

    def _sent(self, queues, others):
        """A message for these causes: each sends none again before it is cleared, which EIAC does at once."""
        self._queue_sent |= queues
        self._other_sent |= others
        if self._multiple():
            cleared = self._model.get(r.EIAC)
            self._queue_causes &= ~(queues & (cleared & RTXQ | ~RTXQ))  # beyond EICR there is nothing to read or clear
            self._other_causes &= ~(others & cleared)
        if self._model.get(r.GPIE) & r.GPIE.EIAME:
            self._auto_mask(queues, others)

    def _may_fire(self, vector):
        """Whether the vector's EITR lets it fire now; if not, the engine calls again when it does."""
        register = r.EITR[vector] if vector < r.EITR.count else r.EITR_UPPER[vector - r.EITR.count]
        now = int(self._state.now)
        if now < self._next[vector]:
            self._state.alarm = min(int(self._state.alarm), int(self._next[vector]))
            return False
        self._next[vector] = now + r.EITR.INTERVAL.get(self._model.get(register)) * int(self._state.moderation)
        return True
