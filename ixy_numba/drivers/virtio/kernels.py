"""The data path over split virtqueues (virtio 1.1: 2.6): what runs for every packet.

A *position* counts the entries of a ring since the start, without wrapping; `position & mask` is its slot. What was
posted at a slot is kept in private memory: the descriptor's id (`posted`) and the buffer in it (`held`). Devices use
descriptors in the order in which they were made available, so the used ring's entry at a position normally names the
id posted there. Where it names another one that is outstanding, the two slots change places; anything else is a fault
of the device, and the entry stands for its own slot. So every buffer is always in exactly one place, whatever the
device writes, and nothing that it writes is used as an index or an address.
"""

from typing import NamedTuple

import numpy as np

from ... import datapath, waiting
from ...core import lifetime
from ...core.jit import kernel
from ...core.libc import write_at, write_from
from ...core.mmio import fence, likely, load_acquire, prefetch, store_doorbell, store_release
from ...core.pool import (
    ADDRESS_SHIFT,
    BUFFER_SIZE,
    HEADROOM,
    LENGTH_MASK,
    LENGTH_SHIFT,
    ONE,
    ZERO,
    PoolView,
    U,
    lend,
    take,
    word_of,
)
from .descriptors import NO_INTERRUPT, NO_NOTIFY, NUM_BUFFERS_SHIFT

LOW16, WRAP16 = U(0xFFFF), U(0x10000)
LOW32, WRAP32 = U(0xFFFFFFFF), U(1 << 32)
FRAME_MAX = U(BUFFER_SIZE)
BLOCK = U(32)  # sent buffers are looked for once so many are on their way
INDEX_JUMPED = 1  # state.broken: the used index moved by more than was outstanding
BEFORE = U(HEADROOM // 8 - 1)  # the last 8 bytes of the headroom

_QUEUE = [
    *lifetime.WORDS,
    ("ready", "u8"),  # the position up to which the device has used what was posted: its used index, as last read
    ("errors", "u8"), ("broken", "u8"),  # entries that made no sense; why the queue stands still for good
    ("packets", "u8"), ("bytes", "u8"),
    ("header", "u8"),  # bytes in front of each frame
    ("event_idx", "u8"),  # whether the device says by index when to notify it, and not by a flag
    # Notification (bus.virtio.Notifier): the word and where it goes; without a file descriptor (-1), to the doorbell
    ("word", "u8"), ("word_address", "u8"), ("width", "u8"), ("descriptor", "i8"), ("offset", "i8"),
]


def _slots(size):
    """Per slot: buffer, descriptor id, and the slot that each id is posted at."""
    return [("held", "u4", (size,)), ("posted", "u2", (size,)), ("slot_of", "u2", (size,))]


def rx_state(size):
    """Software's side of a receive queue. Every slot is always posted, but for what the current batch has taken."""
    return np.dtype([
        ("index", "u8"),  # the position of the next entry to look at
        ("sure", "u8"),  # a frame of at most so many bytes is in one buffer for certain
        ("rest", "u8"), ("rest_end", "u8"),  # the positions of the further buffers of a frame that takes several
        *_QUEUE, *_slots(size), ("length", "u2", (size,))])


def tx_state(size):
    """Software's side of a transmit queue: positions of the next free slot, and of the oldest not taken back."""
    return np.dtype([("tail", "u8"), ("clean", "u8"), *datapath.TX_COUNTERS, *_QUEUE, *_slots(size)])


class RxQueue(NamedTuple):
    ring: np.record
    state: np.record
    pool: PoolView
    doorbell: np.record


class TxQueue(NamedTuple):
    ring: np.record
    state: np.record
    pool: PoolView
    doorbell: np.record


datapath.tx_batch.implement(TxQueue)(datapath.send_batch)


# Both directions


@kernel(inline=True)
def look(ring, state, end):
    """Read the used index; it cannot have gone beyond what was posted, up to the position `end`."""
    fresh = (U(load_acquire(ring, "used_idx")) + WRAP16 - (state.ready & LOW16)) & LOW16
    if likely(fresh <= end - state.ready):
        state.ready += fresh
    else:
        state.broken = INDEX_JUMPED


@kernel
def reorder(ring, state, position, end, used):
    """Let slots change places so that id `used` is the one at `position`; False if it is not outstanding up to `end`.

    The device has read both entries of the available ring: it hands out this id, which came no earlier than the other.
    """
    mask = U(len(ring.desc) - 1)
    if used > mask:
        return False
    here, there = position & mask, U(state.slot_of[used])
    if (there + mask + ONE - here) & mask >= end - position:
        return False
    state.posted[there], state.posted[here] = state.posted[here], used
    state.held[there], state.held[here] = state.held[here], state.held[there]
    state.slot_of[state.posted[there] & mask] = there
    state.slot_of[used] = here
    ring.avail[here], ring.avail[there] = used, state.posted[there]
    return True


@kernel(inline=True)
def publish(queue, before, end):
    """Make what is posted from position `before` to `end` available, and notify the device if it asks for it."""
    ring, state = queue.ring, queue.state
    store_release(ring, "avail_idx", end & LOW16)
    fence()  # 2.6.13.4: the index must be out before the device's wish is read, else both sides could wait
    if state.event_idx:
        wanted = U(load_acquire(ring, "avail_event"))
        due = (end + WRAP16 - ONE - wanted) & LOW16 < end - before
    else:
        due = U(load_acquire(ring, "used_flags")) & NO_NOTIFY == ZERO
    if not likely(not due):
        notify(state, queue.doorbell)


@kernel
def notify(state, doorbell):
    if state.descriptor < 0:
        store_doorbell(doorbell, "queue", state.word & LOW16)
    elif state.offset < 0:
        write_from(state.descriptor, state.word_address, state.width)
    else:
        write_at(state.descriptor, state.word_address, state.width, state.offset)


# Receive


@datapath.rx_batch.implement(RxQueue)
@kernel
def rx_batch(rxq, batch, limit):
    """See `datapath.rx_batch`. Each packet taken is replaced in its slot by a buffer from the pool."""
    state, table = rxq.state, rxq.pool.table
    limit = min(U(limit), U(len(batch.packet)))
    lifetime.enter(state)
    i, top, n, seen = rx_start(rxq), table.top, ZERO, ZERO
    while seen < limit:
        seen += ONE
        length = rx_next(rxq, i)
        if not likely(length != datapath.EMPTY):
            if not rx_broken(rxq, i):
                break
            state.errors += ONE
            rx_finish(rxq, rx_refill(rxq, i, rx_buffer(rxq, i)))
            i = rx_start(rxq)  # past the rest of a frame that took several buffers
            continue
        if top == ZERO:
            table.empty += ONE
            break
        index = rx_buffer(rxq, i)
        batch.packet[n] = index | length << LENGTH_SHIFT | lend(table, index)
        n += ONE
        i = rx_refill(rxq, i, take(table, top))
        top -= ONE
    table.top = top
    if i != state.index:
        rx_finish(rxq, i)
    lifetime.leave(state)
    return n


@datapath.rx_start.implement(RxQueue)
@kernel(inline=True)
def rx_start(rxq):
    state = rxq.state
    look(rxq.ring, state, state.index + U(len(rxq.ring.desc)))
    if not likely(state.index < state.rest or state.index >= state.rest_end):
        skip_rest(rxq)
    return state.index


@kernel
def skip_rest(rxq):
    """Post the further buffers of a frame again that was dropped because it takes several."""
    ring, state = rxq.ring, rxq.state
    size, start, i = U(len(ring.desc)), state.index, state.index
    while i < min(state.rest_end, state.ready):
        used = U(load_acquire(ring.used[i & (size - ONE)], "id"))
        if used != U(state.posted[i & (size - ONE)]) and not reorder(ring, state, i, start + size, used):
            state.errors += ONE
            state.packets += ONE  # those and errors go together: see rx_finish
        i += ONE
    state.index = i
    publish(rxq, start + size, i + size)


@datapath.rx_next.implement(RxQueue)
@kernel(inline=True)
def rx_next(rxq, i):
    state, slot = rxq.state, i & U(len(rxq.ring.desc) - 1)
    if i == state.ready:
        return datapath.EMPTY
    entry = rxq.ring.used[slot]
    used, length = U(load_acquire(entry, "id")), U(load_acquire(entry, "len"))  # once: the device may change it
    length = (length + WRAP32 - state.header) & LOW32
    if not likely(used == U(state.posted[slot]) and (length + LOW32) & LOW32 < state.sure):
        length = settle_odd(rxq, i, used, length)
    state.length[slot] = length & LENGTH_MASK
    return length


@kernel
def settle_odd(rxq, i, used, length):
    """The frame's length at position `i` where the entry is not the usual kind; EMPTY if it is broken."""
    ring, state, size = rxq.ring, rxq.state, U(len(rxq.ring.desc))
    if used != U(state.posted[i & (size - ONE)]) and not reorder(ring, state, i, state.index + size, used):
        return datapath.EMPTY
    if (length + LOW32) & LOW32 >= FRAME_MAX:
        return datapath.EMPTY
    if (length + LOW32) & LOW32 >= state.sure:
        # 5.1.6.4: a buffer that is not the last one of its frame is full, so that only here the header has to be read.
        before = rxq.pool.memory.buffer[rx_buffer(rxq, i)].headroom
        buffers = load_acquire(before, BEFORE) >> NUM_BUFFERS_SHIFT
        if buffers != ONE:
            state.rest, state.rest_end = i + ONE, i + max(min(buffers, size), ONE)
            return datapath.EMPTY
    return length


@datapath.rx_broken.implement(RxQueue)
@kernel(inline=True)
def rx_broken(rxq, i):
    return i != rxq.state.ready and rx_next(rxq, i) == datapath.EMPTY


@datapath.rx_prefetch.implement(RxQueue)
@kernel(inline=True)
def rx_prefetch(rxq, i):
    prefetch(rxq.pool.memory.buffer[rx_buffer(rxq, i)], "octets")


@datapath.rx_buffer.implement(RxQueue)
@kernel(inline=True)
def rx_buffer(rxq, i):
    return U(rxq.state.held[i & U(len(rxq.ring.desc) - 1)])


@datapath.rx_refill.implement(RxQueue)
@kernel(inline=True)
def rx_refill(rxq, i, index):
    state, mask = rxq.state, U(len(rxq.ring.desc) - 1)
    slot = i & mask
    state.bytes += U(state.length[slot])
    state.held[slot] = index
    rxq.ring.desc[U(state.posted[slot]) & mask].addr = (word_of(rxq.pool.table, index) >> ADDRESS_SHIFT) - state.header
    return i + ONE


@datapath.rx_finish.implement(RxQueue)
@kernel(inline=True)
def rx_finish(rxq, i):
    state, size = rxq.state, U(len(rxq.ring.desc))
    start = state.index
    state.index = i
    state.packets += i - start  # broken ones too: those are counted in `errors` as well
    publish(rxq, start + size, i + size)


# Transmit


@datapath.tx_space.implement(TxQueue)
@kernel(inline=True)
def tx_space(txq):
    state = txq.state
    if state.tail - state.clean >= BLOCK:
        reclaim(txq)
    return U(len(txq.ring.desc)) - (state.tail - state.clean)


@kernel
def reclaim(txq):
    """Put the buffers that the device has sent back into the pool."""
    ring, state, table = txq.ring, txq.state, txq.pool.table
    mask, i, top = U(len(ring.desc) - 1), state.clean, table.top
    look(ring, state, state.tail)
    while i != state.ready:
        slot = i & mask
        used = U(load_acquire(ring.used[slot], "id"))
        if used != U(state.posted[slot]) and not reorder(ring, state, i, state.tail, used):
            state.errors += ONE
        table.free[top] = state.held[slot]
        top += ONE
        i += ONE
    if i != state.clean:
        table.top, state.clean, state.stalled = top, i, ZERO


@datapath.tx_start.implement(TxQueue)
@kernel(inline=True)
def tx_start(txq):
    return txq.state.tail


@datapath.tx_post.implement(TxQueue)
@kernel(inline=True)
def tx_post(txq, tail, index, bus_addr, length):
    state, mask = txq.state, U(len(txq.ring.desc) - 1)
    slot = tail & mask
    desc = txq.ring.desc[U(state.posted[slot]) & mask]
    headroom = txq.pool.memory.buffer[index].headroom
    headroom[BEFORE - ONE] = headroom[BEFORE] = ZERO
    state.held[slot] = index
    state.bytes += length
    desc.addr = bus_addr - state.header
    desc.len = length + state.header
    return tail + ONE


@datapath.tx_finish.implement(TxQueue)
@kernel(inline=True)
def tx_finish(txq, tail):
    state = txq.state
    start = state.tail
    state.tail = tail
    state.packets += tail - start
    publish(txq, start, tail)


# Interrupts: 2.6.7


@waiting.rx_arm.implement(RxQueue)
@kernel
def rx_arm(rxq):
    ring, position = rxq.ring, rxq.state.index & LOW16
    if rxq.state.event_idx:
        store_release(ring, "used_event", position)  # once the entry there is used, and not again
    else:
        store_release(ring, "avail_flags", ZERO)
    fence()  # the wish must be out before the used index is read, else the device could have missed it
    return U(load_acquire(ring, "used_idx")) != position


@waiting.rx_disarm.implement(RxQueue)
@kernel
def rx_disarm(rxq):
    if rxq.state.event_idx == ZERO:
        store_release(rxq.ring, "avail_flags", NO_INTERRUPT)
