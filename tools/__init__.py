"""Tools around the drivers, each run as `python -m tools.NAME` from the checkout: how they end, in one place."""

import sys


class Refused(Exception):
    """What was asked for cannot be done; the message is the one line that the user sees. Exit code 1."""

    exit_code = 1


class Misused(Refused):
    """The arguments cannot be right. Exit code 2."""

    exit_code = 2


def main(run):
    """Exit with what `run()` returns; errors become one line on stderr, Ctrl-C is no traceback."""
    try:
        code = run() or 0
        sys.stdout.flush()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has seen enough: `| head`
        sys.stderr.close()
        code = 0
    sys.exit(code)
