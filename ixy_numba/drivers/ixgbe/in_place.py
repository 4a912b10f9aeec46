"""Two 82599s that send from each other's receive rings: the queues, the kernels and how the devices are set up.

A legacy receive descriptor keeps its buffer's address when it is written back (7.1.5), and a legacy transmit descriptor
has it in the same place (7.2.3.2.2). So one ring serves both: its addresses are written once, and a packet's whole way
is one word that goes from "received" to "send this". Where the sender is comes by head write-back (7.2.3.5.2), which
leaves the descriptors alone.
"""

import contextlib
from typing import NamedTuple

import numpy as np

from ... import datapath, in_place, waiting
from ...core import lifetime
from ...core.errors import DmaError
from ...core.integers import wrapping_sub
from ...core.jit import kernel
from ...core.memory import DmaMemory, new_record
from ...core.mmio import likely, load_acquire, prefetch, store_doorbell
from ...core.packet import view
from ...core.pool import BUFFER_SIZE, BUFFER_STRIDE, LENGTH_MASK, ONE, ZERO, U
from . import Ixgbe, setup
from . import regs as r
from .descriptors import LEGACY, LEGACY_DD, LEGACY_EOP, LEGACY_ERROR, ONE_BUFFER, RS
from .kernels import BLOCK, RX_REGISTERS, TX_REGISTERS, rx_disarm

TOO_LONG = U(0xFFFF & ~(BUFFER_SIZE - 1))
STATE = np.dtype([*lifetime.WORDS,
                  ("index", "u8"), ("recycled", "u8"), ("errors", "u8"),  # next descriptor; the head last acted on
                  ("vector", "u8")])  # its bit in EIMS
_BUFFER = np.dtype([("octets", "u1", (BUFFER_STRIDE,))])


def line(size):
    """What two devices share in one direction: descriptors, the sender's head, and descriptor k's buffer k.

    Behind them are buffers that are no descriptor's: what looks ahead to prefetch need not wrap around.
    """
    return np.dtype({"names": ["desc", "head", "buffer"],
                     "formats": [(LEGACY, (size,)), "u4", (_BUFFER, (size + int(in_place.PREFETCH),))],
                     "offsets": [0, 16 * size, 16 * size + 64]})  # the head on a cache line of its own


class RxQueue(NamedTuple):
    line: np.record
    state: np.record
    regs: np.record
    mask: np.record


class TxQueue(NamedTuple):
    regs: np.record


@datapath.rx_start.implement(RxQueue)
@kernel(inline=True)
def rx_start(rxq):
    return rxq.state.index & U(len(rxq.line.desc) - 1)


@datapath.rx_next.implement(RxQueue)
@kernel(inline=True)
def rx_next(rxq, i):
    word = load_acquire(rxq.line.desc[i], "word")
    if likely(sound(word)):
        return word & LENGTH_MASK
    return datapath.EMPTY


@kernel(inline=True)
def sound(word):
    """Whether a write-back is a whole frame that fits its buffer: done, end of packet, no MAC error, 1..2048 bytes."""
    # In one comparison, of the word less 1: a length of 0 borrows from the bits above, and either way is found out.
    less = wrapping_sub(word, ONE)
    return less & (LEGACY_DD | LEGACY_EOP | LEGACY_ERROR | TOO_LONG) == LEGACY_DD | LEGACY_EOP


@datapath.rx_broken.implement(RxQueue)
@kernel(inline=True)
def rx_broken(rxq, i):
    word = load_acquire(rxq.line.desc[i], "word")
    return word & LEGACY_DD != ZERO and not sound(word)


@datapath.rx_prefetch.implement(RxQueue)
@kernel(inline=True)
def rx_prefetch(rxq, i):
    prefetch(rxq.line.buffer[i], "octets")


@in_place.rx_view.implement(RxQueue)
@kernel(inline=True)
def rx_view(rxq, i, length, arrival):
    return view(rxq.line, i, length, arrival)


@in_place.resend.implement(RxQueue)
@kernel(inline=True)
def resend(rxq, i, length):
    # DEVIATION(null-descriptors): a dropped packet is a descriptor without data (7.2.3.2.2), between packets, with EOP.
    rxq.line.desc[i].word = length | ONE_BUFFER  # DD is clear again
    return (i + ONE) & U(len(rxq.line.desc) - 1)


@in_place.hand_over.implement(RxQueue)
@kernel(inline=True)
def hand_over(rxq, txq, n):
    desc, mask = rxq.line.desc, U(len(rxq.line.desc) - 1)
    first = rxq.state.index & mask
    end = first + n
    last_of_block = first | (BLOCK - ONE)
    while last_of_block < end:
        desc[last_of_block & mask].word |= RS
        last_of_block += BLOCK
    if load_acquire(desc[end & mask], "word") & LEGACY_DD == ZERO:  # nothing more for now: let all come back
        desc[(end + mask) & mask].word |= RS
    rxq.state.index = end & mask
    store_doorbell(txq.regs, "TDT", end & mask)


@in_place.recycle.implement(RxQueue)
@kernel(inline=True)
def recycle(rxq, txq):
    mask = U(len(rxq.line.desc) - 1)
    head = load_acquire(rxq.line, "head") & mask
    if head != rxq.state.recycled:
        rxq.state.recycled = head
        store_doorbell(rxq.regs, "RDT", (head + mask) & mask)  # tail == head would mean "no descriptors"


@waiting.rx_arm.implement(RxQueue)
@kernel
def rx_arm(rxq):
    store_doorbell(rxq.mask, "EIMS", rxq.state.vector)
    i, head = rx_start(rxq), load_acquire(rxq.line, "head") & U(len(rxq.line.desc) - 1)
    # While something waits to be sent, there may be no descriptor left to receive into.
    return load_acquire(rxq.line.desc[i], "word") & LEGACY_DD != ZERO or head != i


waiting.rx_disarm.implement(RxQueue)(rx_disarm)


class Lines:
    """The memory of one queue of both devices, one line each way. Stands where other devices have a pool."""

    def __init__(self, ring_size, needs, node=None):
        layout = line(ring_size)
        self._memories = [DmaMemory(layout.itemsize, needs, node) for _ in range(2)]
        self.records = [memory.take(layout, align=128)[0] for memory in self._memories]
        self.addresses, self._buses = None, []

    def port(self, bus):
        """0 for the device that was opened first, 1 for the other."""
        return self._buses.index(bus)

    def map(self, bus):
        addresses = []
        with contextlib.ExitStack() as undo:
            for memory in self._memories:
                addresses.append(_contiguous(bus, memory))
                undo.callback(bus.unmap_dma, memory)
            if self.addresses not in (None, addresses):
                raise DmaError(f"{bus.name} and {self._buses[0].name} see memory at different addresses; they cannot "
                               "forward in place")
            undo.pop_all()
        self._buses.append(bus)
        self.addresses = addresses
        for record, address in zip(self.records, addresses, strict=True):
            start = address + record.dtype.fields["buffer"][1]
            record.desc["addr"] = start + np.arange(len(record.desc)) * BUFFER_STRIDE

    def unmap(self, bus):
        for memory in self._memories:
            bus.unmap_dma(memory)
        self._buses.remove(bus)
        if not self._buses:
            for memory in self._memories:
                memory.close()

    def restore(self, buffers):
        """Buffers never leave their descriptors."""


def _contiguous(bus, memory):
    """Where the device behind `bus` sees `memory`. DmaError if that is not one piece."""
    pages = bus.map_dma(memory).astype(np.int64)
    if (np.diff(pages) != memory.page_size).any():
        bus.unmap_dma(memory)
        raise DmaError(f"{bus.name}: {memory.size} bytes for a ring and its buffers are not contiguous for the device; "
                       "choose a smaller ring size")
    return int(pages[0])


class InPlaceIxgbe(Ixgbe):
    """One of two ports that forward in place. `pools` are the `Lines` that both were opened with."""

    in_place = True
    RX_DESCRIPTORS = setup.LEGACY

    @classmethod
    def new_pools(cls, queues, ring_size, buses):
        return [Lines(ring_size, buses[0].memory_needs, buses[0].numa_node) for _ in range(queues)]

    def _take_rings(self):
        here = self.pools[0].port(self.bus)
        return ([(lines.records[port], lines.addresses[port]) for lines in self.pools] for port in (here, 1 - here))

    def _receive_queue(self, k, ring):
        state = new_record(STATE)
        return RxQueue(ring, state, self._registers_of(r.RX_QUEUE, k, RX_REGISTERS), self._mask_of(k, state))

    def _transmit_queue(self, k, ring):
        lines = self.pools[k]
        head = lines.addresses[1 - lines.port(self.bus)] + ring.dtype.fields["head"][1]
        setup.enable_head_write_back(self.regs, k, head)
        return TxQueue(self._registers_of(r.TX_QUEUE, k, TX_REGISTERS))

    def _release(self):
        return [()] * self.queues

    def _kernel_counters(self):
        return sum(int(rxq.state.errors) for rxq in self.rx), 0
