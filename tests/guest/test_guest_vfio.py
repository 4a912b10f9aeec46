"""Real PCI behind an IOMMU, as a user who is not root: VFIO on cards that QEMU emulates."""

import pytest
from guest_rig import NOBODY

TWIN, OTHER_TWIN = "0000:02:00.0", "0000:02:00.1"


@pytest.fixture(scope="module")
def igb(translated):
    """The address of an igb that is bound to vfio-pci for NOBODY."""
    address = translated.nics[2]
    translated.tool("bind", "vfio", address, "--user", NOBODY)
    return address


def test_guest_msix_interrupts_arrive_each_on_its_eventfd(translated, igb):
    done = translated.start("guest_inside:igb_interrupts", igb, 3, user=NOBODY).end()
    assert done.out.splitlines() == [f"vector {k}: [{k}]" for k in range(3)]


def test_guest_memory_is_mapped_for_the_iommu_without_root(translated, igb):
    done = translated.start("guest_inside:igb_dma", igb, user=NOBODY).end()
    lines = done.out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith("mapped 2 pages from 0x")


def test_guest_an_address_that_is_not_mapped_is_stopped_by_the_iommu(translated):
    nic, page, address = translated.nics[0], "0x7000000000", "0x7000000800"
    translated.tool("bind", "vfio", nic, "--user", NOBODY)
    done = translated.start("guest_inside:send_from", nic, address, user=NOBODY).end()
    assert done.out == "alive, MAC 52:54:00:00:00:01\n"
    faults = [line for line in translated.shell("dmesg").splitlines() if "DMAR" in line and page in line]
    assert faults, translated.shell("dmesg | tail -n 20")
    assert all(nic.removeprefix("0000:") in line for line in faults)
    translated.tool("bind", "restore", nic)


def test_guest_a_card_without_a_driver_is_one_line(translated, igb):
    refusal = translated.app("pcap", igb, "/tmp/none.pcap", user=NOBODY, code=2).refusal
    assert f"{igb}: no driver for 8086:10c9" in refusal


def test_guest_a_group_that_the_kernel_has_a_hand_in_is_refused(translated):
    translated.shell("modprobe e1000e")
    told = translated.tool("bind", "vfio", TWIN)
    assert f"note: {OTHER_TWIN} (8086:10d3, e1000e) is in the same IOMMU group" in told
    line = translated.app("pcap", TWIN, "/tmp/none.pcap", code=1).refusal
    assert "is not viable" in line and OTHER_TWIN in line
    assert "not viable" in translated.tool("bind", "status", TWIN)


def test_guest_another_users_group_is_refused(translated):
    line = translated.app("pcap", TWIN, "/tmp/none.pcap", user=NOBODY, code=1).refusal
    assert "may not be opened" in line and f"chown {NOBODY}" in line


def test_guest_cards_behind_an_iommu_are_not_driven_past_it(translated):
    line = translated.app("pcap", "--unbind", OTHER_TWIN, "/tmp/none.pcap", code=1).refusal
    assert "bind it to vfio-pci" in line


def test_guest_undo_gives_the_cards_back(translated, igb):
    translated.shell("modprobe igb")
    translated.tool("bind", "undo")
    assert "(8086:10d3, e1000e)" in translated.tool("bind", "status", TWIN)
