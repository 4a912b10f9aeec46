"""Show a network card's registers by name: `python -m tools.registers 0000:03:00.0`.

It only looks: nothing is reset, taken from its driver or written, and registers that change when they are read are
left out. So it may be used beside an application that is running. `sim` shows a simulated card that has been set up.
"""

import argparse
import contextlib
import importlib
import mmap
import os

from ixy_numba.core.registers import Registers
from ixy_numba.device import PCI_ADDRESS, open_device
from ixy_numba.drivers import find

from . import Misused, Refused, main


def table_of(card, names):
    """The driver's module with the register TABLE for `card`, which has `vendor`, `device` and `name`.

    Misused if one of `names` is of no register in it.
    """
    driver, known = find(card), None
    with contextlib.suppress(ModuleNotFoundError):
        known = importlib.import_module(f"{driver.__module__}.regs")
    if not hasattr(known, "TABLE"):
        raise Refused(f"{card.name}: the {driver.driver} driver has no table of registers")
    there = {one.name for register in known.TABLE.values() for one in (register, *register.each())}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise Misused(f"{card.name}: no such register: {', '.join(unknown)}; without names all are shown")
    return known


def look(address, names, root="/"):
    """Lines of a PCI card's registers, as they are at this moment; for `names` see `table_of`."""
    from ixy_numba.bus.pci import Function

    card = Function(address, root)
    card.name = card.address
    known = table_of(card, names)
    path = card.path / "resource0"
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            window = mmap.mmap(descriptor, known.BAR_SIZE, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
    except PermissionError:
        raise Refused(f"{card}: registers are seen by root only, and where a driver holds the card only if the kernel "
                      "runs with iomem=relaxed") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{card}: {path} cannot be mapped: {error}") from None
    words = memoryview(window).cast("I")  # one access a register, of its own width
    return Registers(card.name, lambda offset: words[offset // 4], None, never_ones=known.STATUS).dump(known.TABLE)


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tools.registers", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", metavar="DEV", help="PCI address, or sim[:KEY=VALUE,…]")
    parser.add_argument("names", nargs="*", metavar="NAME", help="show only these: RXDCTL for all of them, RXDCTL[3]")
    return parser


def command(argv=None, root="/"):
    args = arguments().parse_args(argv)
    if PCI_ADDRESS.fullmatch(args.device):
        lines = look(args.device, args.names, root)
    elif args.device.partition(":")[0] == "sim":
        with open_device(args.device) as device:
            lines = device.regs.dump(table_of(device.bus, args.names).TABLE)
    else:
        raise Misused(f"{args.device!r}: expected a PCI address such as 0000:03:00.0, or sim[:KEY=VALUE,…]")
    wanted = set(args.names)
    shown = [line for line in lines if not wanted or wanted & {line.split()[0], line.split()[0].partition("[")[0]}]
    if not shown:
        raise Refused(f"{args.device}: none of {', '.join(args.names)} can be shown: it reads 0, or reading would "
                      "change it")
    print("\n".join(shown))
    return 0


if __name__ == "__main__":
    main(command)
