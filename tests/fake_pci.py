"""A machine's PCI as files below a folder, and the kernel's side of VFIO for it: what the buses see of hardware."""

import errno
import os
import struct

from ixy_numba.bus import vfio

NIC, PORTS, MEMORY = 0x020000, 0x101, 0x200  # a class code; resource flags
CONFIG_START, BAR_SPACING = 1 << 24, 1 << 21  # regions in the fake device's file


class FakeMachine:
    """`root` is the folder that stands for /."""

    def __init__(self, root):
        self.root = root
        for folder in ("sys/bus/pci/devices", "sys/class/net", "proc/net", "proc/self", "dev/vfio"):
            (root / folder).mkdir(parents=True)
        self.routes()

    def routes(self, *lines, ipv6=()):
        """Routing tables: (interface, destination, mask) in hexadecimal; (destination, prefix, interface)."""
        rows = [f"{name}\t{destination}\t0\t1\t0\t0\t0\t{mask}\t0\t0\t0" for name, destination, mask in lines]
        (self.root / "proc/net/route").write_text("\n".join(["Iface\tDestination …", *rows]) + "\n")
        (self.root / "proc/net/ipv6_route").write_text("".join(
            f"{destination} {prefix} {'0' * 32} 00 {'0' * 32} 00000400 00000001 00000000 00000001 {name}\n"
            for destination, prefix, name in ipv6))

    def path(self, address):
        return self.root / "sys/bus/pci/devices" / address

    def add(self, address, *, ids=(0x8086, 0x10FB), kind=NIC, bars=((0x20000, MEMORY),), driver=None, group=None,
            node=-1, reset=True):
        """A function; its BARs are files of zeros. Returns its folder."""
        path = self.path(address)
        path.mkdir()
        for name, value in (("vendor", ids[0]), ("device", ids[1]), ("class", kind)):
            (path / name).write_text(f"{value:#06x}\n")
        (path / "numa_node").write_text(f"{node}\n")
        (path / "config").write_bytes(struct.pack("<HHH", *ids, 0).ljust(256, b"\0"))
        if reset:
            (path / "reset").write_text("")
        lines = []
        for index, (size, flags) in enumerate(bars):
            lines.append(f"{0xF0000000:#018x} {0xF0000000 + size - 1:#018x} {flags:#018x}" if size else
                         " ".join([f"{0:#018x}"] * 3))
            (path / f"resource{index}").write_bytes(bytes(size))
        (path / "resource").write_text("\n".join(lines) + "\n")
        if driver:
            home = self.root / "sys/bus/pci/drivers" / driver
            home.mkdir(parents=True, exist_ok=True)
            (path / "driver").symlink_to(home)
            (home / "unbind").write_text("")
        if group is not None:
            home = self.root / "sys/kernel/iommu_groups" / group
            (home / "devices" / address).mkdir(parents=True)
            (home / "type").write_text("DMA-FQ\n")
            (path / "iommu_group").symlink_to(home)
        return path

    def interface(self, address, name, up=False, below=""):
        folder = self.path(address) / below / "net" / name
        folder.mkdir(parents=True)
        (self.root / "sys/class/net" / name).mkdir()
        (self.root / "sys/class/net" / name / "flags").write_text(f"{0x1002 | up:#x}\n")

    def command(self, address):
        """The command register in configuration space."""
        return struct.unpack_from("<H", (self.path(address) / "config").read_bytes(), 4)[0]


class FakeVfio:
    """What the kernel answers to VFIO's requests: stands in for `fcntl.ioctl`. One file a device holds its regions."""

    def __init__(self, machine):
        self.machine, self.calls = machine, []
        self.not_viable, self.full, self.map_error = set(), set(), None
        self.ranges, self.mapped, self.vectors = [(0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)], {}, {2: 3, 1: 1}
        self.mappable, self.interrupts, self.devices = True, {}, []
        self.set_irqs = lambda count: 0  # what VFIO_DEVICE_SET_IRQS comes to where vectors are asked for
        (machine.root / "dev/vfio/vfio").write_text("")

    def bind(self, address, group, **more):
        path = self.machine.add(address, driver="vfio-pci", group=group, **more)
        (self.machine.root / "dev/vfio" / group).write_text("")
        file = path / "device-file"
        with open(file, "wb") as regions:
            regs = (path / "config").read_bytes()
            regions.truncate(CONFIG_START + len(regs))
            regions.seek(CONFIG_START)
            regions.write(regs)
        return file

    def ioctl(self, descriptor, request, argument=0, mutate=False):
        where = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        name = next(name for name, value in vars(vfio).items() if name.startswith("VFIO_") and value == request
                    and value > 0x3B00)
        self.calls.append((name, where))
        return getattr(self, name)(descriptor, argument) or 0

    def VFIO_GET_API_VERSION(self, descriptor, argument):
        return 0

    def VFIO_CHECK_EXTENSION(self, descriptor, extension):
        return extension == 3

    def VFIO_SET_IOMMU(self, descriptor, kind):
        assert kind == 3

    def VFIO_GROUP_GET_STATUS(self, descriptor, argument):
        group = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        struct.pack_into("=I", argument, 4, group not in self.not_viable)

    def VFIO_GROUP_SET_CONTAINER(self, descriptor, argument):
        container, = struct.unpack("i", argument)
        if container in self.full:
            raise OSError(errno.EINVAL, "Invalid argument")

    def VFIO_GROUP_GET_DEVICE_FD(self, descriptor, argument):
        address = bytes(argument[:-1]).decode()
        assert argument[-1] == 0
        self.devices.append(os.open(self.machine.path(address) / "device-file", os.O_RDWR))
        return self.devices[-1]

    def VFIO_DEVICE_GET_INFO(self, descriptor, argument):
        struct.pack_into("=IIII", argument, 4, 3, 9, 5, 0)

    def VFIO_DEVICE_GET_REGION_INFO(self, descriptor, argument):
        index, = struct.unpack_from("=I", argument, 8)
        folder = os.path.dirname(os.readlink(f"/proc/self/fd/{descriptor}"))
        bar = os.path.join(folder, f"resource{index}")
        size = os.path.getsize(bar) if os.path.exists(bar) else 0
        start = index * BAR_SPACING
        if index == vfio.VFIO_PCI_CONFIG_REGION_INDEX:
            size, start = 256, CONFIG_START
        struct.pack_into("=IIIQQ", argument, 4, 3 | 4 * self.mappable, index, 0, size, start)

    def VFIO_DEVICE_GET_IRQ_INFO(self, descriptor, argument):
        index, = struct.unpack_from("=I", argument, 8)
        struct.pack_into("=I", argument, 12, self.vectors.get(index, 0))

    def VFIO_DEVICE_SET_IRQS(self, descriptor, argument):
        flags, index, first, count = struct.unpack_from("=IIII", argument, 4)
        if flags == 1 | 32 and not count:
            self.interrupts.clear()
            return None
        assert flags == 4 | 32
        if available := self.set_irqs(count):
            return available
        events = struct.unpack_from(f"={count}i", argument, 20)
        self.interrupts.update({(index, first + k): event for k, event in enumerate(events)})
        return None

    def VFIO_DEVICE_RESET(self, descriptor, argument):
        pass

    def VFIO_IOMMU_GET_INFO(self, descriptor, info):
        other = struct.pack("=HHI8x", 3, 1, 24 + 16)  # a capability that nobody asks for, in front
        ranges = struct.pack("=HHIII", 1, 1, 0, len(self.ranges), 0)
        ranges += b"".join(struct.pack("=QQ", *one) for one in self.ranges)
        struct.pack_into("=IIQII", info, 0, len(info), 3, 0x1000, 24, 0)
        info[24 : 24 + len(other) + len(ranges)] = other + ranges

    def VFIO_IOMMU_MAP_DMA(self, descriptor, argument):
        size, flags, virtual, iova, length = struct.unpack("=IIQQQ", argument)
        if self.map_error:
            raise OSError(self.map_error, os.strerror(self.map_error))
        assert size == 32 and flags == 3 and iova not in self.mapped
        self.mapped[iova] = virtual, length

    def VFIO_IOMMU_UNMAP_DMA(self, descriptor, argument):
        size, flags, iova, length = struct.unpack("=IIQQ", argument)
        assert size == 24 and flags == 0 and self.mapped.pop(iova)[1] == length
