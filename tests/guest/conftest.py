"""Guests for the tests of real PCI: two boots, each for all tests of a file."""

import pytest
from guest_rig import Machine

from tools import Refused, guest_parts

# Two functions of one card, which the IOMMU cannot tell apart
TWINS = ["-device", "pcie-root-port,id=twins,chassis=30,addr=1e", "-device",
         "e1000e,bus=twins,addr=0.0,multifunction=on,romfile=", "-device", "e1000e,bus=twins,addr=0.1,romfile="]


def boot(*args, **more):
    try:
        guest_parts.parts()
    except Refused as error:
        pytest.skip(str(error))
    machine = Machine(*args, **more)
    try:
        yield machine
    finally:
        machine.close()


@pytest.fixture(scope="module")
def plain():
    """Without an IOMMU: two legacy virtio NICs, two modern ones, an igb."""
    yield from boot(["virtio-legacy"] * 2 + ["virtio"] * 2 + ["igb"], iommu=False)


@pytest.fixture(scope="module")
def translated():
    """Behind an IOMMU: two modern virtio NICs, an igb, and two e1000e that share an IOMMU group."""
    yield from boot(["virtio"] * 2 + ["igb"], iommu=True, devices=TWINS)
