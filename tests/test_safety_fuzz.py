"""The parsers against every input of the fuzzer's corpus and a few thousand mutations; what a target would notice."""

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ixy_numba.core import capture
from ixy_numba.core.errors import UsageError
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.sim import spec as sim_spec
from tests.fuzz import corpus, targets

ROOT = Path(__file__).resolve().parent.parent
INPUTS = [(name, file) for name in targets.TARGETS for file in targets.TARGETS[name].corpus(name)]
CAPTURE = targets.TARGETS["capture"].corpus("capture")["nano-little"]


@pytest.mark.parametrize(("name", "file"), INPUTS, ids=map("/".join, INPUTS))
def test_the_corpus_keeps_the_contract(name, file):
    target = targets.TARGETS[name]
    target.run(target.corpus(name)[file])


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus_is_small(name):
    inputs = targets.TARGETS[name].corpus(name)
    assert len(inputs) < 100 and sum(map(len, inputs.values())) < 100_000


@pytest.mark.parametrize("name", targets.TARGETS)
def test_mutations_keep_the_contract(name):
    target, chance = targets.TARGETS[name], random.Random(1)
    inputs = list(target.corpus(name).values())
    for _ in range(1000 if INTERPRETED else 4000):
        target.run(mutated(chance, inputs, target.words))


def mutated(chance, inputs, words):
    """An input with up to four bytes flipped, words put in, parts cut out or taken from another input."""
    data = bytearray(chance.choice(inputs))
    for _ in range(chance.randint(1, 4)):
        at, n = chance.randint(0, len(data)), chance.randint(1, 24)
        change = chance.randrange(5)
        if change == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif change == 1:
            word = chance.choice(words)
            data[at : at + len(word)] = word
        elif change == 2:
            data[at:at] = chance.choice(words)
        elif change == 3:
            del data[at : at + n]
        else:
            data[at:at] = chance.choice(inputs)[-n:]
    return bytes(data)


# ---- what a target would notice


def test_a_record_beyond_the_file_is_noticed(monkeypatch):
    """The walk of a parser that forgets to compare lengths with what is there."""

    def careless(address, size, swapped, scale, index):
        if len(index.offsets):
            index.offsets[:], index.lengths[:], index.original[:], index.times_ns[:] = 40, size, 60, 0
        return np.uint64(1), size, size

    monkeypatch.setattr(targets, "_walk", careless)
    monkeypatch.setattr(capture, "_walk", careless)
    with pytest.raises(AssertionError):
        targets.read_capture(CAPTURE)


def test_a_load_beyond_the_file_is_noticed():
    code = ("from ixy_numba.core import capture; from tests.fuzz import targets\n"
            "capture.RECORD_HEADER *= 0  # so that the walk asks for too few bytes\n"
            "targets.read_capture(targets.TARGETS['capture'].corpus('capture')['no-records'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
                          capture_output=True, text=True, timeout=300)
    assert "AssertionError: a load at 24, the file ends at 24" in done.stderr


@pytest.mark.parametrize("fails", [ValueError("no such thing"), OverflowError(), UsageError("two\nlines")])
def test_other_errors_are_noticed(monkeypatch, fails):
    def parse(spec, options):
        raise fails

    monkeypatch.setattr(targets.sim_bus, "parse", parse)
    with pytest.raises((AssertionError, type(fails))) as caught:
        targets.read_spec(b"sim")
    assert not isinstance(caught.value, UsageError)


def test_a_descriptor_left_open_is_noticed(monkeypatch):
    left = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", left.append)
        with pytest.raises(AssertionError, match="left open"):
            targets.read_messages(targets.TARGETS["vhost"].corpus("vhost")["descriptors"])
    for descriptor in left:
        os.close(descriptor)


def test_values_out_of_range_are_noticed(monkeypatch):
    monkeypatch.setitem(sim_spec._PARSERS, "tap", str)
    with pytest.raises(AssertionError, match="15 bytes"):
        targets.read_spec(b"sim:tap=a-name-that-is-too-long")


# ---- the tools


def test_only_inputs_that_add_something_are_kept(monkeypatch, tmp_path):
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec" / "by-hand").write_bytes(b"sim")
    monkeypatch.setattr(targets, "CORPUS", tmp_path)
    monkeypatch.setattr(corpus, "CORPUS", tmp_path)
    corpus.keep("spec", [b"sim", b"sim:", b"sim:size=", b"sim:mac="])
    kept = targets.TARGETS["spec"].corpus("spec")
    assert kept.pop("by-hand") == b"sim"
    assert list(kept.values()) == [b"sim:mac="], "of two that take the same steps the shorter, and none like the seed"
    assert "2 inputs, 11 bytes" in corpus.report("spec")


@pytest.mark.skipif(not find_spec("atheris"), reason="atheris is not installed")
@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_fuzzer_runs(name):
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", name, "--runs", "2000"], cwd=ROOT, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done 2000 runs" in done.stderr and done.stdout.startswith(f"{name}: ")


@pytest.mark.skipif(not find_spec("atheris"), reason="atheris is not installed")
def test_an_unknown_target_is_one_line():
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "nonsense"], cwd=ROOT, timeout=300, capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("no target 'nonsense': expected capture or spec or vhost or vfio\n")
