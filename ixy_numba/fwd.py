"""Forward packets between two devices, both ways: `python -m ixy_numba.fwd [DEV1 DEV2]`."""

import sys

from . import cli
from .core.errors import UsageError
from .datapath import handler


@handler
def forward(packet):
    """Out of the other port, unchanged."""
    return 1 - packet.port


@handler
def touch_and_forward(packet):
    """The same with byte 1 incremented, so that every packet comes into the cache, as in the published benchmarks."""
    packet[1] = (packet[1] + 1) & 0xFF
    return 1 - packet.port


def arguments():
    parser = cli.parser("fwd", "Forward packets between two devices, in both directions. Without devices, between two "
                        "simulated ones that receive 64-byte frames at 10 Gbit/s.",
                        "python -m ixy_numba.fwd --no-touch sim:in=real.pcap sim:out=copy.pcap")
    parser.add_argument("devices", nargs="*", metavar="DEV", help="two device specs, or none")
    parser.add_argument("--batch-size", type=cli.between(1, 256), default=32, help="packets a pass (default 32)")
    parser.add_argument("--queues", type=cli.between(1, 64), default=1,
                        help="queues a device, each with a thread of its own (default 1)")
    parser.add_argument("--ring-size", type=cli.between(1, 65536), default=512, help="descriptors a ring (default 512)")
    parser.add_argument("--duration", type=cli.between(0, None, float), metavar="S", help="stop after S seconds")
    parser.add_argument("--packets", type=cli.between(0, None), metavar="N", help="stop after N packets")
    parser.add_argument("--touch", action="store_true", default=True, help="increment byte 1 of each packet (default)")
    parser.add_argument("--no-touch", dest="touch", action="store_false", help="forward packets unchanged")
    parser.add_argument("--in-place", action="store_true",
                        help="send packets from where they were received, without a pool of buffers")
    parser.add_argument("--interrupts", action="store_true",
                        help="sleep while little arrives, until an interrupt (PCI devices: those bound to vfio-pci)")
    return parser


def run(argv, stop):
    args = arguments().parse_args(argv)
    if len(args.devices) not in (0, 2):
        raise UsageError(f"{len(args.devices)} device(s): expected two, or none for two simulated ones")
    chosen = touch_and_forward if args.touch else forward
    return cli.forward("fwd", args.devices or ["sim:gen=line"] * 2, chosen, stop, queues=args.queues,
                       ring_size=args.ring_size, batch_size=args.batch_size, packets=args.packets,
                       duration_s=args.duration, in_place=args.in_place, interrupts=args.interrupts,
                       unbind=args.unbind, as_json=args.json)


if __name__ == "__main__":
    sys.exit(cli.main(run))
