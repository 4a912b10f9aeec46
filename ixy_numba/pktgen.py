"""Generate UDP packets with sequence numbers: `python -m ixy_numba.pktgen DEV`."""

import contextlib
import sys
from typing import NamedTuple

import numpy as np

from . import cli
from .core.checksum import SMALLEST, number, udp_frame
from .core.clock import Clock, now_ns
from .core.errors import IxyError
from .core.jit import kernel
from .core.memory import new_record
from .core.mmio import load_acquire, pause
from .core.packet import packet, resize
from .core.pool import ZERO, U, alloc_batch, free_batch
from .datapath import tx_batch
from .device import open_device

BILLION = U(1_000_000_000)
FIRST_PORT = U(1024)
SENT_S = 2.0  # for the last packets to get on the wire
JOB = np.dtype([
    ("stop", "u8"), ("batch_size", "u8"), ("budget", "u8"),  # packets to send, all told
    ("rate", "u8"),  # packets a second; 0: as fast as it goes
    ("size", "u8"), ("flows", "u8"), ("covered", "u8"),  # what the frames look like, see core.checksum
    ("sent", "u8"),
])


class Job(NamedTuple):
    job: np.record
    clock: np.record
    batch: np.record


@kernel
def generate(txq, work):
    """Send numbered packets on `txq` until job.stop is set or job.budget are sent. Buffers hold the frame already."""
    job, batch, pool = work.job, work.batch, txq.pool
    credit, then = ZERO, now_ns(work.clock)  # packets due, in billionths
    while load_acquire(job, "stop") == ZERO and job.sent < job.budget:
        limit = min(job.batch_size, job.budget - job.sent)
        if job.rate != ZERO:
            now = now_ns(work.clock)
            passed = min(now - then, BILLION) if now > then else ZERO  # the clock may have been set
            credit = min(credit + passed * job.rate, job.batch_size * BILLION)  # no burst after a pause
            then = now
            limit = min(limit, credit // BILLION)
        n = alloc_batch(pool, batch, limit)
        for k in range(n):
            sequence = job.sent + k
            batch.packet[k] = resize(batch.packet[k], job.size)
            port = FIRST_PORT + sequence % job.flows
            number(packet(pool, batch.packet[k]), job.covered, port, sequence)
        first = ZERO
        while first < n and load_acquire(job, "stop") == ZERO:
            first = tx_batch(txq, batch, first, n)
            if first < n:
                pause()
        free_batch(pool, batch, first, n)
        job.sent += first
        credit -= min(credit, first * BILLION)
        if n == ZERO:
            tx_batch(txq, batch, ZERO, ZERO)  # takes sent buffers back
            pause()


def arguments():
    parser = cli.parser("pktgen", "Send UDP packets with correct checksums and a 64-bit sequence number in the last 8 "
                        "bytes.", "python -m ixy_numba.pktgen sim --packets 1000000")
    parser.add_argument("device", metavar="DEV", help="device spec")
    parser.add_argument("--packets", type=cli.between(0, None), metavar="N", help="stop after N packets")
    parser.add_argument("--rate", type=cli.between(1, 10**9), metavar="PPS",
                        help="packets a second (default: no limit)")
    parser.add_argument("--size", type=cli.between(SMALLEST, 1514), default=60, metavar="BYTES",
                        help=f"frame size without CRC, {SMALLEST} to 1514 (default 60)")
    parser.add_argument("--flows", type=cli.between(1, 60000), default=1, help="UDP source ports in turn (default 1)")
    parser.add_argument("--batch-size", type=cli.between(1, 256), default=64, help="packets a pass (default 64)")
    parser.add_argument("--duration", type=cli.between(0, None, float), metavar="S", help="stop after S seconds")
    return parser


def run(argv, stop):
    args = arguments().parse_args(argv)
    with contextlib.ExitStack() as stack:
        device = open_device(args.device, unbind=args.unbind)
        stack.callback(device.close)
        frame, covered = udp_frame(args.size, device.mac, bytes.fromhex("020000000002"))
        device.pool.memory.buffer["octets"][:, : args.size] = frame  # once: what a buffer holds outlives its packet
        job = new_record(JOB)
        job.batch_size, job.rate, job.size, job.flows, job.covered = (
            args.batch_size, args.rate or 0, args.size, args.flows, covered)
        job.budget = (1 << 64) - 1 if args.packets is None else args.packets
        clock = Clock()

        def tick():
            device.check()
            clock.update()

        report = cli.Report("pktgen", [device], args.json, stop, args.duration)
        work = Job(job, clock.record, device.pools[0].batch())
        with cli.Worker(tick, generate, device.tx[0], work) as worker:
            report.watch(worker, lambda: worker.ended is not None, worker.tick)
        sent = int(job.sent)
        if not device.wait_until_sent(SENT_S):
            raise IxyError(f"{device.name}: {sent} packets queued, not all of them were sent within {SENT_S} s; is the "
                           "link up?")
        mpps = cli.rate(sent, report.seconds)
        report.finish(f"sent {sent} packets of {args.size} bytes in {report.seconds:.3f} s: {mpps:.3f} Mpps",
                      batch_size=args.batch_size, sent_packets=sent, size=args.size, flows=args.flows, mpps=mpps)
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(cli.main(run))
