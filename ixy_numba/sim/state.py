"""The state of one simulated 82599 as a single record, shared by its registers (Python) and its engine (kernels)."""

import numpy as np

from ..core.capture import OUT
from ..core.jit import kernel
from ..core.mmio import fence, load_acquire, pause, store_release
from ..core.raw import copy

U = np.uint64
ZERO, ONE = U(0), U(1)
MAX_DEVICES = 64  # in one process
QUEUES = 128  # of each direction
COUNTER_SETS = 16  # per-queue statistics
MAX_MAPPINGS = 1024
VECTORS = 64
TEMPLATE_SIZE = 1536
SCRATCH_SIZE = 16384  # the longest frame of a device
TX_SCRATCH_SIZE = (1 << 18) + 1024  # what transmit descriptors may add up to: TSO's 18-bit payload and its headers
BATCH = 64  # frames a device handles in one visit and direction

# Counters, read through the statistics registers of the same names.
COUNTERS = ("CRCERRS", "RUC", "RFC", "ROC", "RJC", "MPC", "GPRC", "GORC", "BPRC", "MPRC", "TPR", "TOR",
            "GPTC", "GOTC", "TPT", "MPTC", "BPTC", "XEC")
(CRCERRS, RUC, RFC, ROC, RJC, MPC, GPRC, GORC, BPRC, MPRC, TPR, TOR,
 GPTC, GOTC, TPT, MPTC, BPTC, XEC) = (U(k) for k in range(len(COUNTERS)))

# What the wire saw, for summary(). Nothing the driver could read.
WIRE = ("received", "sent", "lost", "corrupted", "filtered", "no_queue", "refused", "malformed",
        "dma_faults", "model_faults")
(RECEIVED, SENT, LOST, CORRUPTED, FILTERED, NO_QUEUE, REFUSED, MALFORMED,
 DMA_FAULTS, MODEL_FAULTS) = (U(k) for k in range(len(WIRE)))

# Where frames come from and where they go, and how far a paced source is
NOTHING, GENERATOR, CAPTURE, INBOX = (U(k) for k in range(4))
SINK, FILE, TAP, LINK, UNPLUGGED = (U(k) for k in range(5))
SILENT, CALLING, RUNNING = (U(k) for k in range(3))

# Which of the cached DMA translations an access uses
RX_RING, RX_DATA, TX_RING, TX_DATA, TX_HEAD = (U(k) for k in range(5))


def _words(*names):
    return [(name, "u8") for name in names]


MAPPING = np.dtype(_words("iova", "end", "address"))
RX_QUEUE = np.dtype(_words(
    "enabled", "ring", "length",  # iova of the ring, descriptors
    "head", "tail",  # the next descriptor to fill, the end as last seen
    "registers",  # address of the queue's block in BAR 0
    "buffer", "drop", "legacy", "counters",  # SRRCTL, RQSMR
    "vlan_strip", "cause",  # RXDCTL.VME; the bit of `happened` that IVAR gives it
    "control",  # RXDCTL or TXDCTL as last taken notice of
))
TX_QUEUE = np.dtype([*_words(
    "enabled", "ring", "length", "head", "registers", "counters", "cause", "control",
    "head_at",  # where the head is written back (iova); 0: done descriptors are instead
    "first", "next", "checked", "errors",  # sequence numbers at the sink
), ("context", "u8", (2, 2))])  # the two context descriptors that a queue remembers
PENDING = np.dtype(_words(  # the frame that waits for descriptors, its fate decided
    "waiting", "address", "length", "bad", "queue", "hash", "type",
    "status", "vlan"))  # checksum and VLAN bits of the write-back, the tag that was stripped
OUTGOING = np.dtype(_words(  # the frame in the transmit scratch, as long as not all of it is on the wire
    "waiting", "queue", "used", "length",  # whose (its `registers`), descriptors, bytes
    "sent", "end",  # bytes on the wire, of the frame or of the payload to be segmented; how many there are
    "command", "last", "lengths", "tucmd"))  # first and last descriptor's command; the context's two words

DEVICE = np.dtype([
    # who touches the state: Python sets `hold` and waits for `busy` to go, the engine works while it is not held
    *_words("hold", "busy", "worker", "attention", "changed"),
    # registers, as the engine needs them
    *_words("bar", "rx_on", "tx_on", "crc_strip", "jumbo", "max_frame", "min_frame", "tx_pad", "tx_crc"),
    *_words("vlan_type", "vlan_filter", "tx_vlan_type", "first_flags", "middle_flags", "last_flags"),
    *_words("watched"),  # somebody maps the queues' registers: changes of RXDCTL and TXDCTL have to be looked for
    # interrupts: queue causes since last asked, those that Python wants to hear of at once, when else it does
    *_words("happened", "armed", "alarm", "now"),
    *_words("causes", "mask", "sent"),  # of the queues: one bit a vector
    ("next", "u8", (VECTORS,)),  # when a vector may fire again
    # vectors that are eventfds of this process, which the engine writes itself; where kernels unmask them
    *_words("direct"), ("event", "i8", (VECTORS,)), ("unmask", "u4", (VECTORS,)), *_words("moderation"),
    *_words("store_bad", "all_unicast", "all_multicast", "broadcast", "multicast_shift", "multicast_on"),
    *_words("rss", "fifo_bytes", "rx_queues", "tx_queues"),
    ("rx_enabled", "u1", (QUEUES,)), ("tx_enabled", "u1", (QUEUES,)),  # queue numbers, the first rx_queues of them
    ("rx", RX_QUEUE, (QUEUES,)), ("tx", TX_QUEUE, (QUEUES,)),
    *_words("addresses"), ("address", "u8", (128,)), ("mta", "u4", (128,)),
    ("vfta", "u4", (128,)),
    ("reta", "u1", (128,)), ("toeplitz", "u4", (36, 256)),
    # DMA
    *_words("mappings"), ("mapping", MAPPING, (MAX_MAPPINGS,)), ("recent", "u8", (5,)),
    # statistics
    ("count", "u8", (len(COUNTERS),)), ("wire", "u8", (len(WIRE),)),
    ("rx_sizes", "u8", (6,)), ("tx_sizes", "u8", (6,)),
    *[(name, "u8", (COUNTER_SETS,)) for name in ("qprc", "qbrc", "qprdc", "qptc", "qbtc")],
    # the source of received frames
    *_words("source", "paced", "limit", "taken", "phase", "start", "seen", "delay"),
    *_words("plain", "plain_type", "plain_status"),
    ("per_cycle", "f8"),
    *_words("frame_size", "flows", "flow", "checksum"), ("template", "u1", (TEMPLATE_SIZE,)),
    *_words("file", "offsets", "lengths", "frames"),
    *_words("inbox", "tap_reads"), ("pending", PENDING),
    # faults: chances of 2**32, state of the random numbers
    *_words("loss", "corrupt", "random"),
    # the sink of transmitted frames
    *_words("sink", "outbox", "tap", "error"), ("out", OUT),
    # frames fetched, not yet on the wire; frames put together from several descriptors
    ("fetched", "u8", (BATCH,)), ("fetched_length", "u8", (BATCH,)),
    ("rx_scratch", "u1", (SCRATCH_SIZE,)), ("tx_scratch", "u1", (TX_SCRATCH_SIZE,)),
    ("segment", "u1", (SCRATCH_SIZE + 64,)),
    *_words("template_at", "rx_scratch_at", "tx_scratch_at", "segment_at"),  # their addresses
    ("outgoing", OUTGOING),
], align=True)


@kernel
def claim(device):
    """Ask the engine to keep off, and wait for the end of a visit; False if it takes longer: ask again."""
    store_release(device, "hold", ONE)
    fence()
    for _ in range(1000):
        if load_acquire(device, "busy") == ZERO:
            return True
        pause()
    return False


@kernel
def release(device):
    store_release(device, "hold", ZERO)


@kernel(inline=True)
def enter(device):
    """The engine's side: True if the device is not held, and will not be before `leave`."""
    store_release(device, "busy", ONE)
    fence()
    if load_acquire(device, "hold") == ZERO:
        return True
    store_release(device, "busy", ZERO)
    return False


@kernel(inline=True)
def leave(device):
    store_release(device, "busy", ZERO)


# DMA: every address of the driver's goes through here.


@kernel
def find_mapping(device, iova):
    """The mapping that `iova` lies in, by bisection; the number of mappings if there is none."""
    low, high = ZERO, device.mappings
    while low < high:
        middle = (low + high) >> ONE
        if device.mapping[middle].end > iova:
            high = middle
        else:
            low = middle + ONE
    if low < device.mappings and device.mapping[low].iova <= iova:
        return low
    return device.mappings


@kernel(inline=True)
def reach(device, use, iova):
    """(address, bytes that can be reached from there) of the device's `iova`; 0 bytes where nothing is mapped."""
    mapping = device.mapping[device.recent[use]]
    if not mapping.iova <= iova < mapping.end:
        found = find_mapping(device, iova)
        if found == device.mappings:
            return ZERO, ZERO
        device.recent[use] = found
        mapping = device.mapping[found]
    return mapping.address + (iova - mapping.iova), mapping.end - iova


@kernel
def read_dma(device, use, iova, target, length):
    """Copy `length` bytes from the device's `iova`, over as many mappings as they span; False where one is missing."""
    done = ZERO
    while done < length:
        source, reachable = reach(device, use, iova + done)
        if reachable == ZERO:
            return False
        piece = min(length - done, reachable)
        copy(target + done, source, piece)
        done += piece
    return True


@kernel
def write_dma(device, use, iova, source, length):
    """Copy `length` bytes to the device's `iova`, over as many mappings as they span; False where one is missing."""
    done = ZERO
    while done < length:
        target, reachable = reach(device, use, iova + done)
        if reachable == ZERO:
            return False
        piece = min(length - done, reachable)
        copy(target, source + done, piece)
        done += piece
    return True
