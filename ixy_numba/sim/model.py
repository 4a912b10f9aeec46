"""The simulated 82599's registers: what each access does, as the datasheet's chapter 8 describes it."""

import itertools
import mmap
import threading
import time
from contextlib import contextmanager
from functools import partial

import numpy as np

from ..core.errors import IxyError, UsageError
from ..core.registers import ALL_ONES, Mode
from ..drivers.ixgbe import regs as r
from . import regs as m
from .eeprom import Eeprom
from .engine import ENGINE, visit
from .state import BATCH, COUNTER_SETS, COUNTERS, MAX_MAPPINGS, QUEUES, WIRE, U, claim, release

BITS_36 = (1 << 36) - 1
MULTICAST_SHIFT = (0, 1, 2, 4)  # MCSTCTRL.MO: which 12 bits of an address index the table, counted from bits 47:36


class Model:
    """One simulated 82599: `read` and `write` its registers, `map` memory for its DMA. Callable from any thread.

    `mac`: 6 bytes, its address in the EEPROM. `bar0`: BAR 0 as a uint8 array, which also takes the stores of tail
    registers that come past `write`. `state`: the record that the engine works on.
    """

    HOLD_TIMEOUT_S = 10.0

    def __init__(self, mac):
        self.slot, self.state = ENGINE.new_device()
        self.eeprom = Eeprom(mac)
        self.bar0 = np.frombuffer(mmap.mmap(-1, r.BAR_SIZE), np.uint8)
        self._word = self.bar0.view("<u4")
        self._lock = threading.RLock()
        self._mappings = []
        self._eicr = self._eims = 0
        self._counters = []
        self.unknown_accesses = {}  # offset: accesses of registers that the model only stores
        self._init_state()
        self._reads, self._writes = {}, {}
        self._bind()
        self._known = {one.offset for register in m.ALL.values() for one in register.each()}
        self.reset()

    def close(self):
        ENGINE.free_device(self.slot)

    @contextmanager
    def held(self):
        """Keep the engine away from the state. IxyError if it does not let go."""
        with self._lock:
            deadline = time.monotonic() + self.HOLD_TIMEOUT_S
            while not claim(self.state):
                if time.monotonic() > deadline:
                    release(self.state)
                    raise IxyError(f"the simulation did not pause within {self.HOLD_TIMEOUT_S} s")
                time.sleep(1e-4)
            try:
                yield self.state
            finally:
                release(self.state)

    def step(self, now, time_ns, frames=BATCH):
        """Deal with up to `frames` received frames and descriptors a transmit queue, in this thread: their sum."""
        with self._lock:
            return int(visit(self.state, U(now), U(time_ns), U(frames)))

    # Registers

    def read(self, offset):
        """The 32-bit register at byte `offset` of BAR 0."""
        offset = self._place(offset)
        with self._lock:  # no need to hold the engine: no reading changes what it works on
            handler = self._reads.get(offset)
            return handler() if handler else int(self._word[offset // 4])

    def write(self, offset, value):
        """Write the 32-bit register at byte `offset` of BAR 0."""
        offset = self._place(offset)
        handler = self._writes.get(offset)
        if not handler:
            self._word[offset // 4] = value & ALL_ONES
            return
        with self.held():
            handler(value & ALL_ONES)

    def _place(self, offset):
        if offset % 4 or not 0 <= offset < r.BAR_SIZE:
            raise UsageError(f"register {offset:#x}: expected a multiple of 4 below {r.BAR_SIZE:#x}")
        native = m.NATIVE.get(offset, offset)
        if native not in self._known:
            self.unknown_accesses[native] = self.unknown_accesses.get(native, 0) + 1
        return native

    def reset(self):
        """What CTRL.RST and CTRL.LRST leave: all registers and counters at their initial values, EEPROM read again."""
        with self.held() as state:
            self._word[:] = 0
            for register, value in m.RESET.items():
                for one in register.each():
                    self._set(one, value)
            low, high = self.eeprom.mac_words
            self._set(r.RAL[0], low)
            self._set(r.RAH[0], high | r.RAH.AV)
            self._eicr = self._eims = 0
            for counter in self._counters:
                counter.clear()
            state["mta"] = state["reta"] = 0
            state.pending.waiting = 0
            for queue in range(QUEUES):
                state.rx[queue].enabled = state.tx[queue].enabled = 0
                state.rx[queue].counters = state.tx[queue].counters = 0
            self._list_queues()
            self._latch()

    def _set(self, register, value):
        self._word[register.offset // 4] = value

    def _get(self, register):
        return int(self._word[register.offset // 4])

    def _init_state(self):
        state, base = self.state, self.bar0.ctypes.data
        state.bar = base
        for name in ("template", "rx_scratch", "tx_scratch"):
            state[f"{name}_at"] = state[name].ctypes.data
        for queue in range(QUEUES):
            state.rx[queue].registers = base + _rx_block(queue)
            state.tx[queue].registers = base + r.TX_QUEUE + queue * r.QUEUE_STRIDE
        state.min_frame = 14

    def _bind(self):
        """Which accesses do more than load and store."""
        for register in m.ALL.values():
            if register.mode in (Mode.RO, Mode.RC):
                for one in register.each():
                    self._writes[one.offset] = lambda value: None
        for register, handler in (
                (r.STATUS, self._read_status), (r.EICR, self._read_eicr), (m.EIMS, lambda: self._eims & ALL_ONES),
                (m.EIMS_EX[0], lambda: self._eims & ALL_ONES), (m.EIMS_EX[1], lambda: self._eims >> 32),
                (m.SWSM, self._read_swsm)):
            self._reads[register.offset] = handler
        for register, handler in (
                (r.CTRL, self._write_ctrl), (r.EEC, self._write_eec), (r.EERD, self._write_eerd),
                (r.EICR, self._write_eicr), (m.EICS, self._write_eics), (m.EIMS, self._set_mask),
                (r.EIMC, self._clear_mask), (r.AUTOC, self._write_autoc), (r.RDRXCTL, self._write_rdrxctl)):
            self._writes[register.offset] = handler
        for k in range(2):
            self._writes[m.EIMS_EX[k].offset] = partial(self._set_mask, shift=32 * k)
            self._writes[m.EIMC_EX[k].offset] = partial(self._clear_mask, shift=32 * k)
            # DEVIATION(sim-interrupts): causes and masks can be set and read, but raise no interrupt.
            self._writes[m.EICS_EX[k].offset] = lambda value: None
        for register in (r.FCTRL, m.MCSTCTRL, r.HLREG0, r.MAXFRS, r.MRQC, r.RXCTRL, r.DMATXCTL, m.SECRXCTRL,
                         r.RXPBSIZE):
            self._after(register, lambda index: self._latch())
        for register in (r.RAL, r.RAH):
            self._after(register, lambda index: self._latch_addresses())
        self._after(r.MTA, self._latch_multicast)
        self._after(r.RETA, self._latch_redirection)
        self._after(r.RSSRK, lambda index: self._latch_key())
        self._after(m.RQSMR, partial(self._latch_counters, m.RQSMR, "rx"))
        self._after(m.TQSM, partial(self._latch_counters, m.TQSM, "tx"))
        for queue in range(QUEUES):
            rx, tx = _rx_block(queue), r.TX_QUEUE + queue * r.QUEUE_STRIDE
            self._writes[rx + 0x28] = partial(self._write_rxdctl, queue)
            self._writes[rx + 0x14] = partial(self._write_srrctl, queue)
            self._writes[tx + 0x28] = partial(self._write_txdctl, queue)
        self._bind_counters()

    def _after(self, register, latch):
        """Writes to `register` are stored, then `latch(index)` brings the engine's state in line."""
        def write(one, index, value):
            self._set(one, value)
            latch(index)

        for index, one in enumerate(register.each()):
            self._writes[one.offset] = partial(write, one, index)

    # General, interrupts: sections 8.2.3.1, 8.2.3.2, 8.2.3.5

    def _write_ctrl(self, value):
        if value & (r.CTRL.RST | r.CTRL.LRST):
            self.reset()
            value &= ~(r.CTRL.RST | r.CTRL.LRST)
        # DEVIATION(sim-instant): resets, enables and link training are done at once; hardware takes up to milliseconds.
        self._set(r.CTRL, value)
        self._latch()

    def _read_status(self):
        up = self._get(r.LINKS) & r.LINKS.UP
        mastering = not self._get(r.CTRL) & r.CTRL.MASTER_DISABLE
        return (r.STATUS.LINK_UP if up else 0) | (r.STATUS.MASTER_ENABLED if mastering else 0)

    def _write_eec(self, value):
        self._set(r.EEC, value | r.EEC.PRESENT | r.EEC.AUTO_RD)

    def _write_eerd(self, value):
        if value & r.EERD.START:
            word = self.eeprom.words[r.EERD.ADDR.get(value)]
            value = value & r.EERD.ADDR | r.EERD.DONE | r.EERD.DATA.of(word)
        self._set(r.EERD, value)

    def _read_eicr(self):
        value, self._eicr = self._eicr, 0
        return value

    def _write_eicr(self, value):
        self._eicr &= ~value

    def _write_eics(self, value):
        self._eicr |= value

    def _set_mask(self, value, shift=0):
        self._eims |= value << shift

    def _clear_mask(self, value, shift=0):
        self._eims &= ~(value << shift)

    def _read_swsm(self):
        value = self._get(m.SWSM)
        self._set(m.SWSM, value | m.SWSM.SMBI)
        return value

    def _write_autoc(self, value):
        self._set(r.AUTOC, value & ~r.AUTOC.RESTART_AN)

    def _write_rdrxctl(self, value):
        self._set(r.RDRXCTL, value | r.RDRXCTL.DMAIDONE)

    # Receive and transmit: sections 8.2.3.7 to 8.2.3.9, 8.2.3.22

    def _latch(self):
        """Bring the engine's state in line with the registers that are not a queue's."""
        state, get = self.state, self._get
        mastering = not get(r.CTRL) & r.CTRL.MASTER_DISABLE
        blocked = get(m.SECRXCTRL) & m.SECRXCTRL.RX_DIS
        state.rx_on = bool(mastering and get(r.RXCTRL) & r.RXCTRL.RXEN and not blocked)
        state.tx_on = bool(mastering and get(r.DMATXCTL) & r.DMATXCTL.TE)
        hlreg, fctrl, multicast, mrqc = get(r.HLREG0), get(r.FCTRL), get(m.MCSTCTRL), get(r.MRQC)
        state.crc_strip = bool(hlreg & r.HLREG0.RXCRCSTRP)
        state.jumbo = bool(hlreg & r.HLREG0.JUMBOEN)
        state.tx_pad, state.tx_crc = bool(hlreg & r.HLREG0.TXPADEN), bool(hlreg & r.HLREG0.TXCRCEN)
        state.max_frame = r.MAXFRS.MFS.get(get(r.MAXFRS))
        state.store_bad = bool(fctrl & r.FCTRL.SBP)
        state.all_unicast, state.all_multicast = bool(fctrl & r.FCTRL.UPE), bool(fctrl & r.FCTRL.MPE)
        state.broadcast = bool(fctrl & r.FCTRL.BAM)
        state.multicast_on = bool(multicast & m.MCSTCTRL.MFE)
        state.multicast_shift = MULTICAST_SHIFT[multicast & m.MCSTCTRL.MO]
        state.fifo_bytes = r.RXPBSIZE.SIZE.get(get(r.RXPBSIZE[0])) << 10
        state.rss = mrqc if r.MRQC.MODE.get(mrqc) == 1 else 0
        state.changed = 1
        self._latch_addresses()
        if state.rss:
            self._latch_key()

    def _latch_addresses(self):
        valid = []
        words = self._word[r.RAL[0].offset // 4 :][: 2 * r.RAL.count].astype(np.uint64)
        low, high = words[0::2], words[1::2]
        valid = (low | (high & U(0xFFFF)) << U(32))[high >> U(31) == 1]
        self.state.addresses = len(valid)
        self.state.address[: len(valid)] = valid
        self.state.changed = 1

    def _latch_multicast(self, index):
        self.state.mta[index] = self._get(r.MTA[index])

    def _latch_redirection(self, index):
        value = self._get(r.RETA[index])
        self.state.reta[4 * index : 4 * index + 4] = [value >> 8 * k & 15 for k in range(4)]

    def _latch_key(self):
        """The Toeplitz hash as one table a byte of input: the XOR of the key's windows at the byte's set bits."""
        if not self.state.rss:
            return
        key = int.from_bytes(b"".join(self._get(one).to_bytes(4, "little") for one in r.RSSRK.each()), "big")
        windows = np.array([key >> 320 - 32 - k & ALL_ONES for k in range(288)], np.uint32).reshape(36, 8)
        bits = np.arange(256)[:, None] >> np.arange(7, -1, -1) & 1
        self.state.toeplitz[:] = np.bitwise_xor.reduce(np.where(bits[None], windows[:, None, :], 0), axis=2)

    def _latch_counters(self, register, direction, index):
        value = self._get(register[index])
        for k in range(4):
            getattr(self.state, direction)[4 * index + k].counters = value >> 8 * k & 15

    def _write_srrctl(self, queue, value):
        self._word[(_rx_block(queue) + 0x14) // 4] = value
        self._latch_buffer(queue)

    def _latch_buffer(self, queue):
        srrctl = int(self._word[(_rx_block(queue) + 0x14) // 4])
        state = self.state.rx[queue]
        state.buffer = max(r.SRRCTL.BSIZEPACKET.get(srrctl), 1) << 10
        state.drop = bool(srrctl & r.SRRCTL.DROP_EN)
        state.legacy = r.SRRCTL.DESCTYPE.get(srrctl) == 0
        self.state.changed = 1

    def _write_rxdctl(self, queue, value):
        self._latch_buffer(queue)
        self._write_queue_control(_rx_block(queue), self.state.rx[queue], value)

    def _write_txdctl(self, queue, value):
        self._write_queue_control(r.TX_QUEUE + queue * r.QUEUE_STRIDE, self.state.tx[queue], value)

    def _write_queue_control(self, block, queue, value):
        """RXDCTL or TXDCTL: a queue takes its ring over when it is switched on, and lets go of it at once when off."""
        low, high, length, _, head = (int(word) for word in self._word[block // 4 : block // 4 + 5])
        control = block // 4 + 10
        if value & r.RXDCTL.ENABLE and not int(self._word[control]) & r.RXDCTL.ENABLE:
            queue.ring, queue.length = low & ~0x7F | high << 32, (length & 0xFFF80) // 16
            queue.head = head if head < queue.length else 0
            if "tail" in queue.dtype.names:
                queue.tail = queue.head
            else:
                head_low, head_high = (int(word) for word in self._word[block // 4 + 14 : block // 4 + 16])
                queue.head_at = (head_low & ~3 | head_high << 32) if head_low & r.TDWBAL.HEAD_WB_EN else 0
        self._word[control] = value
        queue.enabled = bool(value & r.RXDCTL.ENABLE and queue.length)
        self._list_queues()

    def _list_queues(self):
        """The numbers of the enabled queues, in order."""
        for direction in ("rx", "tx"):
            enabled = np.flatnonzero(self.state[direction]["enabled"])
            self.state[f"{direction}_enabled"][: len(enabled)] = enabled
            self.state[f"{direction}_queues"] = len(enabled)

    # Statistics: section 8.2.3.23

    def _bind_counters(self):
        state = self.state
        for index, name in enumerate(COUNTERS):
            if name in m.ALL:  # those in two registers follow below
                self._bind_counter(m.ALL[name].each()[0], state.count, index)
        for name, counts in (("PRC", state.rx_sizes), ("PTC", state.tx_sizes), ("QPRC", state.qprc),
                             ("QPRDC", state.qprdc), ("QPTC", state.qptc)):
            for index, one in enumerate(m.ALL[name].each()):
                self._bind_counter(one, counts, index)
        for name in ("GORC", "GOTC", "TOR"):
            self._bind_octets(m.ALL[f"{name}L"], m.ALL[f"{name}H"], state.count, COUNTERS.index(name))
        for name, index in itertools.product(("QBRC", "QBTC"), range(COUNTER_SETS)):
            self._bind_octets(m.ALL[f"{name}_L"][index], m.ALL[f"{name}_H"][index], state[name.lower()], index)

    def _bind_counter(self, register, counts, index):
        counter = Counter(counts, index)
        self._counters.append(counter)
        self._reads[register.offset] = counter.take

    def _bind_octets(self, low, high, counts, index):
        counter = Counter(counts, index)
        self._counters.append(counter)
        self._reads[low.offset], self._reads[high.offset] = counter.show_low, counter.take_high

    # DMA

    def map(self, iova, size, address):
        """Let the device reach `size` bytes at virtual `address` under `iova`. UsageError where something is mapped."""
        with self.held():
            if size <= 0 or not 0 <= iova < iova + size <= 1 << 64:
                raise UsageError(f"DMA mapping of {size} bytes at {iova:#x}: expected a range below 2**64")
            if any(iova < end and start < iova + size for start, end, _ in self._mappings):
                raise UsageError(f"DMA mapping of {size} bytes at {iova:#x}: overlaps one that is there")
            if len(self._mappings) == MAX_MAPPINGS:
                raise UsageError(f"DMA mapping at {iova:#x}: a device can have {MAX_MAPPINGS}, all are in use")
            self._mappings.append((iova, iova + size, address))
            self._latch_mappings()

    def unmap(self, iova):
        """Take the mapping that begins at `iova` back. UsageError if there is none."""
        with self.held():
            kept = [mapping for mapping in self._mappings if mapping[0] != iova]
            if len(kept) == len(self._mappings):
                raise UsageError(f"DMA unmapping of {iova:#x}: no mapping begins there")
            self._mappings = kept
            self._latch_mappings()

    def _latch_mappings(self):
        self._mappings.sort()
        table = np.zeros(MAX_MAPPINGS, self.state.mapping.dtype)
        table[: len(self._mappings)] = self._mappings
        self.state.mapping[:] = table
        self.state.mappings = len(self._mappings)

    # What the outside can see

    @property
    def quiet(self):
        """Whether every enabled transmit queue has sent all it was given."""
        state = self.state
        return all(int(state.tx[k].head) == self._tail(state.tx[k]) for k in self._enabled("tx"))

    @property
    def all_taken(self):
        """Whether the driver has given back every descriptor that got a frame: RDT is one short of RDH."""
        state = self.state
        return all((self._tail(state.rx[k]) + 1) % int(state.rx[k].length) == int(state.rx[k].head)
                   for k in self._enabled("rx"))

    def _enabled(self, direction):
        return [int(k) for k in self.state[f"{direction}_enabled"][: int(self.state[f"{direction}_queues"])]]

    def _tail(self, queue):
        return int(self._word[(int(queue.registers) - int(self.state.bar) + 0x18) // 4])

    def wire_counters(self):
        """What the wire and the checks of the model counted, as {name: count}."""
        return {name: int(count) for name, count in zip(WIRE, self.state.wire, strict=True)}


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


def _rx_block(queue):
    """Offset of a receive queue's registers: the upper 64 queues lie elsewhere."""
    if queue < 64:
        return r.RX_QUEUE + queue * r.QUEUE_STRIDE
    return m.RX_UPPER + (queue - 64) * r.QUEUE_STRIDE
