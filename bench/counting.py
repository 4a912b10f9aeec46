"""Events per packet of the driver's phase alone: by hardware counters, or exactly and anywhere by valgrind's callgrind.

callgrind counts while `probe_toggle` has it switched on, around the phase. What a phase costs apart from its packets
drops out as the difference between a long and a short one. valgrind knows no AVX-512, so all code is compiled for the
baseline x86-64 there; the counts do not depend on the machine.
"""

import ctypes
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ixy_numba import kernel

from . import nic, rivals
from .common import Unavailable, in_worker
from .contest import contestants
from .nic import ONE, call, phase

GENERIC = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
GENERIC_FLAGS = ("-std=c11", "-O3")
SHORT, LONG, ROUNDS = 64, 192, 24  # packets a direction and round
WARM_UP_ROUNDS = 60  # until every buffer was around once


class Counted(NamedTuple):
    """`driver` between two calls of `function`, which switch a counter on and off."""

    function: np.uint64
    handle: np.uint64
    on: np.uint64
    off: np.uint64
    driver: Any


@phase.implement(Counted)
@kernel
def _counted(driver, batch, passes):
    call(driver.function, driver.handle, driver.on, ONE)
    phase(driver.driver, batch, passes)
    call(driver.function, driver.handle, driver.off, ONE)


def _run(player, driver, batch, packets, rounds):
    samples = np.zeros(rounds, nic.SAMPLE).view(np.recarray)
    nic.measure(player.nic, driver, nic.new_plan(batch, packets), player.eviction, samples)
    return int(samples.packets.sum())


def _per_packet(counts):
    """From {packets a round: (events, packets)} to events per packet of the difference."""
    (few, less), (many, more) = counts[SHORT], counts[LONG]
    return {name: (many.get(name, 0) - few.get(name, 0)) / (more - less) for name in many}


# ---- hardware counters

_HARDWARE, _CACHE, _ENABLE, _DISABLE = 0, 3, 0x2400, 0x2401
PERF_EVENTS = {"instructions": (_HARDWARE, 1), "branches": (_HARDWARE, 4),
               "loads": (_CACHE, 0), "stores": (_CACHE, 1 << 8)}  # of the first-level data cache


class HardwareCounters:
    """The counters of PERF_EVENTS that this machine has; `names` is empty where there are none."""

    def __init__(self, events=PERF_EVENTS):
        self.names, self._fds = [], []
        for name, (kind, config) in events.items():
            # perf_event_attr: type, size, config, …, read_format = GROUP, flags = disabled, exclude_kernel, exclude_hv
            flags = 0b1100001 if not self._fds else 0b1100000
            attributes = struct.pack("<IIQQQQQ", kind, 128, config, 0, 0, 8, flags).ljust(128, b"\0")
            leader = self._fds[0] if self._fds else -1
            fd = ctypes.CDLL(None).syscall(298, attributes, 0, -1, leader, 0)
            if fd >= 0:
                self.names.append(name)
                self._fds.append(fd)

    def read(self):
        values = struct.unpack(f"<{1 + len(self._fds)}Q", os.read(self._fds[0], 8 * (1 + len(self._fds))))[1:]
        return dict(zip(self.names, values, strict=True))

    def count(self, player, batch):
        ioctl = ctypes.cast(ctypes.CDLL(None).ioctl, ctypes.c_void_p).value
        driver = Counted(*map(np.uint64, (ioctl, self._fds[0], _ENABLE, _DISABLE)), player.entry.driver)
        _run(player, driver, batch, LONG, WARM_UP_ROUNDS)
        found = {}
        for packets in (SHORT, LONG):
            before = self.read()
            moved = _run(player, driver, batch, packets, ROUNDS)
            found[packets] = {name: value - before[name] for name, value in self.read().items()}, moved
        return _per_packet(found)


# ---- callgrind

CALLGRIND_EVENTS = {"instructions": ("Ir",), "loads": ("Dr",), "stores": ("Dw",), "branches": ("Bc", "Bi")}


def callgrind(mode, batch_sizes, against=None, environment=None):
    """{variant: {batch size: {event: per packet, "mix": …}}}, counted in two processes: one compiles, one counts.

    `against`: names of the rivals (None: all); `environment`: variables of these processes.
    """
    if not shutil.which("valgrind"):
        raise Unavailable("events: counting instructions needs valgrind; install it (Debian: apt install valgrind)")
    if not shutil.which("gcc"):
        raise Unavailable("events: counting needs gcc for its probe; install it (Debian: apt install gcc libc6-dev)")
    options = {"batch_sizes": list(batch_sizes), "against": against}
    environment = GENERIC | (environment or {})
    in_worker("counting", mode, environment, **options)
    with tempfile.TemporaryDirectory(prefix="ixy_numba-callgrind-") as directory:
        wrapper = ["valgrind", "--quiet", "--tool=callgrind", "--collect-atstart=no", "--instr-atstart=no",
                   "--cache-sim=yes", "--branch-sim=yes", "--dump-instr=yes", "--compress-pos=no",
                   "--compress-strings=no", f"--callgrind-out-file={directory}/out", "--log-file=/dev/null"]
        packets = in_worker("counting", mode, environment, wrapper, code=directory, **options)
        profiles = dict(_parse(path) for path in Path(directory).glob("out.*"))
        decoded = _disassemble(directory, {at for _, lines in profiles.values() for at in lines})
    found = {}
    for name, batch in dict.fromkeys(tuple(key.split("|")[:2]) for key in packets):
        pair = {size: profiles[f"{name}|{batch}|{size}"] for size in (SHORT, LONG)}
        moved = {size: packets[f"{name}|{batch}|{size}"] for size in (SHORT, LONG)}
        events = _per_packet({size: (pair[size][0], moved[size]) for size in pair})
        mix = _per_packet({size: (_mix(pair[size][1], decoded), moved[size]) for size in pair})
        found.setdefault(name, {})[int(batch)] = {**events, "mix": mix}
    return found


def worker(batch_sizes, against, code=None):
    """Run every form for both lengths; under valgrind each becomes a dump. Returns {name|batch|length: packets}."""
    library = rivals.library("probe", "gcc", flags=GENERIC_FLAGS)
    toggle = ctypes.cast(library.probe_toggle, ctypes.c_void_p).value
    packets, first = {}, True
    for player in contestants(against=against, flags=GENERIC_FLAGS):
        driver = Counted(np.uint64(toggle), np.uint64(0), ONE, ONE, player.entry.driver)
        for batch in batch_sizes:
            _run(player, player.entry.driver, batch, LONG, WARM_UP_ROUNDS)
            if first:
                library.probe_begin()
                first = False
            for size in (SHORT, LONG):
                key = f"{player.name}|{batch}|{size}"
                packets[key] = _run(player, driver, batch, size, ROUNDS)
                library.probe_dump(key.encode())
    if code:
        _dump_code(code)
    return packets


def _parse(path):
    """A dump: (its name, ({event: count}, {(object, address): times executed})). Objects are shared libraries."""
    name, total, lines, where = "", {}, Counter(), ""
    skip = False  # the line after `calls=` repeats what the callee's own lines say
    for line in path.read_text().splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            name = line.rpartition(": ")[2]
        elif line.startswith("events: "):
            events = line.split()[1:]
        elif line.startswith("totals: "):
            counts = dict(zip(events, map(int, line.split()[1:]), strict=False))
            total = {mine: sum(counts.get(part, 0) for part in parts) for mine, parts in CALLGRIND_EVENTS.items()}
        elif line.startswith("ob="):
            where = "" if "?" in line else os.path.basename(line[3:])
        elif line.startswith("calls="):
            skip = True
        elif line.startswith("0x"):
            if not skip:
                at, _, times, *_ = line.split()
                lines[where, int(at, 16)] += int(times)
            skip = False
    return name, (total, lines)


def _dump_code(directory):
    """Keep the machine code of this process that lies in anonymous memory (compiled by Numba) or in the rivals."""
    bases = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, _, *name = line.split(maxsplit=5)
        name = os.path.basename("".join(name))
        start, end = (int(word, 16) for word in span.split("-"))
        base = bases.setdefault(name, start) if name else 0  # callgrind counts from a library's first byte
        if "x" in permissions and (not name or name.endswith(".so") and "ixy_numba-bench" in line):
            Path(directory, f"code:{name}:{start - base:x}").write_bytes(ctypes.string_at(start, end - start))


_SLOT = 32  # more than any instruction, and room for what a wrong start would swallow


def _disassemble(directory, addresses):
    """{(object, address): mnemonic} of these instructions, by objdump; empty where there is none."""
    if not shutil.which("objdump"):
        return {}
    regions = [(path.name.split(":")[1], int(path.name.split(":")[2], 16), path.read_bytes())
               for path in Path(directory).glob("code:*")]
    picked, image = [], bytearray()
    for where, at in sorted(addresses):
        for name, start, code in regions:
            if name == where and start <= at < start + len(code):
                picked.append((where, at))
                image += code[at - start : at - start + 15].ljust(_SLOT, b"\x90")
    path = Path(directory, "picked")
    path.write_bytes(image)
    listing = subprocess.run(["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", str(path)], capture_output=True,
                             text=True).stdout
    found = {}
    for offset, mnemonic in re.findall(r"^\s*([0-9a-f]+):\t[0-9a-f ]+\t(?:lock |rep |data16 )*(\S+)", listing, re.M):
        slot, within = divmod(int(offset, 16), _SLOT)
        if not within:
            found[picked[slot]] = mnemonic
    return found


KINDS = (("jump", r"j"), ("stack", r"push|pop|call|ret|leave"), ("compare", r"cmp|test|set|cmov|bt$"),
         ("vector", r"v|p|mov[adhlu]p|movdq|xorp|andp|orp|unpck|shufp"), ("move", r"mov|lea|xchg|bswap"),
         ("arithmetic", r""))


def _mix(lines, decoded):
    """How often each kind of instruction was executed."""
    mix = Counter()
    for at, times in lines.items():
        if at in decoded:
            mix[next(kind for kind, pattern in KINDS if re.match(pattern, decoded[at]))] += times
    return mix
