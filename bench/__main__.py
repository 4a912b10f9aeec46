"""`python -m bench TABLE`: measure one table or all, print it, keep it as JSON, draw it."""

import argparse
import datetime
import importlib
import json
import os
import sys
from pathlib import Path

from ixy_numba.core.errors import IxyError, UsageError

TABLES = {
    "throughput": "cycles a packet for batch sizes 1 to 256, in three states of memory",
    "events": "instructions, loads, stores and branches a packet",
    "latency": "microseconds from receive to transmit, model and driver on two processors",
    "endtoend": "Mpps of the forwarder with simulated NICs on another processor",
    "startup": "seconds to the first packet",
    "size": "lines of code and compressed size",
    "handlers": "a user's handlers in Python, beside the same in C",
    "safety": "marks for what is protected, given by the tests; what each protection costs",
    "vhost": "our virtio front-end beside DPDK's, each behind dpdk-testpmd's vhost-user ports",
    "soak": "a billion packets in one run, every buffer counted at the end",
}


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m bench", allow_abbrev=False,
        description="Measure this machine: our driver beside rivals in C, in the same runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="TABLE")
    for name, text in {**TABLES, "all": "all of these"}.items():
        table = commands.add_parser(name, help=text, description=f"Measure {text}.", allow_abbrev=False)
        table.add_argument("--json", metavar="FILE", help="write machine, commit and rows as JSON")
        table.add_argument("--plot", metavar="FILE.png", help="draw it (throughput, latency; needs matplotlib)")
        table.add_argument("--quick", action="store_true", help="fewer runs: for a first look, and for CI")
    text = "compare the instructions a packet costs with bench/budget.json"
    budget = commands.add_parser("budget", help=text, allow_abbrev=False,
                                 description=f"{text.capitalize()}; exit code 1 where they are more than 3 % over.")
    budget.add_argument("--update", action="store_true", help="make what is counted now the budget")
    text = "write the figures of bench/results/ between the markers of README.md"
    commands.add_parser("readme", help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
    return parser


def run(argv):
    if argv[:1] == ["--worker"]:
        serve(*argv[1:])
        return
    args = arguments().parse_args(argv)
    if args.command == "budget":
        importlib.import_module("bench.budget").run(args.update)
    elif args.command == "readme":
        importlib.import_module("bench.readme").run()
    else:
        measure(args)


def serve(table):
    """A worker process: for each line of options what the table's `worker` returns, or the error that it ended with."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer
    for options in sys.stdin:
        try:
            answer = {"result": importlib.import_module(f"bench.{table}").worker(**json.loads(options))}
        except IxyError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def measure(args):
    from . import common, plots

    common.require_machine()
    names = list(TABLES) if args.command == "all" else [args.command]
    drawn = [name for name in names if name in plots.FIGURES] if args.plot else []
    if args.plot and not drawn:
        raise UsageError(f"{args.command} has no plot; {' and '.join(plots.FIGURES)} have")
    for path in filter(None, (args.json, args.plot)):
        _check_writable(path)  # now, not after the measurement
    if drawn:
        plots.require()
    noise, info, found, parts = common.Noise(), common.machine(), [], {}
    for name in names:
        table = importlib.import_module(f"bench.{name}")
        try:
            made = table.measure(args.quick)
        except common.Unavailable as error:
            if args.command != "all":
                raise
            common.tell(f"== {error}; the table is left out\n")
            continue
        common.tell("\n".join([f"== {name}: {TABLES[name]}", "", *table.show(made), ""]))
        if isinstance(made, dict):
            parts |= made
        else:
            found += made
    info["noise"] = noise.summary()
    common.tell("\n".join(common.headline(info)))
    if args.json:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result = {"machine": info, "commit": common.commit(), "date": now, "quick": args.quick, "rows": found, **parts}
        Path(args.json).write_text(common.as_json(result))
    for name in drawn:
        path = Path(args.plot)
        plots.draw(name, found, info, path if len(drawn) == 1 else path.with_stem(f"{path.stem}-{name}"))


def _check_writable(path):
    try:
        open(path, "a").close()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name a file that can be written") from None
    if not os.path.getsize(path):
        os.remove(path)


def main(argv=None):
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except IxyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
