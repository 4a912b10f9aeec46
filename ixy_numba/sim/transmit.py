"""The transmit path of the simulated 82599: from descriptors to frames on the wire. Section 7.2."""

from ..core.jit import kernel
from ..core.raw import (
    load8,
    load64,
    load_acquire32,
    prefetch,
    store_release32,
)
from .mac import CRC_SIZE, HEADER_SIZE, MAC_MASK, size_class
from .offload import DEXT, IC, IFCS, OFFLOADS, TSE, VLE, next_segment, payload_size, possible
from .offload import LONGEST as LONGEST_FRAME
from .state import (
    BATCH,
    BPTC,
    DMA_FAULTS,
    GOTC,
    GPTC,
    MODEL_FAULTS,
    MPTC,
    ONE,
    SINK,
    TPT,
    TX_DATA,
    TX_HEAD,
    TX_RING,
    TX_SCRATCH_SIZE,
    ZERO,
    U,
    reach,
    read_dma,
)
from .wire import SENT, check_sequence, emit

TDH, TDT = U(0x10), U(0x18)
LENGTH = U(0xFFFF)
TYPE, CONTEXT, DATA = U(15 << 20), U(2 << 20), U(3 << 20)
EOP, RS = U(1 << 24), U(1 << 27)
DD = U(1)
# A whole frame in one buffer, to go out as it is: this of the descriptor must be that
SIMPLE_MASK, SIMPLE = TYPE | EOP | IFCS | DEXT | VLE | TSE | OFFLOADS, DATA | EOP | IFCS | DEXT
LEGACY_MASK, LEGACY = EOP | IFCS | IC | DEXT | VLE, EOP | IFCS
LONGEST = U(TX_SCRATCH_SIZE)
INCOMPLETE, DROPPED, COMPLETE = U(0), U(1), U(2)


@kernel
def fetch(device, ring, n):
    """Look at up to `n` descriptors and note where their frames are; stops before the first that is not SIMPLE."""
    shortest = max(HEADER_SIZE, device.min_frame) if device.tx_pad else HEADER_SIZE
    if device.tx_crc == ZERO:
        return ZERO
    for k in range(n):
        descriptor = ring + (U(k) << U(4))
        command = load64(descriptor + U(8))
        length = command & LENGTH
        simple = command & SIMPLE_MASK == SIMPLE or command & LEGACY_MASK == LEGACY
        if not simple or not shortest <= length <= LONGEST_FRAME:
            return U(k)
        address, reachable = reach(device, TX_DATA, load64(descriptor))
        if reachable < length:
            return U(k)
        prefetch(address)
        device.fetched[k] = address
        device.fetched_length[k] = length
    return n


@kernel
def report(device, queue, descriptor, index):
    """What RS asks for: DD in the descriptor or, with head write-back (7.2.3.5.2), the head now after it in memory."""
    device.happened |= queue.cause
    if queue.head_at == ZERO:
        store_release32(descriptor + U(12), DD)
        return
    target, reachable = reach(device, TX_HEAD, queue.head_at)
    if reachable < U(4):
        device.wire[DMA_FAULTS] += ONE
    else:
        store_release32(target, index + ONE if index + ONE < queue.length else ZERO)


@kernel
def send(device, queue, ring, head, n, now, time_ns):
    """Put the first `n` fetched frames on the wire and report status; returns how many it took."""
    octets, count, done, sink = ZERO, device.count, ZERO, device.sink == SINK
    while done < n:
        address, length = device.fetched[done], device.fetched_length[done]
        if sink:
            check_sequence(queue, address, length)
        elif not emit(device, queue, address, length, now, time_ns):
            break
        octets += length
        device.tx_sizes[size_class(length + CRC_SIZE)] += ONE
        if load8(address) & ONE:
            count[BPTC if load64(address) & MAC_MASK == MAC_MASK else MPTC] += ONE
        descriptor = ring + (done << U(4))
        if load64(descriptor + U(8)) & RS:
            report(device, queue, descriptor, head + done)
        done += ONE
    if sink:
        device.wire[SENT] += done
    _count(device, queue, done, octets)
    return done


@kernel(inline=True)
def _count(device, queue, frames, octets):
    count = device.count
    count[GPTC] += frames
    count[TPT] += frames
    count[GOTC] += octets + frames * CRC_SIZE
    device.qptc[queue.counters] += frames
    device.qbtc[queue.counters] += octets


@kernel
def assemble(device, queue, head, pending):
    """What the descriptors at `head` add up to, in the scratch and device.outgoing: (descriptors, what came of it)."""
    out = device.outgoing
    total, used, damaged = ZERO, ZERO, False
    while used < pending:
        descriptor, reachable = reach(device, TX_RING, queue.ring + ((head + used) % queue.length << U(4)))
        if reachable < U(16):
            return _halt(device, queue)
        command = load64(descriptor + U(8))
        kind, length = command & TYPE, command & LENGTH
        used += ONE
        if command & DEXT and kind == CONTEXT:
            if used == ONE:
                context = queue.context[command >> U(36) & ONE]
                context[0], context[1] = load64(descriptor), command
                return used, DROPPED
            damaged = True
            continue
        if length == ZERO and used == ONE and command & (DEXT | EOP) == EOP:
            return used, DROPPED  # a null descriptor (7.2.3.2.2): between frames, it transfers nothing
        if used == ONE:
            out.command = command
        if command & DEXT and kind != DATA or length == ZERO or total + length > LONGEST:
            damaged = True
        else:
            if not read_dma(device, TX_DATA, load64(descriptor), device.tx_scratch_at + total, length):
                return _halt(device, queue)
            total += length
        if command & EOP or kind != DATA and command & DEXT:
            context = queue.context[out.command >> U(36) & ONE]
            out.lengths, out.tucmd = context[0], context[1]
            out.used, out.length, out.sent, out.last, out.queue = used, total, ZERO, command, queue.registers
            if damaged or total < HEADER_SIZE or not possible(out):
                device.wire[MODEL_FAULTS] += ONE
                return used, DROPPED
            out.end = payload_size(out)
            return used, COMPLETE
    if pending + ONE == queue.length:  # a full ring without an end
        device.wire[MODEL_FAULTS] += ONE
        return used, DROPPED
    return ZERO, INCOMPLETE


@kernel
def _halt(device, queue):
    """A failed read stops the queue until it is enabled again."""
    device.wire[DMA_FAULTS] += ONE
    queue.enabled = ZERO
    return ZERO, INCOMPLETE


@kernel
def send_segments(device, queue, now, time_ns):
    """Put device.outgoing on the wire, frame by frame; False if the rest has to wait."""
    out = device.outgoing
    while out.sent < out.end:
        address, length, taken = next_segment(device)
        if length:
            if not emit(device, queue, address, length, now, time_ns):
                return False
            device.tx_sizes[size_class(length + CRC_SIZE)] += ONE
            if load8(address) & ONE:
                device.count[BPTC if load64(address) & MAC_MASK == MAC_MASK else MPTC] += ONE
            _count(device, queue, ONE, length)
        out.sent += taken
    return True


@kernel
def send_assembled(device, queue, head, pending, now, time_ns):
    """One packet, or a descriptor that is none, the long way; returns the descriptors it took, 0 if it has to wait."""
    out = device.outgoing
    if out.waiting == ZERO:
        used, outcome = assemble(device, queue, head, pending)
        out.waiting = ONE if outcome == COMPLETE else ZERO
    elif out.queue != queue.registers:
        return ZERO  # the wire is busy with another queue's packet
    else:
        used = out.used
    if out.waiting:
        if not send_segments(device, queue, now, time_ns):
            return ZERO
        out.waiting = ZERO
    for k in range(used):
        index = (head + U(k)) % queue.length
        descriptor, reachable = reach(device, TX_RING, queue.ring + (index << U(4)))
        if reachable < U(16):  # taken away while the packet waited for the wire
            _halt(device, queue)
            return ZERO
        if load64(descriptor + U(8)) & RS:
            report(device, queue, descriptor, index)
    return used


@kernel
def transmit(device, queue, now, time_ns, budget):
    """Deal with up to `budget` descriptors of one queue; returns how many."""
    # DEVIATION(sim-thresholds): PTHRESH, HTHRESH and WTHRESH change nothing, status is written back at once.
    # DEVIATION(sim-rate): frames leave as fast as they come, not at 10 Gbit/s.
    size, head = queue.length, queue.head
    tail = load_acquire32(queue.registers + TDT)
    if tail == head:
        return ZERO
    if tail >= size:
        device.wire[MODEL_FAULTS] += ONE
        queue.enabled = ZERO
        return ZERO
    pending = tail - head if tail > head else tail + size - head
    n = ZERO
    while n < min(budget, pending):
        ring, reachable = reach(device, TX_RING, queue.ring + (head << U(4)))
        run = min(min(budget, pending) - n, size - head, reachable >> U(4), U(BATCH))
        found = fetch(device, ring, run)
        if found:
            used = send(device, queue, ring, head, found, now, time_ns)
        else:
            used = send_assembled(device, queue, head, pending - n, now, time_ns)
        n += used
        head = (head + used) % size
        if used == ZERO or used < found:
            break
    if n:
        queue.head = head
        store_release32(queue.registers + TDH, head)
    return n
