"""The committed inputs of a target: what they cover, and how they are kept few.

An input that the fuzzer found is a file named by its SHA-1; any other name was given by hand, to a seed or to the input
behind a fault that was mended, and stays.
"""

import hashlib
import re
import sys

from .targets import CORPUS, TARGETS

FOUND = re.compile(r"[0-9a-f]{40}")


def trace(target, data):
    """The steps (code, line before, line) that an input takes through the target's sources."""
    steps = set()

    def enter(frame, event, argument):
        if frame.f_globals["__name__"] not in target.sources:
            return None
        code, last = frame.f_code, 0

        def step(frame, event, argument):
            nonlocal last
            if event == "line":
                steps.add((code, last, frame.f_lineno))
                last = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        target.run(data)
    finally:
        sys.settrace(None)
    return steps


def keep(name, found):
    """Write the fewest of `found` and the corpus that take every step they all take, shortest first."""
    target, folder = TARGETS[name], CORPUS / name
    committed = target.corpus(name)
    taken, chosen = set(), []
    by_hand = {data for file, data in committed.items() if not FOUND.fullmatch(file)}
    for data in sorted({*committed.values(), *found}, key=lambda data: (data not in by_hand, len(data), data)):
        steps = trace(target, data)
        if data not in by_hand and steps - taken:
            chosen.append(data)
        taken |= steps
    for file in committed:
        if FOUND.fullmatch(file):
            (folder / file).unlink()
    for data in chosen:
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


def report(name):
    """One line on the corpus: its size, and the lines that it runs of the functions that it enters."""
    target = TARGETS[name]
    inputs = list(target.corpus(name).values())
    steps = set().union(*(trace(target, data) for data in inputs))
    run = {(code, line) for code, _, line in steps}
    codes = {code for code, _ in run}
    there = {(code, line) for code in codes for _, _, line in code.co_lines() if line and line > code.co_firstlineno}
    missed = sorted(f"{code.co_filename.rpartition('/')[2]}:{line}" for code, line in there - run)
    return (f"{name}: {len(inputs)} inputs, {sum(map(len, inputs))} bytes, take {len(steps)} steps through "
            f"{len(there) - len(missed)} of {len(there)} lines of {len(codes)} functions"
            + (f"; not {', '.join(missed)}" if missed else ""))
