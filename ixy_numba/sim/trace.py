"""A file with every access of a simulated 82599's registers: time in seconds, R or W, offset, name, value."""

import time

from . import regs as m

NAMES = {one.offset: one.name for register in m.ALL.values() for one in register.each()}
NAMES |= {alias: NAMES[native] for alias, native in m.NATIVE.items() if native in NAMES}


class Trace:
    """For `Model.trace`. Registers that the model only stores have no name."""

    def __init__(self, path):
        self._file = open(path, "w", buffering=1, encoding="ascii")
        self._start = time.monotonic()

    def __call__(self, kind, offset, value):
        seconds = time.monotonic() - self._start
        self._file.write(f"{seconds:.6f} {kind} {offset:05x} {NAMES.get(offset, '-')} {value:08x}\n")

    def close(self):
        self._file.close()
