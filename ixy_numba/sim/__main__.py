"""Serve simulated 82599s to other processes: `python -m ixy_numba.sim --listen SOCK [--wire …] [--listen …]`."""

import argparse
import contextlib
import os
import sys

from .. import cli
from ..bus import parse_options
from ..core.errors import IxyError, UsageError
from .bus import SimBus
from .engine import ENGINE
from .spec import OPTIONS, parse
from .trace import Trace
from .vfio_user import Server

CABLES_S = 0.1  # how often it is looked at whether they are plugged in


class _ForTheLast(argparse.Action):
    """--device, --wire and --trace belong to the last --listen before them."""

    def __call__(self, parser, arguments, value, option=None):
        if not arguments.devices:
            parser.error(f"{option} {value}: expected --listen SOCK before it: it belongs to that device")
        arguments.devices[-1][self.dest] = value


class _Listen(argparse.Action):
    def __call__(self, parser, arguments, value, option=None):
        arguments.devices = [*arguments.devices, {"listen": value, "device": "10fb", "wire": "", "trace": None}]


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m ixy_numba.sim", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serve simulated 82599s over vfio-user, to QEMU's vfio-user-pci. A device for each --listen.",
        epilog="\n".join(["wire, KEY=VALUE,…:", *(
            f"  {key:<12} {text}" for key, text in OPTIONS.items() if key not in ("device", "link")),
            "  link         connect to the device that listens at this SOCK", "", "example:",
            "  python -m ixy_numba.sim --listen /tmp/nic --wire tap=tap0"]))
    parser.set_defaults(devices=[])
    parser.add_argument("--listen", metavar="SOCK", action=_Listen, required=True, help="a unix socket: one device")
    parser.add_argument("--device", metavar="ID", action=_ForTheLast, help="its PCI device id (10fb)")
    parser.add_argument("--wire", metavar="KEY=VALUE,…", action=_ForTheLast, help="what its cable leads to")
    parser.add_argument("--trace", metavar="FILE", action=_ForTheLast, help="write all register accesses to a file")
    parser.add_argument("--map-rings", action="store_true",
                        help="let clients map the queues' registers instead of trapping every access")
    return parser


def specs(devices):
    """[(a device's arguments, its Spec)]. Two devices are linked once one of them says so."""
    sockets, cables, found = [device["listen"] for device in devices], {}, []
    for device in devices:
        given = f"--wire {device['wire']}"
        options = parse_options(given, device["wire"])
        if "link" in options:
            ends = device["listen"], options.pop("link")
            if ends[1] not in sockets or ends[0] == ends[1]:
                raise UsageError(f"{given}: expected the SOCK of another --listen")
            for end in ends:
                if cables.setdefault(end, "+".join(sorted(ends))) != "+".join(sorted(ends)):
                    raise UsageError(f"{given}: {end} is linked to another device already")
        found.append((device, given, options))
    return [(device, parse(given, {**options, "device": device["device"],
                                   **({"link": cables[device["listen"]]} if device["listen"] in cables else {})}))
            for device, given, options in found]


def run(argv, stop):
    parsed = arguments().parse_args(argv)
    with contextlib.ExitStack() as stack:
        buses = []
        for device, spec in specs(parsed.devices):
            bus = SimBus(device["listen"], spec)
            stack.callback(bus.close)
            if device["trace"]:
                bus.model.trace = _open_trace(device["trace"])
                stack.callback(bus.model.trace.close)
            buses.append(bus)
        ENGINE.compile()  # a client gives up after seconds
        for bus in buses:
            server = Server(bus.name, bus, parsed.map_rings)
            stack.callback(server.close)
            bus.start()
            print(f"listening at {bus.name}", flush=True)
        while not stop.wait(CABLES_S):
            for bus in list(buses):
                try:
                    bus.check()
                    bus.watch_cable()
                except IxyError as error:
                    if len(buses) == 1:
                        raise
                    buses.remove(bus)  # the others have nothing to do with it
                    print(f"{bus.name}: {error}", file=sys.stderr, flush=True)
    return cli.EXIT_OK


def _open_trace(path):
    try:
        return Trace(path)
    except OSError as error:
        raise IxyError(f"--trace {os.fspath(path)}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(cli.main(run))
