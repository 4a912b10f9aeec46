"""Tools around the drivers, each run as `python -m tools.NAME` from the checkout: how they end, in one place."""

import argparse
import os
import signal
import sys


class Refused(Exception):
    """What was asked for cannot be done; the message is the one line that the user sees. Exit code 1."""

    exit_code = 1


class Misused(Refused):
    """The arguments cannot be right. Exit code 2."""

    exit_code = 2


def uid(text):
    """An argparse type: a user's number. The highest of 32 bits is none: to chown it means to leave the owner."""
    number = int(text)
    if not 0 <= number < (1 << 32) - 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a uid, from 0 to {(1 << 32) - 2}")
    return number


def main(run):
    """Exit with what `run()` returns; errors become one line on stderr, Ctrl-C and SIGTERM clean up and are none."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code = run() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not hasattr(error, "exit_code"):  # neither ours nor the package's IxyError: a fault, to be seen whole
            raise
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
