"""`python -m bench TABLE`: measure one table, print it, keep it as JSON, draw it."""

import argparse
import importlib
import json
import os
import sys

from ixy_numba.core.errors import IxyError, UsageError

TABLES = {
    "throughput": "cycles a packet for batch sizes 1 to 256, in three states of memory",
    "events": "instructions, loads, stores and branches a packet",
    "latency": "microseconds from receive to transmit, model and driver on two processors",
    "endtoend": "Mpps of the forwarder with simulated NICs on another processor",
    "startup": "seconds to the first packet",
    "size": "lines of code and compressed size",
    "handlers": "a user's handlers in Python, beside the same in C",
}


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m bench", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure this machine: our driver and rivals in C, side by side.",
        epilog="tables:\n" + "\n".join(f"  {name:<12} {text}" for name, text in TABLES.items()))
    parser.add_argument("table", choices=[*TABLES, "all"], metavar="TABLE", help="a table, or all of them")
    parser.add_argument("--json", metavar="FILE", help="write machine, commit and rows as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the table (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="fewer runs: for a first look, and for CI")
    return parser


def run(argv):
    if argv[:1] == ["--worker"]:
        _, table, options = argv
        print(json.dumps(importlib.import_module(f"bench.{table}").worker(**json.loads(options))))
        return 0
    args = arguments().parse_args(argv)
    from . import common

    names = list(TABLES) if args.table == "all" else [args.table]
    noise, info, found = common.Noise(), common.machine(), []
    for name in names:
        table = importlib.import_module(f"bench.{name}")
        made = table.measure(args.quick)
        print("\n".join([f"== {name}: {TABLES[name]}", "", *table.show(made), ""]), flush=True)
        found += made
    quiet = noise.summary()
    print("\n".join(common.headline(info, quiet)))
    if args.json:
        result = {"machine": {**info, "noise": quiet}, "commit": common.commit(), "rows": found}
        write(args.json, json.dumps(result, indent=1))
    return 0


def write(path, text):
    try:
        with open(path, "w") as file:
            file.write(text + "\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name a file that can be written") from None


def main(argv=None):
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except IxyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
