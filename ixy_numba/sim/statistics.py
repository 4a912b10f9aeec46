"""The simulated 82599's statistics registers over what the engine counted. Section 8.2.3.23."""

import itertools

from ..core.registers import ALL_ONES
from . import regs as m
from .state import COUNTER_SETS, COUNTERS

BITS_36 = (1 << 36) - 1


class Statistics:
    """Handlers of these registers for `model`."""

    def __init__(self, model):
        self._model, self._counters = model, []
        state = model.state
        for index, name in enumerate(COUNTERS):
            if name in m.ALL:  # those in two registers follow below
                self._bind(m.ALL[name].each()[0], state.count, index)
        for name, counts in (("PRC", state.rx_sizes), ("PTC", state.tx_sizes), ("QPRC", state.qprc),
                             ("QPRDC", state.qprdc), ("QPTC", state.qptc)):
            for index, one in enumerate(m.ALL[name].each()):
                self._bind(one, counts, index)
        for name in ("GORC", "GOTC", "TOR"):
            self._bind_octets(m.ALL[f"{name}L"], m.ALL[f"{name}H"], state.count, COUNTERS.index(name))
        for name, index in itertools.product(("QBRC", "QBTC"), range(COUNTER_SETS)):
            self._bind_octets(m.ALL[f"{name}_L"][index], m.ALL[f"{name}_H"][index], state[name.lower()], index)
        model.after_write(m.RQSMR, lambda index: self._latch(m.RQSMR, state.rx, index))
        model.after_write(m.TQSM, lambda index: self._latch(m.TQSM, state.tx, index))

    def reset(self):
        for counter in self._counters:
            counter.clear()
        self._model.state.rx["counters"] = self._model.state.tx["counters"] = 0

    def _bind(self, register, counts, index):
        counter = Counter(counts, index)
        self._counters.append(counter)
        self._model.on_read(register, counter.take)

    def _bind_octets(self, low, high, counts, index):
        counter = Counter(counts, index)
        self._counters.append(counter)
        self._model.on_read(low, counter.show_low)
        self._model.on_read(high, counter.take_high)

    def _latch(self, register, queues, index):
        """Which set of counters each of four queues counts in."""
        value = self._model.get(register[index])
        for k in range(4):
            queues[4 * index + k].counters = value >> 8 * k & 15


class Counter:
    """A statistics register over a count that the engine only ever raises: what was added since it was last cleared.

    It clears on read and sticks at its maximum. A 36-bit one is two registers: the low one shows it and holds the
    rest, until reading the high one clears both.
    """

    def __init__(self, counts, index):
        self._counts, self._index = counts, index
        self._cleared, self._shown = 0, None

    def clear(self):
        self._cleared, self._shown = int(self._counts[self._index]), None

    def _value(self):
        return int(self._counts[self._index]) - self._cleared

    def take(self):
        value = self._value()
        self._cleared += value
        return min(value, ALL_ONES)

    def show_low(self):
        self._shown = self._value()
        return min(self._shown, BITS_36) & ALL_ONES

    def take_high(self):
        value = self._value() if self._shown is None else self._shown
        self._cleared, self._shown = self._cleared + value, None
        return min(value, BITS_36) >> 32
