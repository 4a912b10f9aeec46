"""Faults put into the simulated 82599 on purpose, one at a time: the tests that must notice each of them do.

A mutant is a copy of the package with one piece of source replaced. Tests run on it in the interpreter, which needs no
compilation. That the same tests pass without the fault is what the rest of the suite shows, and the control here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ixy_numba

PACKAGE = Path(ixy_numba.__file__).parent
TESTS = Path(__file__).parent
# name: (module of sim, what is replaced, by what, file of tests, expression that selects those which must fail)
MUTANTS = {
    "a received frame is not reported as done": (
        "receive", "(DD | EOP | frame.status |", "(EOP | frame.status |", "receive", "one_descriptor"),
    "a received frame has no end": (
        "receive", "(DD | EOP | frame.status |", "(DD | frame.status |", "receive", "one_descriptor"),
    "a received length counts the CRC": (
        "receive", "status | length << SHIFT32)\n\n\n@kernel\ndef place", "status | length + U(4) << SHIFT32)\n\n\n"
        "@kernel\ndef place", "receive", "one_descriptor"),
    "a received length is off by one": (
        "receive", "piece = min(left, queue.buffer)", "piece = min(left, queue.buffer - ONE)", "receive",
        "longer_than_the_buffer"),
    "RDH is frozen": (
        "receive", "store_release32(queue.registers + RDH, queue.head)", "pass", "receive", "one_descriptor"),
    "memory behind a mapping is reached": (
        "state", "return mapping.address + (iova - mapping.iova), mapping.end - iova",
        "return mapping.address + (iova - mapping.iova), mapping.end + iova", "receive", "mapped or reach or map"),
    "a frame for somebody else is accepted": (
        "mac", "    if not passes:\n", "    if False:\n", "receive", "address or filter or unicast"),
    "the multicast table is read one bit off": (
        "mac", "bits = mac >> (U(36) - device", "bits = mac >> (U(35) - device", "receive", "multicast"),
    "the VLAN table is ignored": ("mac", "if not device.vlan_filter:", "if True:", "offload", "vlan_filter"),
    "a frame one byte too long is accepted": (
        "mac", "octets > longest_frame(device, address)", "octets > longest_frame(device, address) + ONE", "receive",
        "long"),
    "the redirection table is ignored": (
        "receive", "U(device.reta[frame.hash & U(127)]) if frame.type & U(15) else ZERO", "ZERO", "receive",
        "rss or redirect or hash or spread"),
    "the hash's key is shifted": (
        "model", "key >> 320 - 32 - k", "key >> 319 - 32 - k", "receive", "hash or toeplitz"),
    "a stripped tag is not reported": ("receive", "frame.status | VP", "frame.status", "offload", "stripped"),
    "a tag is reported and stays in the frame": (
        "receive", "frame.address, frame.length = here + U(4), frame.length - U(4)", "pass", "offload", "stripped"),
    "a wrong checksum is not reported": ("checksum", "L4_CHECKED | L4_WRONG)", "L4_CHECKED)", "offload", "damaged"),
    "a wrong IP checksum is not reported": ("checksum", "IP_CHECKED | IP_WRONG", "IP_CHECKED", "offload", "damaged"),
    "a sent descriptor is not reported": (
        "transmit", "        store_release32(descriptor + U(12), DD)", "        pass", "transmit", "goes_out"),
    "every sent descriptor is reported": (
        "transmit", "        if load64(descriptor + U(8)) & RS:\n            report(device, queue, descriptor, head +",
        "        if True:\n            report(device, queue, descriptor, head +", "transmit", "only_where_asked"),
    "TDH is frozen": (
        "transmit", "        store_release32(queue.registers + TDH, head)", "        pass", "transmit", "goes_out"),
    "the head that is written back is one behind": (
        "transmit", "index + ONE if index + ONE < queue.length else ZERO", "index", "transmit", "head_write_back"),
    "an inserted checksum is not inverted": (
        "offload", "checksum = ~fold(total) & LOW16", "checksum = fold(total)", "offload", "checksums_are_inserted"),
    "segments lack their length in the checksum": (
        "offload", "        total += swap16(size)", "        pass", "offload", "tcp_is_segmented"),
    "segments all have the same IP identification": (
        "offload", "+ number) & LOW16", ") & LOW16", "offload", "tcp_is_segmented"),
    "every segment is pushed": (
        "offload", "kept = device.middle_flags if number else device.first_flags", "kept = ALL_FLAGS", "offload",
        "tcp_is_segmented"),
    "sequence numbers stand still": (
        "offload", "(sequence + sent) & LOW32", "sequence & LOW32", "offload", "tcp_is_segmented"),
    "the tag that is inserted is another one": (
        "offload", "tag = out.lengths >> U(16)", "tag = out.lengths >> U(15)", "offload", "tag_is_inserted"),
    "a queue's cause is lost": (
        "receive", "    device.happened |= queue.cause\n    device.qprc[queue.counters] += n\n",
        "    device.qprc[queue.counters] += n\n", "interrupts", "ivar_leads_a_receive"),
    "auto-clear is ignored": (
        "interrupts", "self._queue_causes &= ~(queues & (cleared & RTXQ | ~RTXQ))", "pass", "interrupts",
        "ivar_leads_a_receive or auto_mask"),
    "auto-mask is ignored": (
        "interrupts", "            self._auto_mask(queues, others)", "            pass", "interrupts", "auto_mask"),
    "a cause that comes while it is masked is forgotten": (
        "interrupts", "                self._forget()", "                pass", "interrupts", "auto_mask or moderated"),
    "moderation is ignored": ("interrupts", "if now < self._next[vector]:", "if False:", "interrupts", "moderation"),
    "moderation loses a message": (
        "interrupts", "self._state.alarm = min(int(self._state.alarm), int(self._next[vector]))", "pass", "interrupts",
        "moderat"),
    "reading the causes does not clear them": (
        "interrupts", "            self._clear_causes(ALL_ONES & ~kept)", "            pass", "interrupts", "reading"),
    "a pulled cable is no interrupt": (
        "model", "self.interrupts.raise_other(LINK_CHANGE)", "pass", "interrupts", "pulling"),
    "a counter does not clear": ("statistics", "self._cleared += value", "pass", "registers", "counters_clear"),
    "a semaphore can be taken twice": ("management", "value | m.SWSM.SMBI)", "value)", "registers", "semaphore"),
    "the EEPROM's checksum is off by one": (
        "eeprom", "SUM = 0x3F, 0xBABA", "SUM = 0x3F, 0xBABB", "registers", "checksum"),
    "the module does not acknowledge": (
        "sfp", "self._out = self._bits != 8", "self._out = True", "management", "module"),
    "RST stays set": ("model", "            value = 0\n", "            pass\n", "registers", "reset_clears_itself"),
    "bus mastering is ignored": ("model", "moving = self._bus_master and", "moving =", "vfio_user", "mastering"),
    "a function-level reset is ignored": ("pci", "& FUNCTION_RESET:", "& 0:", "vfio_user", "function_reset"),
    "a mapping stays after it was taken back": (
        "guest_memory", "                self._model.unmap(start)", "                pass #", "vfio_user",
        "outside_the_map or come_and_go"),
}


def run(package_folder, file, expression):
    """(whether the selected tests pass on the package in a folder, what they say)."""
    environment = {**os.environ, "PYTHONPATH": str(package_folder), "NUMBA_DISABLE_JIT": "1",
                   "PYTHONDONTWRITEBYTECODE": "1"}
    name = f"test_sim_{file}.py" if (TESTS / f"test_sim_{file}.py").exists() else f"test_{file}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(TESTS),
               str(TESTS / name), "-k", expression]
    done = subprocess.run(command, cwd=package_folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1) or done.returncode < 0, done.stdout + done.stderr  # below 0: killed by a signal
    return done.returncode == 0, done.stdout


def copy_of_the_package(folder):
    return Path(shutil.copytree(PACKAGE, folder / "ixy_numba", ignore=shutil.ignore_patterns("__pycache__")))


def test_the_same_tests_pass_without_a_fault(tmp_path):
    copy_of_the_package(tmp_path)
    chosen = {}
    for _, _, _, file, expression in MUTANTS.values():
        chosen.setdefault(file, set()).add(expression)
    for file, expressions in chosen.items():
        passed, out = run(tmp_path, file, " or ".join(sorted(expressions)))
        assert passed, out


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found(tmp_path, name):
    module, old, new, file, expression = MUTANTS[name]
    source = copy_of_the_package(tmp_path) / "sim" / f"{module}.py"
    text = source.read_text()
    assert text.count(old) == 1, "the source that the fault replaces has changed: bring the fault in line"
    source.write_text(text.replace(old, new))
    passed, out = run(tmp_path, file, expression)
    assert not passed, f"nobody noticed\n{out}"
