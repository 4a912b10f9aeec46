"""Write what a device receives to a capture file: `python -m ixy_numba.pcap DEV FILE [N]`."""

import contextlib
import sys
from typing import NamedTuple

import numpy as np

from . import cli
from .core.capture import CaptureWriter, append
from .core.clock import Clock, now_ns
from .core.jit import kernel
from .core.memory import new_record
from .core.mmio import load_acquire, pause
from .core.packet import packet
from .core.pool import ONE, ZERO, U, free_batch
from .core.raw import address_of
from .core.thread import AT_ONCE
from .datapath import rx_batch
from .device import open_device
from .waiting import WAIT, prepare, rest

JOB = np.dtype([("stop", "u8"), ("budget", "u8"), ("written", "u8"), *WAIT])


class Job(NamedTuple):
    job: np.record
    clock: np.record
    out: np.record
    batch: np.record


@kernel
def record(rxq, work):
    """Write received packets until job.stop is set or job.budget of them are written; waits while the file grows."""
    job, batch, out, pool, idle = work.job, work.batch, work.out, rxq.pool, ZERO
    while load_acquire(job, "stop") == ZERO and job.written < job.budget:
        n = rx_batch(rxq, batch, min(U(64), job.budget - job.written))
        if n == ZERO:
            idle = rest((rxq,), job, idle, job.written)
            continue
        idle = ZERO
        time_ns = now_ns(work.clock)
        k = ZERO
        while k < n and load_acquire(job, "stop") != AT_ONCE:
            frame = packet(pool, batch.packet[k])
            if append(out, address_of(frame), U(len(frame)), time_ns):
                k += ONE
            else:
                pause()
        free_batch(pool, batch, ZERO, n)
        job.written += k


def arguments():
    parser = cli.parser("pcap", "Write what a device receives to a pcap file with nanosecond time stamps.",
                        "python -m ixy_numba.pcap sim:gen=1000000,frames=100000 out.pcap 100000")
    parser.add_argument("device", metavar="DEV", help="device spec")
    parser.add_argument("file", metavar="FILE", help="capture file to write")
    parser.add_argument("packets", nargs="?", type=cli.between(0, None), metavar="N", help="stop after N packets")
    parser.add_argument("--snaplen", type=cli.between(1, 262144), default=65535, metavar="BYTES",
                        help="bytes kept of each packet (default 65535)")
    parser.add_argument("--interrupts", action="store_true", help="sleep while little arrives, until an interrupt")
    parser.add_argument("--duration", type=cli.between(0, None, float), metavar="S", help="stop after S seconds")
    return parser


def run(argv, stop):
    args = arguments().parse_args(argv)
    with contextlib.ExitStack() as stack:
        device = open_device(args.device, interrupts=args.interrupts, unbind=args.unbind)
        stack.callback(device.close)
        writer = stack.enter_context(CaptureWriter(args.file, args.snaplen))
        job = new_record(JOB)
        job.budget = (1 << 64) - 1 if args.packets is None else args.packets
        wake = prepare(job, device.events) if args.interrupts else None
        clock = Clock()

        def tick():
            writer.service()
            device.check()
            clock.update()

        report = cli.Report("pcap", [device], args.json, stop, args.duration)
        work = Job(job, clock.record, writer.out, device.pools[0].batch())
        with cli.Worker(tick, record, device.rx[0], work, wake=wake) as worker:
            report.watch(worker, lambda: worker.ended or (device.bus.finite and device.bus.finished), worker.tick)
        written = writer.frames
        mpps = cli.rate(written, report.seconds)
        report.finish(f"wrote {written} packets, {writer.bytes_written} bytes, to {args.file} in "
                      f"{report.seconds:.3f} s: {mpps:.3f} Mpps", file=args.file, snaplen=args.snaplen,
                      written_packets=written, written_bytes=writer.bytes_written, mpps=mpps)
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(cli.main(run))
