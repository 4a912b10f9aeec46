"""The benchmark's NIC: fills receive rings, completes transmit rings, and times the driver's phase in between.

One model for every driver, ours and the rivals in C. It knows a driver by the addresses of its rings and tail registers
(`PORT`), and sees memory as the drivers' own addresses. It runs on the driver's core: first the model writes packets,
then the memory is brought into the state that is asked for, then the driver alone runs against the clock.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ixy_numba.core.jit import kernel
from ixy_numba.core.memory import DmaMemory, new_record
from ixy_numba.core.mmio import _call, cycles, fence
from ixy_numba.core.raw import load8, load32, load64, load_acquire32, store32, store64, store_release32, store_release64
from ixy_numba.datapath import verb

U = np.uint64
ZERO, ONE, LINE, DESCRIPTOR = U(0), U(1), U(64), U(16)
RING, MASK = 512, U(511)
FLOWS, FRAME = 1024, 60  # bytes, without CRC
MASK32 = U(0xFFFFFFFF)
WARM, L3, DRAM = "warm", "l3", "dram"
STATES = (WARM, L3, DRAM)

RX_DONE = U(3 | FRAME << 32)  # advanced write-back: DD, EOP, length
RX_DONE_LEGACY = U(3 << 32 | FRAME)
RS, SENT = U(1 << 27), U(1 << 32)
DISCARD_EVERY = U(16)  # every 16th flow goes to UDP port 9

PORT = np.dtype([  # the first six as `struct port` in c/nic.h has them: addresses, and whether descriptors are legacy
    ("rx_ring", "u8"), ("rx_tail", "u8"), ("tx_ring", "u8"), ("tx_tail", "u8"), ("head", "u8"), ("legacy", "u8"),
    ("rx_head", "u8"), ("rx_end", "u8"), ("tx_head", "u8"),  # rx_end: the receive tail when it was last looked at
    ("received", "u8"), ("sent", "u8"), ("discards", "u8"),  # from the driver's point of view; of those for port 9
    ("wrong", "u8"), ("last", "u8"),  # packets sent that are not what was received; the last sequence number seen
])
NIC = np.dtype([("port", PORT, (2,)), ("frame", "u8", (8,)),
                ("expected", "u8", (8,)), ("drops", "u8"),  # what must be sent, and whether discard packets must not
                ("state", "u8"), ("check", "u8")])
PLAN = np.dtype([("batch", "u8"), ("passes", "u8"), ("packets", "u8"), ("lead", "u8")])
SAMPLE = np.dtype([("cycles", "u8"), ("packets", "u8")])


class Eviction(NamedTuple):
    """How to send lines to L3: walk `walk`, which is larger than L2; then warm the driver's `private` memory again."""

    walk: np.ndarray
    private: np.ndarray  # rows of (first address, bytes, stride)


class Native(NamedTuple):
    """A driver in C: `function(state, batch, passes)`, by their addresses."""

    function: np.uint64
    state: np.uint64


class Nothing(NamedTuple):
    """A driver that does nothing: what the clock itself costs."""

    unused: np.uint64


@intrinsic
def call(typingctx, function, state, batch, passes):
    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 4), codegen


@intrinsic
def lfence(typingctx):
    """Nothing later starts before everything earlier is done."""

    def codegen(context, builder, sig, args):
        _call(builder, ir.VoidType(), "llvm.x86.sse2.lfence")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def clflush(typingctx, address):
    def codegen(context, builder, sig, args):
        _call(builder, ir.VoidType(), "llvm.x86.sse2.clflush", builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


@verb
def phase(driver, batch, passes):
    """What is timed: `passes` times up to `batch` packets each way."""


@phase.implement(Native)
@kernel
def _native(driver, batch, passes):
    call(driver.function, driver.state, batch, passes)


@phase.implement(Nothing)
@kernel
def _nothing(driver, batch, passes):
    pass


@kernel
def clock():
    lfence()
    now = cycles()
    lfence()
    return now


@kernel
def fill(nic, k, n):
    """Receive `n` packets on port `k`, or as many as there are descriptors for."""
    port, frame = nic.port[k], nic.frame
    head, first, filled = port.rx_head, port.rx_head, ZERO
    while filled < n:
        if head == port.rx_end:
            port.rx_end = U(load_acquire32(port.rx_tail)) & MASK
            if head == port.rx_end:
                break
        desc = port.rx_ring + head * DESCRIPTOR
        address, sequence = load64(desc), port.received
        flow = sequence % U(FLOWS)
        for word in range(6):
            store64(address + U(8 * word), frame[word])
        store32(address + U(34), frame_ports(flow))
        port.discards += ONE if flow % DISCARD_EVERY == ZERO else ZERO
        store32(address + U(48), frame[6] & MASK32)
        store64(address + U(52), sequence)
        if nic.state == U(2):
            clflush(address)
        if port.legacy != ZERO:
            store_release64(desc + U(8), RX_DONE_LEGACY)
        else:
            store64(desc, ZERO)  # the write-back lies over the address
            store_release64(desc + U(8), RX_DONE)
        port.received += ONE
        head = (head + ONE) & MASK
        filled += ONE
    port.rx_head = head
    if nic.state == U(2):
        for i in range(filled):
            clflush(port.rx_ring + ((first + i) & MASK) * DESCRIPTOR)
    return filled


@kernel
def frame_ports(flow):
    """Source and destination port of a flow as they lie in memory."""
    source = U(0x400) + flow
    target = U(9) if flow % DISCARD_EVERY == ZERO else U(53)
    return (source >> U(8)) | (source & U(0xFF)) << U(8) | target << U(24)


@kernel
def complete(nic, k):
    """Send what the driver of port `k` has handed over."""
    port = nic.port[k]
    head, tail = port.tx_head, U(load_acquire32(port.tx_tail)) & MASK
    while head != tail:
        desc = port.tx_ring + head * DESCRIPTOR
        command = load64(desc + U(8))
        if command & U(0xFFFF) != ZERO:
            port.sent += ONE
            if nic.check != ZERO and not intact(nic, port, load64(desc), command):
                port.wrong += ONE
        head = (head + ONE) & MASK
        if command & RS != ZERO:
            report = port.head
            if report != ZERO:
                store_release32(report, head)
            else:
                report = desc
                store_release64(desc + U(8), command | SENT)
            if nic.state == U(2):
                clflush(report)
    port.tx_head = head


@kernel
def intact(nic, port, address, command):
    """Whether a sent packet is a received one, changed as expected, and later than the last one."""
    sequence = load64(address + U(52))
    good = command & U(0xFFFF) == U(FRAME) and (sequence > port.last or port.sent == ONE)
    flow, expected = sequence % U(FLOWS), nic.expected
    port.last = sequence
    for word in (0, 1, 2, 3, 5):
        good &= load64(address + U(8 * word)) == expected[word]
    good &= load32(address + U(34)) == frame_ports(flow)
    good &= load32(address + U(48)) == expected[6] & MASK32
    return good and not (nic.drops != ZERO and flow % DISCARD_EVERY == ZERO)


@kernel
def evict(eviction):
    """Private caches to L3, then the driver's own memory back: what is left there is what the NIC writes and reads."""
    total = ZERO
    for i in range(0, len(eviction.walk), 64):
        total += U(eviction.walk[i])
    private = eviction.private
    for k in range(len(private)):
        at, end = private[k, 0], private[k, 0] + private[k, 1]
        while at < end:
            total += load8(at)
            at += private[k, 2]
    return total


@kernel
def measure(nic, driver, plan, eviction, samples):
    """A sample a round: cycles of the driver's phase, packets that it had to forward."""
    total = ZERO
    for k in range(len(samples)):
        filled = fill(nic, 0, plan.packets + plan.lead) + fill(nic, 1, plan.packets + plan.lead)
        if nic.state == ONE:
            total += evict(eviction)
        if plan.lead != ZERO:
            phase(driver, plan.lead, ONE)  # code and queue state come back in before the clock runs
            filled -= plan.lead + plan.lead
        fence()
        start = clock()
        phase(driver, plan.batch, plan.passes)
        samples[k].cycles = clock() - start
        samples[k].packets = filled
        complete(nic, 0)
        complete(nic, 1)
    return total


# ---- from Python

FRAME_BYTES = bytes.fromhex(
    "020000000001" "020000000002" "0800"  # destination, source, IPv4
    "4500002e" "00004000" "40110000" "0a000001" "0a000002"  # 46 bytes, UDP, from 10.0.0.1 to 10.0.0.2
    "00000000" "001a0000").ljust(64, b"\0")
EFFECTS = {  # a handler's name: what it sends
    "touch": FRAME_BYTES[:1] + bytes([FRAME_BYTES[1] + 1]) + FRAME_BYTES[2:],
    "mac_swap": FRAME_BYTES[6:12] + FRAME_BYTES[:6] + FRAME_BYTES[12:],
    "udp_filter": FRAME_BYTES,
}


def new_nic(ports, handler="touch"):
    """A model in front of a driver; `ports`: two PORT records with the addresses filled in."""
    nic = new_record(NIC)
    nic.port = ports
    nic.frame = np.frombuffer(FRAME_BYTES, np.uint64)
    nic.expected = np.frombuffer(EFFECTS[handler], np.uint64)
    nic.drops = handler == "udp_filter"
    return nic


def idle_nic():
    """A model on whose rings nothing ever moves."""
    ports = np.zeros(2, PORT)
    ports["rx_tail"] = ports["tx_tail"] = _NOWHERE.ctypes.data
    return new_nic(ports)


_NOWHERE = np.zeros(1, np.uint64)


def new_plan(batch, packets, lead=0):
    plan = new_record(PLAN)
    plan.batch, plan.packets, plan.passes, plan.lead = batch, packets, -(-packets // batch), lead
    return plan


def cache_bytes(level):
    """The size of the cache of this level, 0 where the system does not say."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        found, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if found == str(level) and kind != "Instruction":
            return int(size.rstrip("K")) << 10
    return 0


def new_eviction(private):
    size = 2 * (cache_bytes(2) or 1 << 20)
    return Eviction(DmaMemory(size).array, np.array(private or np.zeros((0, 3)), np.uint64).reshape(-1, 3))


def address(record, field=None):
    """Where a record lies, or one field of it."""
    offset = record.dtype.fields[field][1] if field else 0
    return record.__array_interface__["data"][0] + offset
