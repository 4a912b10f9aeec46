"""`python -m tests.fuzz TARGET`: coverage-guided fuzzing with atheris, beginning with the committed corpus."""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

SEED = 1  # so that a short run of CI does the same each time
HANG_SECONDS, MEMORY_MB = 10, 1024  # more than these is a finding


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, allow_abbrev=False)
    parser.add_argument("target", help="capture, spec, vhost or vfio")
    parser.add_argument("--minutes", type=float, help="stop after so long (default: 1)", default=1)
    parser.add_argument("--runs", type=int, help="stop after so many inputs, if that is earlier", default=-1)
    parser.add_argument("--seed", type=int, default=SEED, help=f"of its choices ({SEED}); 0: another each time")
    parser.add_argument("--keep", action="store_true",
                        help="add to the corpus the least of what was found that covers as much")
    parser.add_argument("--inside", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["NUMBA_DISABLE_JIT"] = "1"  # before numba is imported: coverage sees only what Python runs
    if args.inside:
        fuzz(args)
    from . import corpus, targets

    if args.target not in targets.TARGETS:
        parser.error(f"no target {args.target!r}: expected {' or '.join(targets.TARGETS)}")
    if not find_spec("atheris"):
        sys.exit("error: fuzzing needs atheris; install it: pip install 'ixy_numba[fuzz]'")
    with tempfile.TemporaryDirectory(prefix="ixy_numba-fuzz-") as scratch:
        directory = Path(scratch, "found")
        directory.mkdir()
        inside = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--inside", str(directory)]
        if subprocess.run(inside).returncode:
            sys.exit(f"error: {args.target}: the input that fails is now in {targets.CORPUS / args.target}")
        if args.keep:
            corpus.keep(args.target, [path.read_bytes() for path in directory.iterdir()])
    print(corpus.report(args.target))


def fuzz(args):
    """Run until time, number of inputs, or the first finding, which is written into the corpus; never returns."""
    import atheris

    with atheris.instrument_imports(include=["ixy_numba"]):
        from . import targets
    target = targets.TARGETS[args.target]
    words = Path(f"{args.inside}.dict")
    words.write_text("".join('"\\x' + word.hex(" ").replace(" ", "\\x") + '"\n' for word in target.words))
    home = targets.CORPUS / args.target
    atheris.Setup([sys.argv[0], f"-max_total_time={max(1, round(60 * args.minutes))}", f"-runs={args.runs}",
                   f"-seed={args.seed}", f"-max_len={target.longest}", f"-dict={words}", f"-timeout={HANG_SECONDS}",
                   f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={home}/", args.inside, str(home)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
