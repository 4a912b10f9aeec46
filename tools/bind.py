"""Which driver has which network card, and change that: `python -m tools.bind status`, `vfio 0000:03:00.0`, `undo`.

Every change is printed as the shell would do it. A card that is in use (an interface that is up, a process that drives
it) is left alone. What was there before is remembered for `undo`, until the next boot, which undoes everything too.
"""

import argparse
import errno
import fcntl
import os
import subprocess
from pathlib import Path

from ixy_numba.bus.pci import ETHERNET, Function, network_functions
from ixy_numba.core.errors import UsageError

from . import Misused, Refused, main, uid
from .memory import remember, remembered

VFIO = "vfio-pci"
MEMORY = "run/ixy_numba-bind.json"
HARMLESS = (None, VFIO, "pcieport", "pci-stub")  # drivers of others in an IOMMU group that VFIO does not mind


class Steps:
    """What is to be done to the machine below `root`: printed, and carried out unless `dry_run`."""

    def __init__(self, root, dry_run):
        self.root, self.dry_run = Path(root), dry_run

    def write(self, path, text):
        print(f"echo {text} > {path}")
        if not self.dry_run:
            self._try(lambda: path.write_text(f"{text}\n"), path)

    def give(self, path, uid):
        print(f"chown {uid} {path}")
        if not self.dry_run:
            self._try(lambda: os.chown(path, uid, -1), path)

    def load(self, module):
        if not (self.root / "sys/bus/pci/drivers" / module).exists():
            print(f"modprobe {module}")
            if not self.dry_run and subprocess.run(["modprobe", module], stdin=subprocess.DEVNULL).returncode:
                raise Refused(f"the kernel module {module} cannot be loaded")

    @staticmethod
    def _try(action, path):
        try:
            action()
        except PermissionError:
            raise Refused("drivers are changed by root only; use sudo, or look first with --dry-run") from None
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from None


def others(function):
    """The other functions of its IOMMU group."""
    if function.iommu_group is None:
        return []
    members = (function.path / "iommu_group/devices").glob("*")
    return [Function(path.name, function.root) for path in sorted(members) if path.name != function.address]


def group_file(function):
    """What a process opens to have its IOMMU group, or None. `noiommu-N`: vfio-pci has it, but there is no IOMMU."""
    folder, group = function.root / "dev/vfio", function.iommu_group
    files = [folder / f"noiommu-{group}", folder / group] if group is not None else []
    return next((file for file in files if file.exists()), None)


def busy(function):
    """Why nobody may take the card from who has it now, or None."""
    try:
        with open(function.path / "config", "rb") as config:
            fcntl.flock(config, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an application holds it, see ixy_numba.bus.sysfs
        if function.driver == VFIO and (group := group_file(function)):  # unbinding would wait for the application
            os.close(os.open(group, os.O_RDWR))
    except BlockingIOError:
        return "a process drives it"
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "a process has its IOMMU group open"
    return function.use


def outlook(function):
    """In words: what happens if an application opens this card."""
    why = busy(function)
    if why:
        return f"in use: {why}"
    if function.driver == VFIO:
        group = group_file(function)
        if group is None or group.name != function.iommu_group:
            return "bound to vfio-pci, but there is no IOMMU: unbind it, then it is used by root through sysfs"
        blocking = [f"{other.address} ({other.driver})" for other in others(function) if other.driver not in HARMLESS]
        if blocking:
            return f"its IOMMU group is not viable: also bind or unbind {', '.join(blocking)}"
        owner = group.stat().st_uid
        return f"used through VFIO, by {'root' if owner == 0 else f'uid {owner}'}"
    if function.translated:
        return "behind an IOMMU: bind it to vfio-pci first"
    return "used by root through sysfs" + (", with --unbind" if function.driver else "")


def status(functions):
    for function in functions:
        print(f"{function}: IOMMU group {function.iommu_group or 'none'}, "
              f"NUMA node {'none' if function.numa_node is None else function.numa_node}, "
              f"interfaces {', '.join(function.interfaces) or 'none'}; {outlook(function)}")
    if not functions:
        print("no network cards on the PCI bus")


def check(function, force):
    why = busy(function)
    if why and not force:
        raise Refused(f"{function.address}: in use: {why}; end that first, or --force")


def to_vfio(steps, function, uid=None):
    if function.iommu_group is None:
        raise Refused(f"{function.address}: it is behind no IOMMU, without which vfio-pci takes no card; turn it on "
                      "(firmware, and intel_iommu=on on the kernel's command line), or use the card as root")
    steps.load(VFIO)
    rebind(steps, function, VFIO)
    if uid is not None:
        steps.give(function.root / "dev/vfio" / function.iommu_group, uid)
    for other in others(function):
        if other.driver not in HARMLESS:
            print(f"note: {other} is in the same IOMMU group, {function.iommu_group}, which VFIO refuses until that is "
                  "bound to vfio-pci too, or unbound")


def to_nobody(steps, function):
    if function.driver:
        steps.write(function.path / "driver/unbind", function.address)


def to_kernel(steps, function):
    if function.driver and (function.path / "driver_override").read_text().strip() in ("", "(null)"):
        print(f"{function}: nothing to do")
        return
    rebind(steps, function, "")
    if not steps.dry_run and not function.driver:
        raise Refused(f"{function.address}: no driver of the kernel has taken it; load its module and say this again")


def rebind(steps, function, driver):
    """Away from its driver and to `driver`; "" is whichever of the kernel's wants it."""
    if function.driver == driver:
        print(f"{function}: nothing to do")
        return
    steps.write(function.path / "driver_override", driver)
    to_nobody(steps, function)
    steps.write(function.root / "sys/bus/pci/drivers_probe", function.address)
    if driver and not steps.dry_run and function.driver != driver:
        raise Refused(f"{function.address}: {driver} has not taken it; dmesg may say why")


def undo(steps, force):
    memory, functions = steps.root / MEMORY, []
    before = remembered(memory)  # {address: driver}
    if not before:
        print("nothing to undo: this tool has changed nothing since the machine was started")
    for address in before:
        try:
            functions.append(Function(address, steps.root))
        except UsageError:
            print(f"note: {address} is no longer there; nothing is undone for it")
    for function in functions:
        if function.driver != before[function.address]:
            check(function, force)
    for function in functions:
        driver = before[function.address]
        if driver == VFIO:
            to_vfio(steps, function)
        elif driver is None:
            steps.write(function.path / "driver_override", "")
            to_nobody(steps, function)
        elif function.driver != driver:
            to_kernel(steps, function)
    if not steps.dry_run:
        memory.unlink(missing_ok=True)


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tools.bind", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="status|vfio|unbind|restore|undo")
    looking = verbs.add_parser("status", allow_abbrev=False, help="every card and what would happen (changes nothing)")
    looking.add_argument("addresses", nargs="*", metavar="ADDRESS", help="these cards only")
    changes = {"vfio": "bind cards to vfio-pci: for use through the IOMMU, without root",
               "unbind": "take cards from their drivers: for use as root, without an IOMMU",
               "restore": "give cards to the kernel's own drivers; their interfaces come back",
               "undo": "everything as it was before this tool changed it"}
    for name, text in changes.items():
        verb = verbs.add_parser(name, allow_abbrev=False, help=text, description=text[0].upper() + text[1:] + ".")
        if name != "undo":
            verb.add_argument("addresses", nargs="+", metavar="ADDRESS", help="PCI address such as 0000:03:00.0")
        if name == "vfio":
            verb.add_argument("--user", type=uid, metavar="UID", help="let this user open the cards' IOMMU groups")
        verb.add_argument("--dry-run", action="store_true", help="print what would be done, do nothing")
        verb.add_argument("--force", action="store_true", help="even if a card is in use")
    return parser


def command(argv=None, root="/"):
    args = arguments().parse_args(argv)
    if args.verb == "status":
        return status([Function(address, root) for address in args.addresses] or network_functions(root))
    steps = Steps(root, args.dry_run)
    if args.verb == "undo":
        return undo(steps, args.force)
    functions = [Function(address, root) for address in args.addresses]
    for function in functions:  # all of them before the first is touched
        if function.pci_class != ETHERNET:
            raise Misused(f"{function}: this is no network card")
        check(function, args.force)
    for function in functions:
        if not args.dry_run:
            remember(steps.root / MEMORY, function.address, function.driver)
        if args.verb == "vfio":
            to_vfio(steps, function, args.user)
        else:
            {"unbind": to_nobody, "restore": to_kernel}[args.verb](steps, function)
    return 0


if __name__ == "__main__":
    main(command)
