"""The 82599 driver against a device that is an attacker with DMA, answers wrongly, or vanishes: nothing is lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hostile_ixgbe
import numpy as np
import pytest
from hostile_ixgbe import KINDS, PATHS, Fight, believing, guarded, storm
from tinynic import TinyNic, account

from ixy_numba import Forwarder, IxyError, Pool
from ixy_numba.core.jit import CHECKED, INTERPRETED
from ixy_numba.core.pool import U
from ixy_numba.core.registers import ALL_ONES
from ixy_numba.core.thread import KernelThread
from ixy_numba.device import _attach
from ixy_numba.drivers import ixgbe

HERE = Path(__file__).parent
DESCRIPTORS = 2_000 if INTERPRETED else 500_000  # a path
STORM = 5_000 if INTERPRETED else 1_000_000
checked_only = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast checks nothing")


def attack(path, descriptors, **environment):
    """The program in a process of its own: (exit code, what it printed as a dict, or None)."""
    done = subprocess.run([sys.executable, str(HERE / "hostile_ixgbe.py"), "--path", path, "--descriptors",
                           str(descriptors)], env={**os.environ, "PYTHONPATH": str(HERE.parent), **environment},
                          capture_output=True, text=True, timeout=900)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else None


def wait(done, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.005)


@checked_only
@pytest.mark.safety("memory_bounds", "packet_bounds", "packet_use_after_free")
@pytest.mark.parametrize("path", PATHS)
def test_whatever_the_device_writes_all_is_counted_and_nothing_is_damaged(path):
    code, found = attack(path, DESCRIPTORS)
    assert code == 0 and found["faults"] == []
    assert found["descriptors"] >= DESCRIPTORS and found["undone"] == 0
    for kind in (*KINDS[2:], "sound", "lies"):  # each was there, and often
        assert found[kind] > DESCRIPTORS // 50


@checked_only
@pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: the interpreter has checks of its own")
@pytest.mark.parametrize("path, setting", [
    *[(path, {"IXY_NUMBA_MODE": "fast"}) for path in PATHS],
    ("batch", {"IXY_NUMBA_WITHOUT": "packet_use_after_free"}), ("fused", {"IXY_NUMBA_WITHOUT": "packet_bounds"})])
def test_without_the_checks_the_same_attack_does_damage(path, setting):
    """A crash, bytes overwritten that are nobody's, buffers lost, or counts that are not what was done."""
    code, found = attack(path, 20_000, **setting)
    assert code < 0 or found["faults"]


def test_an_attack_while_the_driver_runs():
    """Rings and packets change under the driver's hands: what it reads twice may differ."""
    with guarded() as canaries:
        fight = Fight("fused", canaries)
        attacker = KernelThread(storm, fight.ports, U(STORM))
        with Forwarder(fight.devices, believing, batch_size=48) as forwarder:
            wait(lambda: forwarder.began)
            attacker.start()
            attacker.join(300)
        assert attacker.error is None and not attacker.is_alive()
        assert canaries.damaged() == 0
        account(fight.pool, fight.devices)
        taken = forwarder.count("forwarded") + forwarder.count("dropped")
        assert taken > 0 and forwarder.count("failed") + sum(int(q.state.errors) for q in fight.rxqs) <= taken
        assert fight.close() == [] and canaries.damaged() == 0


# ---- registers


class Vanishing(TinyNic):
    """Answers all ones from the `after`th register access on. It counts them."""

    def __init__(self, after):
        super().__init__()
        self.after, self.accesses = after, 0

    def _gone(self):
        self.accesses += 1
        return self.accesses > self.after

    def read32(self, offset):
        return ALL_ONES if self._gone() else super().read32(offset)

    def write32(self, offset, value):
        if not self._gone():
            super().write32(offset, value)


def test_a_device_that_vanishes_at_any_step_of_its_set_up(monkeypatch):
    monkeypatch.setattr(ixgbe.setup.time, "sleep", lambda seconds: None)
    with guarded() as canaries:
        pool = Pool(256)
        whole = Vanishing(1 << 40)
        _attach(whole, 1, 64, [pool]).close()
        for after in range(0, whole.accesses, 1 if not INTERPRETED else 7):
            nic = Vanishing(after)
            try:
                device = _attach(nic, 1, 64, [pool])
            except IxyError as error:
                assert "\n" not in str(error)
            else:
                with pytest.raises(IxyError, match="closed, but it did not become quiet"):
                    device.close()
            assert nic.pages == {}
            account(pool, [])
        assert canaries.damaged() == 0


def test_a_device_that_vanishes_while_it_runs():
    with guarded() as canaries:
        fight = Fight("fused", canaries)
        nic = fight.devices[0].bus
        nic.answers = {offset: ALL_ONES for offset in range(0, len(nic.bar0), 4)}
        nic.bar0[:] = 0xFF
        fight.rxqs[0].ring.desc["done"] = ALL_ONES << 32 | ALL_ONES
        with Forwarder(fight.devices, believing) as forwarder:
            wait(lambda: int(fight.rxqs[0].state.errors) >= 64)
        assert forwarder.count("forwarded") == 0 and int(fight.rxqs[0].state.errors) >= 64
        for ask in (fight.devices[0].stats, lambda: fight.devices[0].link_mbit, lambda: fight.devices[0].mac):
            with pytest.raises(IxyError, match="hostile 0: .*the device is gone"):
                ask()
        with pytest.raises(IxyError, match="hostile 0: closed, but it did not become quiet"):
            fight.devices[0].close()
        fight.devices[1].close()
        account(fight.pool, [])
        assert canaries.damaged() == 0


class Random(TinyNic):
    """Every register reads random bits."""

    def __init__(self, seed):
        super().__init__()
        self.bits = np.random.default_rng(seed)

    def read32(self, offset):
        return int(self.bits.integers(0, 1 << 32))


@pytest.mark.filterwarnings("ignore:.*the link is down")
@pytest.mark.parametrize("seed", range(8))
def test_registers_that_say_anything(seed, monkeypatch):
    monkeypatch.setattr(ixgbe.setup.time, "sleep", lambda seconds: None)
    pool, nic = Pool(256), Random(seed)
    try:
        device = _attach(nic, 1, 64, [pool])
        device.stats()
        device.close()
    except IxyError as error:
        assert "\n" not in str(error)
    assert nic.pages == {}
    account(pool, [])


def test_the_attacker_reaches_what_it_should():
    """The program's own parts: every kind of write-back is one that the driver's documentation names."""
    assert set(KINDS) == {"sound", "undone", "no_eop", "error", "empty", "long"}
    for status, length, kind in ((0, 60, "undone"), (1, 60, "no_eop"), (7, 60, "error"), (3, 0, "empty"),
                                 (3, 2049, "long"), (3, 2048, "sound"), (3, 1, "sound")):
        assert KINDS[int(hostile_ixgbe.kind_of(U(status), U(length)))] == kind
