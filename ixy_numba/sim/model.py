"""The simulated 82599's registers: what each access does, as the datasheet's chapter 8 describes it."""

import mmap
import os
import threading
import time
from contextlib import contextmanager
from functools import partial

import numpy as np

from ..core.errors import IxyError, UsageError
from ..core.memory import sealed_file
from ..core.registers import ALL_ONES, Mode
from ..drivers.ixgbe import regs as r
from . import regs as m
from .engine import ENGINE, visit
from .interrupts import LINK_CHANGE, Interrupts
from .management import Management
from .state import BATCH, MAX_MAPPINGS, MODEL_FAULTS, QUEUES, WIRE, U, claim, release
from .statistics import Statistics

MULTICAST_SHIFT = (0, 1, 2, 4)  # MCSTCTRL.MO: which 12 bits of an address index the table, counted from bits 47:36
SFP_PLUS = 0x10FB  # the device id of a NIC with a cage for a module


class Model:
    """One simulated 82599: `read` and `write` its registers, `map` memory for its DMA. Callable from any thread.

    `mac`: 6 bytes, its address in the EEPROM; `device`: its PCI id. `bar0`: BAR 0 as a uint8 array, which also takes
    the stores of tail registers that come past `write`; `bar0_file`: the memory file behind it. `state`: the record
    that the engine works on. `per_second`: how fast the time that `step` gets runs. `trace`, if set, is called as
    `trace("R" or "W", offset, value)` for every access of `read` and `write`, in order.
    """

    HOLD_TIMEOUT_S = 10.0

    def __init__(self, mac, device=SFP_PLUS, per_second=1e9):
        self.slot, self.state = ENGINE.new_device()
        self.bar0_file = sealed_file("82599 BAR 0", r.BAR_SIZE)
        self.bar0 = np.frombuffer(mmap.mmap(self.bar0_file, r.BAR_SIZE), np.uint8)
        self.per_second, self.trace = per_second, None
        self._word = self.bar0.view("<u4")
        self._lock, self._depth = threading.RLock(), 0
        self._mappings, self._link, self._bus_master = [], True, True
        self.unknown_accesses = {}  # offset: accesses of registers that the model only stores
        self._init_state()
        self._reads, self._writes = {}, {}
        self._bind()
        self.management = Management(self, mac, module=device == SFP_PLUS)
        self.statistics = Statistics(self)
        self.interrupts = Interrupts(self)
        self._known = {one.offset for register in m.ALL.values() for one in register.each()}
        self.reset()

    def close(self):
        ENGINE.free_device(self.slot)
        os.close(self.bar0_file)

    @contextmanager
    def held(self):
        """Keep the engine away from the state. IxyError if it does not let go. Can be nested."""
        with self._lock:
            if self._depth == 0:
                self._claim()
            self._depth += 1
            try:
                yield self.state
            finally:
                self._depth -= 1
                if self._depth == 0:
                    release(self.state)

    def _claim(self):
        deadline = time.monotonic() + self.HOLD_TIMEOUT_S
        while not claim(self.state):
            if time.monotonic() > deadline:
                release(self.state)
                raise IxyError(f"the simulation did not pause within {self.HOLD_TIMEOUT_S} s")
            time.sleep(1e-4)

    def step(self, now, time_ns, frames=BATCH):
        """Deal with up to `frames` received frames and descriptors a transmit queue, in this thread: their sum."""
        with self._lock:
            return int(visit(self.state, U(now), U(time_ns), U(frames)))

    def service(self):
        """What the engine asked for by `state.attention`: queues to be switched, interrupts."""
        if self.state.watched:
            self._take_notice()
        self.interrupts.deliver()

    def watch(self, on):
        """Somebody maps the queues' registers, so that writes to them come past `write`."""
        self.state.watched = on

    def _take_notice(self):
        """Do for mapped queues what a write of RXDCTL or TXDCTL does."""
        with self.held() as state:
            for direction, first in (("rx", r.RX_QUEUE), ("tx", r.TX_QUEUE)):
                controls = self._word[(first + 0x28) // 4 :: r.QUEUE_STRIDE // 4][: r.QUEUES]
                for queue in np.flatnonzero(controls != state[direction]["control"][: r.QUEUES]):
                    self._writes[first + int(queue) * r.QUEUE_STRIDE + 0x28](int(controls[queue]))

    # Registers

    def read(self, offset):
        """The 32-bit register at byte `offset` of BAR 0."""
        place = self._place(offset)
        with self._lock:
            handler = self._reads.get(place)
            value = handler() if handler else int(self._word[place // 4])
            if self.trace:
                self.trace("R", offset, value)
            return value

    def write(self, offset, value):
        """Write the 32-bit register at byte `offset` of BAR 0."""
        place, value = self._place(offset), value & ALL_ONES
        with self._lock:
            if self.trace:
                self.trace("W", offset, value)
            handler = self._writes.get(place)
            if handler:
                with self.held():
                    handler(value)
            else:
                self._word[place // 4] = value

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
                    self.set(one, value)
            self._set_links()
            for part in (self.management, self.statistics, self.interrupts):
                part.reset()
            state["mta"] = state["reta"] = state["vfta"] = 0
            state.pending.waiting = state.outgoing.waiting = 0
            state.rx["enabled"] = state.tx["enabled"] = state.rx["vlan_strip"] = 0
            state.rx["control"] = state.tx["control"] = 0
            self._list_queues()
            self._latch()

    def set(self, register, value):
        """Store a register's value, without what a write does."""
        self._word[register.offset // 4] = value

    def get(self, register):
        """A register's stored value, without what a read does."""
        return int(self._word[register.offset // 4])

    def on_read(self, register, handler):
        """Reading `register` returns `handler()`; the engine may be at work meanwhile."""
        self._reads[register.offset] = handler

    def on_write(self, register, handler):
        """Writing `register` calls `handler(value)` instead of storing the value; the engine is held meanwhile."""
        self._writes[register.offset] = handler

    def after_write(self, register, latch):
        """Writes to `register` are stored, then `latch(index)` brings the rest in line."""
        def write(one, index, value):
            self.set(one, value)
            latch(index)

        for index, one in enumerate(register.each()):
            self._writes[one.offset] = partial(write, one, index)

    def _init_state(self):
        state, base = self.state, self.bar0.ctypes.data
        state.bar = base
        for name in ("template", "rx_scratch", "tx_scratch", "segment"):
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
                    self.on_write(one, lambda value: None)
        self.on_read(r.STATUS, self._read_status)
        for register, handler in (
                (r.CTRL, self._write_ctrl), (r.AUTOC, self._write_autoc), (r.RDRXCTL, self._write_rdrxctl),
                (m.FDIRCTRL, self._write_fdirctrl), (m.FDIRCMD, self._write_fdircmd)):
            self.on_write(register, handler)
        for register in (r.FCTRL, m.MCSTCTRL, r.HLREG0, r.MAXFRS, r.MRQC, r.RXCTRL, r.DMATXCTL, m.SECRXCTRL,
                         r.RXPBSIZE, m.VLNCTRL, m.DTXTCPFLGL, m.DTXTCPFLGH):
            self.after_write(register, lambda index: self._latch())
        for register in (r.RAL, r.RAH):
            self.after_write(register, lambda index: self._latch_addresses())
        self.after_write(r.MTA, partial(self._latch_table, r.MTA, "mta"))
        self.after_write(m.VFTA, partial(self._latch_table, m.VFTA, "vfta"))
        self.after_write(r.RETA, self._latch_redirection)
        self.after_write(r.RSSRK, lambda index: self._latch_key())
        for queue in range(QUEUES):
            rx, tx = _rx_block(queue), r.TX_QUEUE + queue * r.QUEUE_STRIDE
            self._writes[rx + 0x28] = partial(self._write_rxdctl, queue)
            self._writes[rx + 0x14] = partial(self._write_srrctl, queue)
            self._writes[tx + 0x28] = partial(self._write_txdctl, queue)

    # General and link: sections 8.2.3.1, 8.2.3.22

    def _write_ctrl(self, value):
        if value & (r.CTRL.RST | r.CTRL.LRST):
            self.reset()
            value = 0
        # DEVIATION(sim-instant): resets, enables and link training are done at once; hardware takes up to milliseconds.
        self.set(r.CTRL, value)
        self._latch()

    def _read_status(self):
        up = self.get(r.LINKS) & r.LINKS.UP
        mastering = not self.get(r.CTRL) & r.CTRL.MASTER_DISABLE
        return (r.STATUS.LINK_UP if up else 0) | (r.STATUS.MASTER_ENABLED if mastering else 0)

    def set_link(self, up):
        """The cable is plugged in or pulled: LINKS shows it, it is an interrupt cause, nothing is received."""
        # DEVIATION(sim-link-down): what is sent meanwhile is lost; hardware keeps it until the link is up again.
        with self.held():
            if up != self._link:
                self._link = up
                self._set_links()
                self._latch()
                self.interrupts.raise_other(LINK_CHANGE)

    def _set_links(self):
        self.set(r.LINKS, (r.LINKS.UP if self._link else 0) | r.LINKS.SPEED.of(3))

    def connect(self, port, events=()):
        """Interrupts go out by `port` from now on (see `Interrupts`); None: nowhere.

        With `events`, the eventfds behind the port's first vectors, the engine writes those itself.
        """
        with self.held() as state:
            self.interrupts.port = port
            state.direct = len(events)
            state.event[: len(events)] = events
            state.unmask[:] = 0
            self.interrupts.deliver()

    def doorbell(self, offset, writer):
        """Where kernels store to a register past `write`, as uint8 of shape (4,).

        Writing EIMS_EX sets bits, and stores of several threads must not undo each other: each `writer` has a word.
        """
        if offset in (one.offset for one in r.EIMS_EX.each()):
            return np.asarray(self.state.unmask)[writer : writer + 1].view(np.uint8)
        return self.bar0[offset : offset + 4]

    def set_mastering(self, on):
        """PCI's bus master enable: no DMA and no messages without it."""
        with self.held():
            self._bus_master = on
            self._latch()

    def _write_autoc(self, value):
        self.set(r.AUTOC, value & ~r.AUTOC.RESTART_AN)

    def _write_rdrxctl(self, value):
        self.set(r.RDRXCTL, value | r.RDRXCTL.DMAIDONE)

    def _write_fdirctrl(self, value):
        self.set(m.FDIRCTRL, value | (m.FDIRCTRL.INIT_DONE if value & m.FDIRCTRL.PBALLOC else 0))

    def _write_fdircmd(self, value):
        self.set(m.FDIRCMD, value & ~m.FDIRCMD.CMD)

    # Receive and transmit: sections 8.2.3.7 to 8.2.3.9, 8.2.3.22

    def _latch(self):
        """Bring the engine's state in line with the registers that are not a queue's."""
        state, get = self.state, self.get
        moving = self._bus_master and not get(r.CTRL) & r.CTRL.MASTER_DISABLE
        blocked = get(m.SECRXCTRL) & m.SECRXCTRL.RX_DIS
        state.rx_on = bool(moving and self._link and get(r.RXCTRL) & r.RXCTRL.RXEN and not blocked)
        state.tx_on = bool(moving and get(r.DMATXCTL) & r.DMATXCTL.TE)
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
        vlan = get(m.VLNCTRL)
        state.vlan_type, state.vlan_filter = m.VLNCTRL.VET.get(vlan), bool(vlan & m.VLNCTRL.VFE)
        state.tx_vlan_type = m.DMATXCTL_VT.get(get(r.DMATXCTL))
        state.first_flags = m.DTXTCPFLGL.FIRST.get(get(m.DTXTCPFLGL))
        state.middle_flags = m.DTXTCPFLGL.MIDDLE.get(get(m.DTXTCPFLGL))
        state.last_flags = m.DTXTCPFLGH.LAST.get(get(m.DTXTCPFLGH))
        state.rss = mrqc if r.MRQC.MODE.get(mrqc) == 1 else 0
        state.changed = 1
        self._latch_addresses()
        if state.rss:
            self._latch_key()

    def _latch_addresses(self):
        words = self._word[r.RAL[0].offset // 4 :][: 2 * r.RAL.count].astype(np.uint64)
        low, high = words[0::2], words[1::2]
        valid = (low | (high & U(0xFFFF)) << U(32))[high >> U(31) == 1]
        self.state.addresses = len(valid)
        self.state.address[: len(valid)] = valid
        self.state.changed = 1

    def _latch_table(self, register, name, index):
        self.state[name][index] = self.get(register[index])

    def _latch_redirection(self, index):
        value = self.get(r.RETA[index])
        self.state.reta[4 * index : 4 * index + 4] = [value >> 8 * k & 15 for k in range(4)]

    def _latch_key(self):
        """The Toeplitz hash as one table a byte of input: the XOR of the key's windows at the byte's set bits."""
        if not self.state.rss:
            return
        key = int.from_bytes(b"".join(self.get(one).to_bytes(4, "little") for one in r.RSSRK.each()), "big")
        windows = np.array([key >> 320 - 32 - k & ALL_ONES for k in range(288)], np.uint32).reshape(36, 8)
        bits = np.arange(256)[:, None] >> np.arange(7, -1, -1) & 1
        self.state.toeplitz[:] = np.bitwise_xor.reduce(np.where(bits[None], windows[:, None, :], 0), axis=2)

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
        self.state.rx[queue].vlan_strip = bool(value & r.RXDCTL.VME)
        self._write_queue_control(_rx_block(queue), self.state.rx[queue], value)

    def _write_txdctl(self, queue, value):
        self._write_queue_control(r.TX_QUEUE + queue * r.QUEUE_STRIDE, self.state.tx[queue], value)

    def _write_queue_control(self, block, queue, value):
        """RXDCTL or TXDCTL: a queue takes its ring over when it is switched on, and lets go of it at once when off."""
        low, high, length, _, head = (int(word) for word in self._word[block // 4 : block // 4 + 5])
        control = block // 4 + 10
        if value & r.RXDCTL.ENABLE and not int(queue.control) & r.RXDCTL.ENABLE:
            queue.ring, queue.length = low & ~0x7F | high << 32, (length & 0xFFF80) // 16
            if int(queue.ring) + 16 * int(queue.length) > 1 << 64:
                queue.length = 0
                self.state.wire[MODEL_FAULTS] += 1
            queue.head = head if head < queue.length else 0
            if "tail" in queue.dtype.names:
                queue.tail = queue.head
            else:
                head_low, head_high = (int(word) for word in self._word[block // 4 + 14 : block // 4 + 16])
                queue.head_at = (head_low & ~3 | head_high << 32) if head_low & r.TDWBAL.HEAD_WB_EN else 0
                queue["context"] = 0
        self._word[control] = queue.control = value
        if self.state.outgoing.queue == queue.registers and not value & r.TXDCTL.ENABLE:
            self.state.outgoing.waiting = 0
        queue.enabled = bool(value & r.RXDCTL.ENABLE and queue.length)
        self._list_queues()

    def _list_queues(self):
        """The numbers of the enabled queues, in order."""
        for direction in ("rx", "tx"):
            enabled = np.flatnonzero(self.state[direction]["enabled"])
            self.state[f"{direction}_enabled"][: len(enabled)] = enabled
            self.state[f"{direction}_queues"] = len(enabled)

    # DMA

    def map(self, iova, size, address, owner=None):
        """Let the device reach `size` bytes at virtual `address` under `iova`. UsageError where something is mapped.

        `owner`, the array that the bytes are mapped for, lives as long as the device can reach them.
        """
        with self.held():
            if size <= 0 or not 0 <= iova < iova + size < 1 << 64:
                raise UsageError(f"DMA mapping of {size} bytes at {iova:#x}: expected a range that ends below 2**64")
            if any(iova < end and start < iova + size for start, end, *_ in self._mappings):
                raise UsageError(f"DMA mapping of {size} bytes at {iova:#x}: overlaps one that is there")
            if len(self._mappings) == MAX_MAPPINGS:
                raise UsageError(f"DMA mapping at {iova:#x}: a device can have {MAX_MAPPINGS}, all are in use")
            self._mappings.append((iova, iova + size, address, owner))
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
        table[: len(self._mappings)] = [mapping[:3] for mapping in self._mappings]
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


def _rx_block(queue):
    """Offset of a receive queue's registers: the upper 64 queues lie elsewhere."""
    if queue < 64:
        return r.RX_QUEUE + queue * r.QUEUE_STRIDE
    return m.RX_UPPER + (queue - 64) * r.QUEUE_STRIDE
