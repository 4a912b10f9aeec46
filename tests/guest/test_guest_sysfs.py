"""Real PCI without an IOMMU: what is refused, in one line and without harm, and the tools on a real kernel."""

import signal

from guest_rig import NOBODY

SATA = "0000:00:1f.2"
TOTAL = "/proc/sys/vm/nr_hugepages"


def refused(machine, *args, code=1, user=None):
    return machine.app("pcap", *args, "/tmp/none.pcap", code=code, user=user).refusal


def test_guest_no_such_card(plain):
    line = refused(plain, "0000:77:00.0", code=2)
    assert "no PCI device at this address" in line and all(nic in line for nic in plain.nics)


def test_guest_what_is_no_network_card(plain):
    before = plain.shell(f"readlink /sys/bus/pci/devices/{SATA}/driver; true")
    assert "no network card" in refused(plain, "--unbind", SATA, code=2)
    assert plain.shell(f"readlink /sys/bus/pci/devices/{SATA}/driver; true") == before


def test_guest_the_kernels_cards_are_left_to_it(plain):
    nic = plain.nics[0]
    assert "it belongs to the kernel's driver virtio-pci; let go of it with --unbind" in refused(plain, nic)
    assert f"{nic} (1af4:1000, virtio-pci)" in plain.tool("bind", "status", nic)


def test_guest_without_root_and_without_vfio(plain):
    igb = plain.nics[4]  # which has no driver
    assert "run as root, or bind the device to vfio-pci" in refused(plain, igb, user=NOBODY)
    plain.start("tools.bind", "unbind", plain.nics[3], user=NOBODY).end(1)
    assert "virtio-pci)" in plain.tool("bind", "status", plain.nics[3])


def test_guest_without_huge_pages(plain):
    plain.shell(f"echo 0 > {TOTAL}")
    try:
        assert "huge pages" in refused(plain, "--unbind", plain.nics[0])
    finally:
        plain.shell(f"echo 64 > {TOTAL}")
        plain.tool("bind", "restore", plain.nics[0])


def test_guest_vfio_without_an_iommu(plain):
    told = plain.start("tools.bind", "vfio", plain.nics[0]).end(1)
    assert "behind no IOMMU" in told.refusal
    assert "virtio-pci)" in plain.tool("bind", "status", plain.nics[0])


def test_guest_interrupts_without_vfio(plain):
    assert "bind the device to vfio-pci" in refused(plain, "--unbind", "--interrupts", plain.nics[2])
    plain.tool("bind", "restore", plain.nics[2])


def test_guest_a_card_that_goes(plain):
    """Its ports read all ones, as those of a card do that was pulled out: here its decoder is off.

    (QEMU reads memory that nobody decodes as zeros, which no real bus does.)
    """
    nics = plain.nics[:2]
    process = plain.start("ixy_numba.fwd", "--no-touch", "--unbind", *nics)
    process.says("Mpps")
    config = f"/sys/bus/pci/devices/{nics[0]}/config"
    command = int(plain.shell(f"od -An -tu2 -j4 -N2 {config}"))
    plain.shell(f"printf '\\{command & ~1 & 0xFF:03o}' | dd of={config} bs=1 seek=4 conv=notrunc")
    assert f"{nics[0]}: the device is gone" in process.end(1).refusal
    plain.tool("bind", "restore", *nics)


def test_guest_huge_pages_are_set_and_given_back(plain):
    before = plain.tool("hugepages", "status")
    plain.tool("hugepages", "set", 70)
    assert int(plain.shell(f"cat {TOTAL}")) == 70
    plain.tool("hugepages", "undo")
    assert plain.tool("hugepages", "status") == before


def test_guest_status_of_all_cards(plain):
    lines = plain.tool("bind", "status").splitlines()
    assert [line.split()[0] for line in lines] == sorted(plain.nics)
    assert all("used by root through sysfs" in line for line in lines)


def test_guest_a_forwarder_ends_at_once(plain):
    """Set up, told to end, closed: the cards are quiet and free for others."""
    nics = plain.nics[2:4]
    process = plain.start("ixy_numba.fwd", "--no-touch", "--unbind", *nics)
    process.says("Mpps")
    process.end(0, stop=signal.SIGTERM)
    for nic in nics:
        command = int(plain.shell(f"od -An -tu2 -j4 -N2 /sys/bus/pci/devices/{nic}/config"))
        assert not command & 4, "bus mastering is off"
    plain.tool("bind", "restore", *nics)
