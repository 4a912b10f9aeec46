"""The 82599's data path: what runs for every packet. Datasheet sections 7.1 (receive) and 7.2 (transmit)."""

from typing import NamedTuple

import numpy as np

from ... import datapath, waiting
from ...core import lifetime
from ...core.integers import wrapping_sub
from ...core.jit import kernel
from ...core.mmio import likely, load_acquire, prefetch, store_doorbell
from ...core.pool import (
    ADDRESS_SHIFT,
    LENGTH_MASK,
    LENGTH_SHIFT,
    ONE,
    TOO_LONG,
    ZERO,
    PoolView,
    U,
    lend,
    take,
    word_of,
)
from .descriptors import DATA, DD, EOP, ERROR, LENGTH, ONE_BUFFER, PAYLEN_SHIFT, RS, SENT

STATUS = U(0xFFFFFFFF)
BLOCK = U(32)  # transmit descriptors that complete together: only the last of each block reports its status

# The registers of one queue, mapped from BAR 0: kernels only ever write the tail.
RX_REGISTERS = np.dtype({"names": ["RDT"], "formats": ["u4"], "offsets": [0x18], "itemsize": 0x40})
TX_REGISTERS = np.dtype({"names": ["TDT"], "formats": ["u4"], "offsets": [0x18], "itemsize": 0x40})
MASK = np.dtype([("EIMS", "u4")])  # the one that its vector is unmasked in


def rx_state(size):
    """Software's side of a receive ring: the next descriptor, its vector's bit in EIMS, the buffer in each."""
    return np.dtype([*lifetime.WORDS, ("index", "u8"), ("errors", "u8"), ("vector", "u8"), ("held", "u4", (size,))])


def tx_state(size):
    """Software's side of a transmit ring: next free descriptor, oldest unreclaimed one, the buffer in each."""
    return np.dtype([*lifetime.WORDS, ("tail", "u8"), ("clean", "u8"), *datapath.TX_COUNTERS,
                     ("held", "u4", (size,))])


class RxQueue(NamedTuple):
    ring: np.record
    state: np.record
    regs: np.record
    pool: PoolView
    mask: np.record


class TxQueue(NamedTuple):
    ring: np.record
    state: np.record
    regs: np.record
    pool: PoolView


datapath.tx_batch.implement(TxQueue)(datapath.send_batch)


@datapath.rx_batch.implement(RxQueue)
@kernel
def rx_batch(rxq, batch, limit):
    """See `datapath.rx_batch`. Each packet taken is replaced in its descriptor by a buffer from the pool."""
    ring, state, table = rxq.ring, rxq.state, rxq.pool.table
    limit = min(U(limit), U(len(batch.packet)))
    lifetime.enter(state)
    mask = U(len(ring.desc) - 1)
    i, top, n, seen = state.index & mask, table.top, ZERO, ZERO
    room = min(limit, top)
    while seen < room:
        done = load_acquire(ring.desc[i], "done")  # status and length in one read
        index = rx_buffer(rxq, i)
        if likely(sound(done)):
            batch.packet[n] = index | (done & LENGTH) | lend(table, index)
            index = take(table, wrapping_sub(top, n))
            n += ONE
        elif done & DD == ZERO:
            break
        else:  # there is nothing to hand out: the same buffer again
            state.errors += ONE
            room = min(limit, room + ONE)
        i = rx_refill(rxq, i, index)
        seen += ONE
    if seen == room and room < limit and load_acquire(ring.desc[i], "done") & DD != ZERO:
        table.empty += ONE
    if seen != ZERO:
        table.top, state.index = top - n, i
        store_doorbell(rxq.regs, "RDT", (i + mask) & mask)  # one short of i: tail == head would mean "no descriptors"
    lifetime.leave(state)
    return n


@kernel(inline=True)
def sound(done):
    """Whether a write-back is a whole frame that fits its buffer: done, end of packet, no MAC error, 1..2048 bytes."""
    # In one comparison, of the length less 1 (modulo 2**16: an empty frame is then far too long).
    return ((done & (STATUS | LENGTH)) + LENGTH) & (DD | EOP | ERROR | TOO_LONG) == DD | EOP


# The same in steps, for loops that receive, handle and send in one pass.


@datapath.rx_start.implement(RxQueue)
@kernel(inline=True)
def rx_start(rxq):
    return rxq.state.index & U(len(rxq.ring.desc) - 1)


@datapath.rx_next.implement(RxQueue)
@kernel(inline=True)
def rx_next(rxq, i):
    done = load_acquire(rxq.ring.desc[i], "done")
    if likely(sound(done)):
        return done >> LENGTH_SHIFT & LENGTH_MASK
    return datapath.EMPTY


@datapath.rx_broken.implement(RxQueue)
@kernel(inline=True)
def rx_broken(rxq, i):
    done = load_acquire(rxq.ring.desc[i], "done")
    return done & DD != ZERO and not sound(done)


@datapath.rx_prefetch.implement(RxQueue)
@kernel(inline=True)
def rx_prefetch(rxq, i):
    index = rx_buffer(rxq, i & U(len(rxq.ring.desc) - 1))
    prefetch(rxq.pool.memory.buffer[index], "octets")


@datapath.rx_buffer.implement(RxQueue)
@kernel(inline=True)
def rx_buffer(rxq, i):
    return U(rxq.state.held[i]) & U(len(rxq.pool.table.word) - 1)


@datapath.rx_refill.implement(RxQueue)
@kernel(inline=True)
def rx_refill(rxq, i, index):
    desc = rxq.ring.desc[i]
    rxq.state.held[i] = index
    desc.addr = word_of(rxq.pool.table, index) >> ADDRESS_SHIFT
    desc.done = ZERO
    return (i + ONE) & U(len(rxq.ring.desc) - 1)


@datapath.rx_finish.implement(RxQueue)
@kernel(inline=True)
def rx_finish(rxq, i):
    mask = U(len(rxq.ring.desc) - 1)
    rxq.state.index = i
    store_doorbell(rxq.regs, "RDT", (i + mask) & mask)


@datapath.tx_space.implement(TxQueue)
@kernel(inline=True)
def tx_space(txq):
    state, mask = txq.state, U(len(txq.ring.desc) - 1)
    tail, clean = state.tail & mask, state.clean & mask
    if (tail + mask + ONE - clean) & mask >= BLOCK:
        clean = reclaim(txq, clean) & mask
    return (clean + mask - tail) & mask


@kernel
def reclaim(txq, clean):
    """Put the buffers of all blocks that the device has reported sent back into the pool; returns the new `clean`."""
    ring, state, table = txq.ring, txq.state, txq.pool.table
    mask = U(len(ring.desc) - 1)
    tail, clean = state.tail & mask, clean & mask
    while (tail + mask + ONE - clean) & mask >= BLOCK:
        block, top = clean & ~(BLOCK - ONE), table.top
        if load_acquire(ring.desc[block + BLOCK - ONE], "command") & SENT == ZERO:
            break
        if top > U(len(table.free)) - BLOCK:  # never: it lets the compiler check, and move, a block at once
            break
        for k in range(BLOCK):
            table.free[top + k] = state.held[block | k]
        table.top = top + BLOCK
        state.stalled = ZERO
        clean = (clean + BLOCK) & mask
    state.clean = clean
    return clean


@datapath.tx_start.implement(TxQueue)
@kernel(inline=True)
def tx_start(txq):
    return txq.state.tail & U(len(txq.ring.desc) - 1)


@datapath.tx_post.implement(TxQueue)
@kernel(inline=True)
def tx_post(txq, tail, index, bus_addr, length):
    desc = txq.ring.desc[tail]
    txq.state.held[tail] = index
    desc.addr = bus_addr
    desc.command = DATA | ONE_BUFFER | length | length << PAYLEN_SHIFT
    return (tail + ONE) & U(len(txq.ring.desc) - 1)


@datapath.tx_finish.implement(TxQueue)
@kernel(inline=True)
def tx_finish(txq, tail):
    ring, mask = txq.ring, U(len(txq.ring.desc) - 1)
    block = txq.state.tail & mask & ~(BLOCK - ONE)  # RS is set here: a branch less for every packet
    while (tail + mask + ONE - block) & mask >= BLOCK:
        ring.desc[block + BLOCK - ONE].command |= RS
        block = (block + BLOCK) & mask
    txq.state.tail = tail
    store_doorbell(txq.regs, "TDT", tail)


# Interrupts: section 7.3. A vector is armed by unmasking it, and masks itself when it fires (EIAM).


@waiting.rx_arm.implement(RxQueue)
@kernel
def rx_arm(rxq):
    # What arrives before the store has got to the device is a cause that waits there: no need to be in time.
    store_doorbell(rxq.mask, "EIMS", rxq.state.vector)
    return load_acquire(rxq.ring.desc[rx_start(rxq)], "done") & DD != ZERO


@waiting.rx_disarm.implement(RxQueue)
@kernel
def rx_disarm(rxq):
    """One that has not fired may do so once, while nobody sleeps."""
