"""The receive path of the simulated 82599: from the wire through the MAC's rules into descriptors. Section 7.1."""

import numpy as np

from ..core.jit import kernel
from ..core.raw import (
    copy,
    load8,
    load32,
    load64,
    load_acquire32,
    store8,
    store32,
    store64,
    store_release32,
    store_release64,
)
from .checksum import IP_WRONG, L4_WRONG
from .mac import CRC_SIZE, HEADER_SIZE, admit, classify, destination_passes, longest_frame, size_class, tag_of
from .state import (
    BATCH,
    CALLING,
    CAPTURE,
    CORRUPTED,
    DMA_FAULTS,
    GENERATOR,
    GORC,
    GPRC,
    INBOX,
    LOST,
    MALFORMED,
    MODEL_FAULTS,
    MPC,
    NO_QUEUE,
    NOTHING,
    ONE,
    RECEIVED,
    RUNNING,
    RX_DATA,
    RX_RING,
    SCRATCH_SIZE,
    SILENT,
    TOR,
    TPR,
    XEC,
    ZERO,
    U,
    reach,
    write_dma,
)
from .wire import crc32, front, generate, pop, read_tap, ripe

RDH, RDT = U(0x10), U(0x18)
DD, EOP, RXE = U(1), U(2), U(1 << 29)
LEGACY_DD_EOP, LEGACY_CRC_ERROR = U(3 << 32), U(1 << 40)
VP = U(1 << 3)  # the VLAN tag was taken out and is in the write-back
SHIFT32, SHIFT48 = U(32), U(48)
CATCH_UP = U(256)  # frames that a late engine delivers at once; beyond that the wire's clock has stood still


# Descriptors, 7.1.6


@kernel(inline=True)
def free_descriptors(queue):
    tail, head = queue.tail, queue.head
    return tail - head if tail >= head else tail + queue.length - head


@kernel
def refresh_tail(device, queue):
    """Look at RDT. A tail beyond the ring gives the device nothing."""
    tail = load_acquire32(queue.registers + RDT)
    if tail >= queue.length:
        device.wire[MODEL_FAULTS] += ONE
        tail = queue.head
    queue.tail = tail


@kernel(inline=True)
def legacy_status(status):
    """Status and errors where a legacy descriptor has them: 7.1.5."""
    return (status & U(0xFF)) << SHIFT32 | (status >> U(30)) << U(46)


@kernel
def write_back(device, queue, descriptor, address, length, last):
    """Data of one descriptor to its buffer, then status and length. The buffer's address faults: the data is lost."""
    frame = device.pending
    if not write_dma(device, RX_DATA, load64(descriptor), address, length):
        device.wire[DMA_FAULTS] += ONE  # a posted write: nobody tells the device
    if queue.legacy:
        status = LEGACY_DD_EOP | legacy_status(frame.status) | frame.vlan << SHIFT48 if last else DD << SHIFT32
        store_release64(descriptor + U(8), status | (LEGACY_CRC_ERROR if frame.bad else ZERO) | length)
        return
    store64(descriptor, frame.hash << SHIFT32 | frame.type)
    status = (DD | EOP | frame.status | frame.vlan << SHIFT48 if last else DD) | (RXE if frame.bad else ZERO)
    store_release64(descriptor + U(8), status | length << SHIFT32)


@kernel
def place(device, queue):
    """The pending frame into as many descriptors as it takes. False while too few are free, True once dealt with."""
    frame = device.pending
    needed = ONE if frame.length <= queue.buffer else (frame.length + queue.buffer - ONE) // queue.buffer
    if free_descriptors(queue) < needed:
        refresh_tail(device, queue)
        if free_descriptors(queue) < needed:
            return False
    address, left = frame.address, frame.length
    while left:
        descriptor, reachable = reach(device, RX_RING, queue.ring + (queue.head << U(4)))
        if reachable < U(16):
            device.wire[DMA_FAULTS] += ONE
            # DEVIATION(sim-dma): a failed read stops its queue until it is enabled again; hardware wants a reset.
            queue.enabled = ZERO
            return True
        piece = min(left, queue.buffer)
        left -= piece
        write_back(device, queue, descriptor, address, piece, left == ZERO)
        address += piece
        queue.head = queue.head + ONE if queue.head + ONE < queue.length else ZERO
    device.happened |= queue.cause
    device.qprc[queue.counters] += ONE
    device.qbrc[queue.counters] += frame.length
    return True


@kernel
def store_frame(device, backlog):
    """Give the pending frame to its queue. False while it must wait: no descriptor, and the source or the FIFO can."""
    frame = device.pending
    queue = device.rx[frame.queue]
    if queue.enabled == ZERO:
        device.wire[NO_QUEUE] += ONE
    elif not place(device, queue):
        if frame.length > queue.buffer * (queue.length - ONE):
            device.wire[MODEL_FAULTS] += ONE  # the whole ring could not hold it
        elif device.phase != RUNNING:  # the source waits
            return False
        elif queue.drop:
            device.qprdc[queue.counters] += ONE
        elif backlog * (frame.length + CRC_SIZE) > device.fifo_bytes:
            # DEVIATION(sim-fifo): frames in the packet buffer are not made yet, so the oldest is lost, not the newest.
            device.count[MPC] += ONE
        else:
            return False
    consume(device)
    return True


# The source


@kernel(inline=True)
def random(device):
    """32 random bits (xorshift64)."""
    state = device.random
    state ^= state << U(13)
    state ^= state >> U(7)
    state ^= state << U(17)
    device.random = state
    return state >> SHIFT32


@kernel
def offered(device, now):
    """How many frames the wire has for the device by now, of those that it has not taken.

    A paced source's clock starts when the driver has given the first frame's descriptor back, so that what is lost is
    lost at the given rate, not to a program that is still being compiled.
    """
    if device.source == INBOX:
        if device.tap_reads:
            read_tap(device, now)
        return ripe(device.inbox, now, device.delay, U(BATCH))
    left = device.limit - device.taken
    if device.phase == SILENT:
        device.phase, device.start = CALLING, now + device.delay
    if now < device.start or left == ZERO:
        return ZERO
    if not device.paced:
        return left
    if device.phase == CALLING:
        if device.taken == ZERO:
            return ONE
        queue = device.rx[device.pending.queue]
        if load_acquire32(queue.registers + RDT) == queue.tail:
            return ZERO
        device.phase, device.start, device.seen = RUNNING, now, now
    return min(left, _due(device, now))


@kernel
def _due(device, now):
    """How many frames of a paced source have arrived and not been taken."""
    late = np.float64(now - min(device.seen, now)) * device.per_cycle
    if late > CATCH_UP:
        device.start += U((late - CATCH_UP) / device.per_cycle)
    device.seen = now
    due = U(np.float64(now - min(device.start, now)) * device.per_cycle) + ONE
    return due - min(due, device.taken)


@kernel
def fetch_frame(device):
    """Make the next frame of the source the pending one. False if it cannot be on a wire and was passed over."""
    frame = device.pending
    if device.source == GENERATOR:
        generate(device, device.rx_scratch_at, device.taken, device.flow)
        frame.address, frame.length = device.rx_scratch_at, device.frame_size
    elif device.source == CAPTURE:
        k = device.taken % device.frames
        frame.address = device.file + load64(device.offsets + k * U(8))
        frame.length = load32(device.lengths + k * U(4))
    else:
        frame.address, frame.length, _ = front(device.inbox)
    if not HEADER_SIZE <= frame.length <= U(SCRATCH_SIZE - 4):
        device.wire[MALFORMED] += ONE
        return False
    return True


@kernel
def consume(device):
    """The pending frame is dealt with."""
    device.pending.waiting = ZERO
    device.taken += ONE
    if device.source == GENERATOR:
        device.flow = device.flow + ONE if device.flow + ONE < device.flows else ZERO
    elif device.source == INBOX:
        pop(device.inbox)


@kernel
def _to_scratch(device):
    frame = device.pending
    if frame.address != device.rx_scratch_at:
        copy(device.rx_scratch_at, frame.address, frame.length)
        frame.address = device.rx_scratch_at


@kernel
def _strip(device, tag):
    """Take the VLAN tag out of the pending frame (7.4.2): what stands before it moves up."""
    frame = device.pending
    _to_scratch(device)
    here = frame.address
    first, second = load64(here), load32(here + U(8))
    store64(here + U(4), first)
    store32(here + U(12), second)
    frame.address, frame.length = here + U(4), frame.length - U(4)
    frame.vlan, frame.status = tag, frame.status | VP


@kernel
def draw(device):
    """The next frame arrives: its fate is decided once, here. It is pending afterwards, or gone."""
    frame, wire = device.pending, device.wire
    if not fetch_frame(device):
        consume(device)
        return
    wire[RECEIVED] += ONE
    if device.loss and random(device) < device.loss:
        wire[LOST] += ONE
        consume(device)
        return
    frame.bad = ZERO
    fcs = ZERO if device.crc_strip else crc32(frame.address, frame.length)
    if device.corrupt and random(device) < device.corrupt:
        wire[CORRUPTED] += ONE
        frame.bad = ONE
        _to_scratch(device)
        where = frame.address + random(device) % frame.length
        store8(where, load8(where) ^ ONE << (random(device) & U(7)))
    if not admit(device, frame.address, frame.length, frame.bad):
        consume(device)
        return
    frame.type, frame.hash, frame.status = classify(device, frame.address, frame.length)
    if frame.status & (IP_WRONG | L4_WRONG):
        device.count[XEC] += ONE
    frame.queue = U(device.reta[frame.hash & U(127)]) if frame.type & U(15) else ZERO
    if not device.crc_strip:
        _to_scratch(device)
        store32(frame.address + frame.length, fcs)
        frame.length += CRC_SIZE
    frame.vlan = ZERO
    tagged, tag = tag_of(device, frame.address, frame.length)
    if tagged and device.rx[frame.queue].vlan_strip:
        _strip(device, tag)
    frame.waiting = ONE


@kernel
def settle(device):
    """After a change of registers: can the generator's frames, all alike, go the short way?"""
    device.changed = ZERO
    queue = device.rx[0]
    device.plain = ZERO
    if device.source == GENERATOR and not (device.loss or device.corrupt or device.rss):
        octets = device.frame_size + CRC_SIZE
        legal = device.min_frame <= device.frame_size and octets <= longest_frame(device, device.template_at)
        whole = device.crc_strip and device.frame_size <= queue.buffer
        ordinary = load8(device.template_at) & ONE == ZERO and destination_passes(device, device.template_at)
        if legal and whole and ordinary:
            device.plain = ONE
            generate(device, device.segment_at, ZERO, ZERO)  # for its checksums, which are right like all others
            device.plain_type, _, device.plain_status = classify(device, device.segment_at, device.frame_size)


@kernel
def burst(device, n):
    """Up to `n` of the generator's frames into queue 0 without a look at each: the short way. Returns how many."""
    queue = device.rx[0]
    refresh_tail(device, queue)
    size, head, octets = device.frame_size, queue.head, device.frame_size + CRC_SIZE
    n = min(n, free_descriptors(queue), queue.length - head)
    ring, reachable = reach(device, RX_RING, queue.ring + (head << U(4)))
    n = min(n, reachable >> U(4))
    if n == ZERO:
        return ZERO
    extra = device.plain_status
    status = LEGACY_DD_EOP | legacy_status(extra) | size if queue.legacy else DD | EOP | extra | size << SHIFT32
    flow, sequence = device.flow, device.taken
    for k in range(n):
        descriptor = ring + (U(k) << U(4))
        target, reachable = reach(device, RX_DATA, load64(descriptor))
        if reachable >= size:
            generate(device, target, sequence, flow)
        else:  # over the end of a mapping
            generate(device, device.segment_at, sequence, flow)
            if not write_dma(device, RX_DATA, load64(descriptor), device.segment_at, size):
                device.wire[DMA_FAULTS] += ONE
        if queue.legacy == ZERO:
            store64(descriptor, device.plain_type)
        store_release64(descriptor + U(8), status)
        sequence += ONE
        flow = flow + ONE if flow + ONE < device.flows else ZERO
    queue.head = head + n if head + n < queue.length else ZERO
    device.taken, device.flow = sequence, flow
    device.happened |= queue.cause
    device.qprc[queue.counters] += n
    device.qbrc[queue.counters] += n * size
    _count_alike(device, n, octets)
    return n


@kernel(inline=True)
def _count_alike(device, n, octets):
    count = device.count
    count[TPR] += n
    count[GPRC] += n
    count[TOR] += n * octets
    count[GORC] += n * octets
    device.rx_sizes[size_class(octets)] += n
    device.wire[RECEIVED] += n


@kernel
def _miss(device, n):
    """`n` of the generator's frames are lost for want of descriptors."""
    queue = device.rx[0]
    if queue.drop:
        device.qprdc[queue.counters] += n
    else:
        device.count[MPC] += n
    device.taken += n
    device.flow = (device.flow + n) % device.flows
    _count_alike(device, n, device.frame_size + CRC_SIZE)


@kernel
def receive(device, now, budget):
    """Deal with up to `budget` frames of the wire; returns how many."""
    if device.source == NOTHING or device.rx_on == ZERO or device.rx_queues == ZERO:
        return ZERO
    if device.changed:
        settle(device)
    available = offered(device, now)
    budget, n = min(available, budget), ZERO
    if device.plain and device.rx[0].enabled and not device.pending.waiting:
        while n < budget:
            taken = burst(device, budget - n)
            if taken == ZERO:
                n += _overflow(device, available - n)
                break
            n += taken
    else:
        while n < budget:
            if not device.pending.waiting:
                draw(device)
            if device.pending.waiting and not store_frame(device, available - n):
                break
            n += ONE
    if n:
        for k in range(device.rx_queues):
            queue = device.rx[device.rx_enabled[k]]
            store_release32(queue.registers + RDH, queue.head)
    return n


@kernel
def _overflow(device, backlog):
    """No descriptor for the generator's frames: how many of those that are due are lost."""
    queue = device.rx[0]
    if free_descriptors(queue):  # not a lack of descriptors: the ring itself cannot be read
        device.wire[DMA_FAULTS] += ONE
        queue.enabled = ZERO
        return ZERO
    if device.phase != RUNNING:
        return ZERO
    kept = ZERO if queue.drop else device.fifo_bytes // (device.frame_size + CRC_SIZE)
    lost = backlog - min(backlog, kept)
    if lost:
        _miss(device, lost)
    return lost
