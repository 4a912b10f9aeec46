"""Guests for the tests of real PCI: two boots for all of them."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from guest_rig import PATHS, Machine
from guest_warm import VIRTIO

from tools import Refused, guest_parts
from tools.guest import portable_kernels

# Two functions of one card, which the IOMMU cannot tell apart
TWINS = ["-device", "pcie-root-port,id=twins,chassis=30,addr=1e", "-device",
         "e1000e,bus=twins,addr=0.0,multifunction=on,romfile=", "-device", "e1000e,bus=twins,addr=0.1,romfile="]


@functools.cache
def warm(spec):
    """Compile what the guests run of the driver of `spec` (guest_warm.SPECS), once for all of them."""
    program = Path(__file__).with_name("guest_warm.py")
    subprocess.run([sys.executable, program, spec], check=True, timeout=600, stdout=subprocess.DEVNULL,
                   env={**os.environ, **portable_kernels(), "PYTHONPATH": PATHS})


def boot(spec, *args, **more):
    """A Machine, and its end; `spec`: see `warm`."""
    try:
        guest_parts.parts()
    except Refused as error:
        pytest.skip(str(error))
    warm(spec)
    machine = Machine(*args, **more)
    try:
        yield machine
    finally:
        machine.close()


@pytest.fixture(scope="session")
def plain():
    """Without an IOMMU: two legacy virtio NICs, two modern ones, an igb."""
    yield from boot(VIRTIO, ["virtio-legacy"] * 2 + ["virtio"] * 2 + ["igb"], iommu=False)


@pytest.fixture(scope="session")
def translated():
    """Behind an IOMMU: two modern virtio NICs, an igb, and two e1000e that share an IOMMU group."""
    yield from boot(VIRTIO, ["virtio"] * 2 + ["igb"], iommu=True, devices=TWINS)
