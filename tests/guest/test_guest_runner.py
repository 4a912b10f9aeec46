"""The runner as its users meet it: one command, its output and its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import Refused, guest_parts

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def parts():
    try:
        guest_parts.parts()
    except Refused as error:
        pytest.skip(str(error))


def run(folder, *args):
    return subprocess.run([sys.executable, "-m", "tools.guest", "run", "--console", folder / "console", *args],
                          text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=400, cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_guest_a_command_runs_on_this_machines_files(tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "here").write_text("from outside\n")
    script = "cat here; rm here; echo inside > here; cat here; id -u; echo $GUEST_NICS; " \
             "cat /sys/bus/pci/devices/0000:01:00.0/device; echo no >&2; exit 3"
    done = run(tmp_path, "--nic", "virtio", "--nic", "e1000e", "--user", "65534", "--", "sh", "-c", script)
    assert done.stdout.splitlines() == ["from outside", "inside", "65534", "0000:00:10.0 0000:01:00.0", "0x10d3"]
    assert done.stderr.splitlines() == ["no", f"console: {tmp_path}/console"]
    assert done.returncode == 3
    assert (tmp_path / "here").read_text() == "from outside\n", "what the guest does stays there"
    assert "guest: up" in (tmp_path / "console").read_text()


def test_guest_the_deadline_ends_it(tmp_path):
    done = run(tmp_path, "--timeout", "2", "--", "sleep", "1000")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"console: {tmp_path}/console", "error: the guest did not end within 2 s"]


def test_guest_what_qemu_says_is_told(tmp_path):
    done = run(tmp_path, "--memory", "lots", "--", "true")
    assert done.returncode == 1
    assert "the guest ended before its command" in done.stderr and "lots" in done.stderr
