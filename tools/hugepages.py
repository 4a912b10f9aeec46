"""Set huge pages aside for DMA memory: `python -m tools.hugepages status`, `set 512`, `undo`.

The kernel's settings, per NUMA node, until the next boot; what was set before is remembered for `undo`.
"""

import argparse
from pathlib import Path

from . import Misused, Refused, main
from .memory import remember, remembered

SIZES = {"2M": 2048, "1G": 1048576}  # in kB, as the kernel names them
MEMORY = "run/ixy_numba-hugepages.json"  # gone with the next boot, like the settings


class Place:
    """Huge pages of one size on one NUMA node (`node` None: a kernel without NUMA)."""

    def __init__(self, path, node):
        self.path, self.node = path, node
        self.size = next((name for name, kb in SIZES.items() if path.name == f"hugepages-{kb}kB"), path.name)

    def __str__(self):
        return f"{self.size}" + (f" on node {self.node}" if self.node is not None else "")

    def read(self, name):
        return int((self.path / name).read_text())

    def set(self, pages):
        """How many the kernel then has: it may find fewer, where memory is in pieces."""
        try:
            (self.path / "nr_hugepages").write_text(f"{pages}\n")
        except PermissionError:
            raise Refused("huge pages are set by root only; use sudo, or look first with --dry-run") from None
        except OSError as error:
            raise Refused(f"{self.path}: {error.strerror}") from None
        return self.read("nr_hugepages")


def places(root="/"):
    """All places for huge pages on this machine, by node and size."""
    root = Path(root)
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    homes = [(path / "hugepages", int(path.name[4:])) for path in nodes if (path / "hugepages").is_dir()]
    found = [Place(path, node) for home, node in homes or [(root / "sys/kernel/mm/hugepages", None)]
             for path in sorted(home.glob("hugepages-*kB"), key=lambda path: int(path.name[10:-2]))]
    if not found:
        raise Refused("this kernel has no huge pages (CONFIG_HUGETLBFS)")
    return found


def change(wanted, root, dry_run):
    """Set [(place, pages)], remembering what was there; returns the exit code: 1 if the kernel found too few pages."""
    short = False
    for place, pages in wanted:
        now = place.read("nr_hugepages")
        print(f"{place}: {now} -> {pages} pages{' (not done: --dry-run)' * dry_run}")
        if dry_run or now == pages:
            continue
        remember(Path(root) / MEMORY, str(place.path), now)
        got = place.set(pages)
        if got != pages:
            short = True
            print(f"{place}: the kernel has {got} now: its memory is in pieces or in use; set them aside at boot with "
                  f"hugepagesz={place.size} hugepages={pages} on its command line")
    return int(short)


def undo(root, dry_run):
    memory = Path(root) / MEMORY
    before = remembered(memory)  # {path: pages}
    if not before:
        print("nothing to undo: this tool has set nothing since the machine was started")
        return 0
    code = change([(place, before[str(place.path)]) for place in places(root) if str(place.path) in before], root,
                  dry_run)
    if not dry_run and not code:
        memory.unlink()
    return code


def status(root):
    for place in places(root):
        print(f"{place}: {place.read('nr_hugepages')} pages, {place.read('free_hugepages')} free")
    return 0


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tools.hugepages", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="status|set|undo")
    verbs.add_parser("status", allow_abbrev=False, help="how many there are, and how many are free (changes nothing)")
    setting = verbs.add_parser("set", allow_abbrev=False, help="have exactly N pages on each NUMA node, or on one")
    setting.add_argument("pages", type=int, metavar="N", help="fwd with default rings takes about 20 pages of 2 MiB")
    setting.add_argument("--size", choices=SIZES, default="2M", help="default 2M")
    setting.add_argument("--node", type=int, metavar="K", help="on this NUMA node only")
    undoing = verbs.add_parser("undo", allow_abbrev=False, help="back to what was there before the first `set`")
    for verb in (setting, undoing):
        verb.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")
    return parser


def command(argv=None, root="/"):
    args = arguments().parse_args(argv)
    if args.verb == "status":
        return status(root)
    if args.verb == "undo":
        return undo(root, args.dry_run)
    if args.pages < 0:
        raise Misused(f"{args.pages} pages: expected 0 or more")
    chosen = [place for place in places(root) if place.size == args.size and args.node in (None, place.node)]
    if not chosen:
        where = "" if args.node is None else f" on node {args.node}"
        raise Misused(f"no huge pages of {args.size}{where}; there are: {', '.join(map(str, places(root)))}")
    return change([(place, args.pages) for place in chosen], root, args.dry_run)


if __name__ == "__main__":
    main(command)
