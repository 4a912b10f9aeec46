"""PCI cards on a machine made of files: what is refused and why, BARs, configuration space, DMA addresses, VFIO."""

import errno
import fcntl
import os
import struct

import numpy as np
import pytest
from fake_pci import CONFIG_START, MEMORY, PORTS, FakeMachine, FakeVfio

from ixy_numba import IxyError, UsageError
from ixy_numba import device as device_module
from ixy_numba.bus import pci, sysfs, vfio
from ixy_numba.bus.pci import Function, open_bus
from ixy_numba.core import memory
from ixy_numba.core.errors import ClosedError, DeviceGoneError, DmaError
from ixy_numba.core.memory import HUGE, PAGE, PINNED, DmaMemory

A, B = "0000:03:00.0", "0000:03:00.1"
RUNNING = 0x1 | 0x2 | 0x4 | 0x400  # ports, memory, bus master; no INTx


@pytest.fixture
def machine(tmp_path):
    return FakeMachine(tmp_path)


@pytest.fixture
def kernel(machine, monkeypatch):
    fake = FakeVfio(machine)
    monkeypatch.setattr(vfio.fcntl, "ioctl", fake.ioctl)
    yield fake
    assert not vfio.Container._all and not fake.mapped and not fake.interrupts, "all is given back"
    for descriptor in fake.devices:
        with pytest.raises(OSError):
            os.fstat(descriptor)


@pytest.fixture(autouse=True)
def nothing_stays_open():
    before = open_files()
    yield
    assert not pci.PciBus._taken
    assert open_files() == before


def open_files():
    paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(path) for path in paths if os.path.lexists(path))


def take(machine, address=A, **more):
    return open_bus(address, root=machine.root, **more)


def refusal(machine, address=A, kind=IxyError, **more):
    """The one line that opening gives."""
    with pytest.raises(kind) as caught:
        take(machine, address, **more)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind
    return str(caught.value)


# ---- which device

@pytest.mark.parametrize("spec", ["0000:0a:00.1", "0a:00.1", "0A:00.1"])
def test_addresses_with_and_without_their_domain(machine, spec):
    machine.add("0000:0a:00.1", node=1)
    bus = take(machine, spec)
    assert (bus.name, bus.vendor, bus.device, bus.numa_node) == ("0000:0a:00.1", 0x8086, 0x10FB, 1)
    assert not bus.simulated and bus.memory_needs == HUGE
    bus.close()


@pytest.mark.parametrize("spec", ["0000:03:00.0", "03:00.0", "10000:03:00.0"])
def test_a_device_spec_may_be_an_address(monkeypatch, spec):
    monkeypatch.setattr(pci, "open_bus", lambda address, unbind: (address, unbind))
    assert device_module.open_bus(spec, True) == (spec, True)


def test_no_device_at_the_address(machine):
    machine.add(A, driver="ixgbe")
    machine.add("0000:00:1f.2", kind=0x010601)
    assert refusal(machine, B, UsageError) == (
        f"{B}: there is no PCI device at this address; network cards here: {A} (8086:10fb, ixgbe)")


def test_a_machine_without_network_cards(machine):
    assert refusal(machine, kind=UsageError).endswith("network cards here: none")


def test_no_network_card(machine):
    machine.add(A, kind=0x010601)
    assert refusal(machine, kind=UsageError) == f"{A}: this is no network card: its class is 0x0106, expected 0x0200"


# ---- whose device

def test_a_kernel_drivers_device_is_left_to_it(machine):
    machine.add(A, driver="ixgbe")
    machine.interface(A, "eth1")
    assert "belongs to the kernel's driver ixgbe; let go of it with --unbind" in refusal(machine)
    assert (machine.path(A) / "driver/unbind").read_text() == "" and machine.command(A) == 0


def test_it_is_taken_when_told_to(machine):
    machine.add(A, driver="ixgbe")
    machine.interface(A, "eth1")
    take(machine, unbind=True).close()
    assert (machine.path(A) / "driver/unbind").read_text() == A


@pytest.mark.parametrize("specs, error, taken", [
    ([A, "nonsense"], UsageError, False),  # that is seen before anything is done
    ([A, B], IxyError, True),  # another driver's, which may not be taken
    ([A, "sim:gen=never"], UsageError, True)])
def test_a_card_goes_back_to_its_driver_if_nothing_comes_of_it(machine, monkeypatch, specs, error, taken):
    for address, name in ((A, "eth1"), (B, "eth2")):
        machine.add(address, driver="ixgbe")
        machine.interface(address, name, up=address == B)
    monkeypatch.setattr(pci, "open_bus", lambda address, unbind: open_bus(address, unbind, machine.root))
    with pytest.raises(error):
        device_module.open_devices(specs, unbind=True)
    assert (machine.path(A) / "driver/unbind").read_text() == A * taken
    back = machine.path(A) / "driver/bind"
    assert (back.read_text() if taken else back.exists()) == (A if taken else False)


@pytest.mark.parametrize("below", ["", "virtio3"])
@pytest.mark.parametrize("unbind", [False, True])
def test_an_interface_that_is_up_is_not_touched(machine, unbind, below):
    machine.add(A, driver="ixgbe")
    machine.interface(A, "eth1", up=True, below=below)
    assert refusal(machine, unbind=unbind) == (
        f"{A}: in use by the kernel (ixgbe): its interface eth1 is up; set it down first, or choose another")
    assert (machine.path(A) / "driver/unbind").read_text() == "" and machine.command(A) == 0


def test_the_default_route_is_named(machine):
    machine.add(A, driver="ixgbe")
    machine.interface(A, "eth1", up=True)
    for routes in ((("eth1", "00000000", "00000000"),), ()):
        machine.routes(("eth0", "0002000A", "00FFFFFF"), *routes, ipv6=[("0" * 32, "00", "eth1")] * (not routes))
        assert "eth1 is up and holds the default route" in refusal(machine, unbind=True)
    machine.routes(("eth1", "00000000", "000000FF"), ipv6=[("0" * 32, "00", "lo")])
    assert "is up; set" in refusal(machine, unbind=True)


def test_an_interface_in_another_namespace_is_not_touched(machine):
    machine.add(A, driver="ixgbe")
    (machine.path(A) / "net").mkdir()
    assert "its interface is in another network namespace" in refusal(machine, unbind=True)


def test_another_process_drives_it(machine):
    machine.add(A)
    with open(machine.path(A) / "config") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process drives this device" in refusal(machine)
    take(machine).close()


def test_opened_twice(machine):
    machine.add(A)
    bus = take(machine)
    assert "has opened this device already" in refusal(machine, kind=UsageError)
    bus.close()
    take(machine).close()


def test_without_root_and_without_vfio(machine, monkeypatch):
    machine.add(A)

    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(sysfs.os, "open", refuse)
    assert "/config; run as root, or bind the device to vfio-pci and use it without" in refusal(machine)


@pytest.mark.parametrize("kind, refused", [("DMA", True), ("DMA-FQ", True), ("identity", False)])
def test_physical_addresses_behind_an_iommu(machine, kind, refused):
    machine.add(A, group="7")
    (machine.path(A) / "iommu_group/type").write_text(f"{kind}\n")
    if refused:
        assert "behind an IOMMU, which lets no physical address through; bind it to vfio-pci" in refusal(machine)
    else:
        take(machine).close()


# ---- a device that is opened

def test_dma_is_on_from_open_to_close(machine):
    path = machine.add(A)
    (path / "config").write_bytes(struct.pack("<HHH", 0x8086, 0x10FB, 0x4).ljust(256, b"\0"))  # a killed process's
    bus = take(machine)
    assert machine.command(A) == RUNNING and (path / "reset").read_text() == "1"
    bus.close()
    assert machine.command(A) == RUNNING & ~4
    bus.close()


def test_a_device_that_cannot_be_reset_on_its_own(machine):
    path = machine.add(A, reset=False)
    take(machine).close()
    assert not (path / "reset").exists()


def test_bars(machine):
    path = machine.add(A, bars=((0x20000, MEMORY), (0, 0), (32, PORTS)))
    bus = take(machine)
    assert bus.bar0.shape == (0x20000,) and bus.bar(2).array is None and bus.bar(2) is bus.bar(2)
    bus.write32(0x1FFFC, 0xCAFE0001)
    bus.bar(0).write(6, 2, 0xBEEF)
    bus.bar(0).write(9, 1, 0x42)
    bus.bar(2).write(18, 1, 7)
    bus.bar(2).write(4, 4, 0xDEADBEEF)
    assert bus.read32(0x1FFFC) == 0xCAFE0001 and bus.read32(4) == 0xBEEF0000 and bus.bar(0).read(9, 1) == 0x42
    assert bus.bar(2).read(18, 1) == 7 and bus.bar(2).read(6, 2) == 0xDEAD
    assert (path / "resource0").read_bytes()[:12].hex() == "000000000000efbe00420000"
    assert (path / "resource2").read_bytes()[4:20].hex() == "efbeadde" + "00" * 10 + "0700"
    with pytest.raises(IxyError, match="BAR 1 is not there; does the firmware give the card its resources"):
        bus.bar(1)
    bus.close()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("offset, width", [(-4, 4), (2, 4), (32, 4), (30, 4), (1, 2), (32, 1), (0, 8), (0, 3)])
def test_accesses_that_cannot_be(machine, index, offset, width):
    machine.add(A, bars=((32, MEMORY), (32, PORTS)))
    bus = take(machine)
    for access in (lambda: bus.bar(index).read(offset, width), lambda: bus.bar(index).write(offset, width, 0)):
        with pytest.raises(IxyError, match=f"{A}: .* of a BAR of 0x20: expected 1, 2 or 4 bytes, aligned and inside"):
            access()
    bus.close()


def test_a_closed_bar_is_plain_memory(machine):
    path = machine.add(A, bars=((0x1000, MEMORY), (32, PORTS)))
    bus = take(machine)
    doorbell, registers, ports = bus.bar0[:4], bus.bar(0), bus.bar(1)
    doorbell[:] = 1
    bus.close()
    doorbell[:] = 9  # a queue that somebody still holds: the device must not see it
    assert (path / "resource0").read_bytes()[:4] == b"\1\1\1\1"
    for bar in (registers, ports):
        with pytest.raises(ClosedError, match=f"{A} is closed; open it again"):
            bar.read(0, 4)
    for use in (lambda: bus.bar(0), bus.check, lambda: bus.write_config(4, 2, 0)):  # its files' numbers may be others'
        with pytest.raises(ClosedError, match=f"{A} is closed; open it again"):
            use()


def test_capabilities(machine):
    path = machine.add(A)
    space = bytearray((path / "config").read_bytes())
    space[6] = 0x10
    space[0x34] = 0x40
    space[0x40:0x42], space[0x50:0x52], space[0x60:0x62] = bytes((9, 0x50)), bytes((0x11, 0x63)), bytes((9, 0x40))
    (path / "config").write_bytes(space)
    bus = take(machine)
    assert bus.capabilities(pci.PCI_CAP_ID_VNDR) == [0x40, 0x60]  # and the list ends, although it is a ring
    assert bus.capabilities(pci.PCI_CAP_ID_MSIX) == [0x50]
    assert bus.capabilities(pci.PCI_CAP_ID_MSI) == []
    bus.write_config(6, 1, 0)
    assert bus.capabilities(pci.PCI_CAP_ID_VNDR) == []
    bus.close()


def test_sysfs_has_no_interrupts(machine):
    machine.add(A)
    bus = take(machine)
    with pytest.raises(IxyError, match="no interrupts this way; on PCI, bind the device to vfio-pci"):
        bus.enable_interrupts(1)
    bus.close()


# ---- a device that is gone, or is not what it seems

def test_a_device_that_is_gone_when_it_is_opened(machine):
    path = machine.add(A)
    (path / "config").write_bytes(b"\xff" * 256)
    assert "the device is gone (its configuration space reads all ones)" in refusal(machine, kind=DeviceGoneError)


def test_a_device_that_goes(machine):
    path = machine.add(A)
    bus = take(machine)
    bus.check()
    (path / "config").write_bytes(b"\xff" * 256)
    with pytest.raises(DeviceGoneError, match="the device is gone"):
        bus.check()
    bus.close()


def test_ports_of_a_device_that_the_kernel_has_removed(machine, monkeypatch):
    machine.add(A, bars=((32, PORTS),))
    bus = take(machine)
    ports = bus.bar(0)

    def refuse(*args):
        raise OSError(errno.ENODEV, "No such device")

    with monkeypatch.context() as patch:
        patch.setattr(pci.os, "pread", refuse)
        patch.setattr(pci.os, "pwrite", refuse)
        for use in (lambda: ports.read(0, 4), lambda: ports.write(0, 4, 0), bus.check):
            with pytest.raises(DeviceGoneError, match=rf"{A}: the device is gone \(No such device\); was it removed"):
                use()
    bus.close()


@pytest.fixture
def pinned(monkeypatch):
    """Ordinary memory serves as DMA memory, and lies at its IOVA."""
    monkeypatch.setattr(sysfs.SysfsBus, "memory_needs", PINNED)
    monkeypatch.setattr(sysfs, "physical_addresses", lambda array, size, pagemap: 4096 * np.arange(
        1, 1 + len(array) // size, dtype=np.uint64))


def test_registers_that_read_all_ones(machine, pinned):
    path = machine.add(A)
    (path / "resource0").write_bytes(b"\xff" * 0x20000)
    bus = take(machine)
    with pytest.raises(DeviceGoneError, match="CTRL and STATUS read all ones, the device is gone"):
        device_module._attach(bus, 1, 64, None)
    bus.close()


def test_a_bar_that_is_too_small(machine, pinned):
    for address, bar, size in ((A, (0x4000, MEMORY), "0x4000"), (B, (32, PORTS), "0x0")):
        machine.add(address, bars=(bar,))
        bus = take(machine, address)
        with pytest.raises(IxyError, match=f"BAR 0 has {size} bytes of registers, expected at least 0x20000"):
            device_module._attach(bus, 1, 64, None)
        bus.close()


def test_no_huge_pages(machine, monkeypatch):
    def refuse(*args, **more):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    machine.add(A)
    bus = take(machine)
    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    with pytest.raises(DmaError, match="free huge pages of 2 MiB needed, fewer are there; set them up: echo"):
        device_module._attach(bus, 1, 64, None)
    monkeypatch.undo()
    bus.close()


# ---- physical addresses

def pagemap(path, array, words, step):
    """A pagemap in which the pages of `array`, `step` apart, have these words."""
    with open(path, "wb") as file:
        for k, word in enumerate(words):
            file.seek((array.ctypes.data + k * step) // PAGE * 8)
            file.write(struct.pack("<Q", word))


@pytest.fixture
def dma(monkeypatch):
    """Four ordinary pages, also where there are huge ones."""
    monkeypatch.setattr(memory, "_map_huge", lambda *args: None)
    made = DmaMemory(4 * PAGE, PINNED)
    made.array[:] = 1
    yield made
    made.close()


def test_every_page_has_its_own_address(machine, dma):
    machine.add(A)
    bus = take(machine)
    present = 1 << 63 | 1 << 55  # and soft-dirty, which is none of the address
    pagemap(machine.root / "proc/self/pagemap", dma.array, [present | frame for frame in (9, 8, 5000, 1)], PAGE)
    addresses = bus.map_dma(dma)
    assert addresses.tolist() == [9 * PAGE, 8 * PAGE, 5000 * PAGE, PAGE] and addresses.dtype == np.uint64
    bus.unmap_dma(dma)
    bus.close()


@pytest.mark.parametrize("words, why", [([1 << 63] * 4, "hides physical addresses"),
                                        ([1 << 63 | 5, 5, 5, 5], "not in the machine's memory")])
def test_addresses_that_the_kernel_does_not_tell(machine, dma, words, why):
    machine.add(A)
    bus = take(machine)
    pagemap(machine.root / "proc/self/pagemap", dma.array, words, PAGE)
    with pytest.raises(DmaError, match=why):
        bus.map_dma(dma)
    bus.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read physical addresses")
def test_addresses_on_this_machine(dma):
    found = sysfs.physical_addresses(dma.array, PAGE)
    assert len(found) == dma.size // PAGE == len(set(found.tolist())) and not (found % np.uint64(PAGE)).any()


# ---- VFIO

def test_bound_to_vfio_pci_it_is_used_through_vfio(machine, kernel):
    file = kernel.bind(A, "7", node=0)
    bus = take(machine)
    assert isinstance(bus, vfio.VfioBus) and bus.memory_needs == PINNED and bus.numa_node == 0
    bus.write32(0x20, 0xABCD1234)
    with open(file, "rb") as regions:
        regions.seek(0x20)
        assert regions.read(4).hex() == "3412cdab"
        regions.seek(CONFIG_START + 4)
        assert struct.unpack("<H", regions.read(2))[0] == RUNNING
    order = [name for name, _ in kernel.calls]
    assert order.index("VFIO_GROUP_GET_STATUS") < order.index("VFIO_GROUP_SET_CONTAINER") < order.index(
        "VFIO_SET_IOMMU") < order.index("VFIO_GROUP_GET_DEVICE_FD") < order.index("VFIO_DEVICE_RESET")
    bus.close()
    with open(file, "rb") as regions:
        regions.seek(CONFIG_START + 4)
        assert struct.unpack("<H", regions.read(2))[0] == RUNNING & ~4


def test_regions_that_cannot_be_mapped_are_read_and_written(machine, kernel):
    kernel.bind(A, "7")
    kernel.mappable = False
    bus = take(machine)
    bus.write32(0x20, 0xABCD1234)
    assert bus.bar0 is None and bus.read32(0x20) == 0xABCD1234
    bus.close()


def test_devices_share_a_container_and_its_mappings(machine, kernel, dma):
    """Two functions of one group and one of another: one address space, so one address for all."""
    for address, group in ((A, "7"), (B, "7"), ("0000:04:00.0", "8")):
        kernel.bind(address, group)
    buses = [take(machine, address) for address in (A, B, "0000:04:00.0")]
    addresses = [bus.map_dma(dma) for bus in buses]
    assert {bus.container for bus in buses} == {buses[0].container}
    pages = dma.iova + np.arange(0, dma.size, dma.page_size)
    assert all((found == pages).all() and found.dtype == np.uint64 for found in addresses)
    assert kernel.mapped == {dma.iova: (dma.virtual_address, dma.size)}
    names = [name for name, _ in kernel.calls]
    assert names.count("VFIO_GROUP_GET_STATUS") == 2 and names.count("VFIO_SET_IOMMU") == 1
    for bus in buses:
        assert kernel.mapped
        bus.unmap_dma(dma)
        bus.close()
    assert not kernel.mapped


def test_a_group_that_cannot_join_gets_a_container_of_its_own(machine, kernel, dma):
    kernel.bind(A, "7")
    kernel.bind(B, "8")
    one = take(machine, A)
    kernel.full.add(one.container.descriptor)
    two = take(machine, B)
    assert one.container is not two.container
    one.close()
    two.close()


def test_addresses_that_the_iommu_does_not_reach(machine, kernel, dma):
    kernel.bind(A, "7")
    bus = take(machine)
    kernel.ranges = [(0, dma.iova + dma.size - 2)]
    with pytest.raises(DmaError, match=rf"the IOMMU does not reach {dma.iova:#x}, only 0x0 to "):
        bus.map_dma(dma)
    kernel.ranges = [(0, 5), (dma.iova, dma.iova + dma.size - 1)]
    bus.map_dma(dma)
    bus.unmap_dma(dma)
    kernel.ranges = []  # an old kernel does not tell
    bus.map_dma(dma)
    bus.unmap_dma(dma)
    bus.close()


@pytest.mark.parametrize("number, advice", [(errno.ENOMEM, r"; raise the limit of locked memory \(ulimit -l\)$"),
                                            (errno.EINVAL, "cannot be mapped: Invalid argument$")])
def test_memory_that_cannot_be_mapped(machine, kernel, dma, number, advice):
    kernel.bind(A, "7")
    bus = take(machine)
    kernel.map_error = number
    with pytest.raises(DmaError, match=advice):
        bus.map_dma(dma)
    bus.unmap_dma(dma)  # what failed may be undone
    bus.close()


def test_a_group_that_is_not_viable(machine, kernel):
    kernel.bind(A, "7")
    machine.add(B, driver="ixgbe", group="7")
    kernel.not_viable.add("7")
    assert refusal(machine) == (f"{A}: its IOMMU group 7 is not viable: the kernel drives others of it; bind these to "
                                f"vfio-pci as well, or unbind them: {B}")


@pytest.mark.parametrize("number, why", [
    (errno.EACCES, r"dev/vfio/7 may not be opened; as root: chown \d+ /"), (errno.EBUSY, "used by another process"),
    (errno.EIO, "Input/output error")])
def test_a_group_that_cannot_be_opened(machine, kernel, monkeypatch, number, why):
    kernel.bind(A, "7")

    def refuse(path, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(vfio.os, "open", refuse)
    with pytest.raises(IxyError, match=why):
        take(machine)


def test_vfio_that_is_not_loaded(machine, kernel):
    kernel.bind(A, "7")
    (machine.root / "dev/vfio/vfio").unlink()
    assert "dev/vfio/vfio is not there; load the module vfio-pci" in refusal(machine)


def test_vfio_without_an_iommu(machine, kernel):
    kernel.bind(A, "7")
    (machine.root / "dev/vfio/noiommu-7").write_text("")
    assert "bound to vfio-pci, but there is no IOMMU; turn it on" in refusal(machine)
    (machine.path(A) / "iommu_group").unlink()
    assert "bound to vfio-pci, but there is no IOMMU; turn it on" in refusal(machine)


@pytest.mark.parametrize("vectors, index", [({2: 3, 1: 1}, 2), ({2: 0, 1: 2}, 1)])
def test_interrupts_are_eventfds(machine, kernel, vectors, index):
    kernel.bind(A, "7")
    kernel.vectors = vectors
    bus = take(machine)
    events = bus.enable_interrupts(2)
    assert kernel.interrupts == {(index, 0): events[0], (index, 1): events[1]}
    os.eventfd_write(events[1], 3)
    assert os.eventfd_read(events[1]) == 3
    with pytest.raises(BlockingIOError):
        os.eventfd_read(events[0])
    bus.disable_interrupts()
    assert not kernel.interrupts
    with pytest.raises(OSError):
        os.fstat(events[0])
    bus.enable_interrupts(1)
    bus.close()


def test_more_interrupts_than_there_are(machine, kernel):
    kernel.bind(A, "7")
    bus = take(machine)
    with pytest.raises(IxyError, match="4 interrupts: expected at most 3; use fewer queues, or do without"):
        bus.enable_interrupts(4)
    bus.close()


def no_vectors(count):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("answer, why", [(lambda count: count - 1, "there are only 2"),
                                         (no_vectors, "No space left on device")])
def test_fewer_interrupts_than_the_device_says(machine, kernel, answer, why):
    kernel.bind(A, "7")
    kernel.set_irqs = answer
    bus = take(machine)
    with pytest.raises(IxyError, match=f"3 interrupts cannot be set up: {why}; use fewer queues, or do without"):
        bus.enable_interrupts(3)
    bus.close()
    assert not kernel.interrupts


def test_functions_of_the_machine(machine):
    machine.add(A, driver="ixgbe", group="7", bars=((0x20000, MEMORY), (0, 0), (32, PORTS)))
    machine.interface(A, "eth1")
    machine.add("0000:00:00.0", kind=0x060000)
    found, = pci.network_functions(machine.root)
    assert (found.address, found.driver, found.iommu_group, found.interfaces) == (A, "ixgbe", "7", ["eth1"])
    assert found.bars == {0: (0x20000, False), 2: (32, True)} and found.numa_node is None and found.use is None
    (machine.path(A) / "numa_node").unlink()
    assert Function(A, machine.root).numa_node is None
