"""The simulated 82599 behind vfio-user: configuration space, DMA map, interrupts, and clients that misbehave."""

import errno
import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sim_rig import DD, ENABLE, EOP, MAC, TX_RS, TX_WHOLE, frame
from vfio_user_client import (
    BAR0,
    CONFIG,
    DISABLE,
    DMA_MAP,
    DMA_UNMAP,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    HEADER,
    INTX,
    MSI,
    MSIX,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    UNMASK_NONE,
    VERSION,
    Client,
    Memory,
    Refused,
    fired,
)

from ixy_numba.bus import parse_options
from ixy_numba.core.errors import IxyError
from ixy_numba.sim import SimBus
from ixy_numba.sim.spec import parse
from ixy_numba.sim.vfio_user import PATIENCE_S, Server

STATUS, CTRL, EICS, EIMS, GPIE, IVAR, EIAC = 0x8, 0x0, 0x808, 0x880, 0x898, 0x900, 0x810
IOVA = 0x1_0000_0000
RX_RING, TX_RING, RX_DATA, TX_DATA = 0, 0x1000, 0x10000, 0x8000


class Served:
    """A device behind a socket, stepped by the test."""

    def __init__(self, folder, text="", name="nic", **more):
        self.path = folder / name
        options = parse_options(text, text)
        self.bus = SimBus(str(self.path), parse(text, {"mac": MAC.hex(":"), **options}), manual=True)
        self.server = Server(str(self.path), self.bus, **more)

    def close(self):
        self.server.close()
        self.bus.close()

    @property
    def faults(self):
        return self.bus.summary()["dma_faults"]


@pytest.fixture
def served(tmp_path, capfd):  # set up before it, so that stderr is there until the server has ended
    served = Served(tmp_path, "frames=5")
    yield served
    served.close()


@pytest.fixture
def client(served):
    with Client(served.path) as client:
        yield client


@pytest.fixture
def memory():
    memory = Memory(1 << 18, IOVA)
    yield memory
    memory.close()


def bring_up(client, memory, map_it=True):
    """Rings of 8 descriptors on queue 0 of each direction, by hand."""
    if map_it:
        client.map(memory)
    client.set_command(6)
    for k in range(8):
        memory.words[RX_RING // 8 + 2 * k] = IOVA + RX_DATA + 2048 * k
        memory.words[RX_RING // 8 + 2 * k + 1] = 0
    for block, ring in ((0x1000, RX_RING), (0x6000, TX_RING)):
        for offset, value in ((0, (IOVA + ring) & 0xFFFFFFFF), (4, IOVA >> 32), (8, 128), (0x28, ENABLE)):
            client.write32(block + offset, value)
    client.write32(0x1014, 2 | 1 << 25)  # SRRCTL: 2 KiB buffers, advanced descriptors
    client.write32(0x5080, 0x700)
    client.write32(0x3000, 1)
    client.write32(0x4A80, 1)
    client.write32(0x1018, 7)
    assert client.read32(0x1028) & ENABLE  # what was posted is done


def words_of(data):
    return struct.unpack(f"<{len(data) // 4}I", data)


# What the device is


def test_it_says_what_it_is(client):
    assert words_of(client.request(GET_INFO, bytes(16)))[1:] == (3, 9, 5)
    sizes = {}
    for index in range(9):
        reply = client.request(GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        _, flags, _, _, size, _ = struct.unpack("<IIIIQQ", reply)
        if size:
            assert flags == 3
            sizes[index] = size
    assert sizes == {0: 0x20000, 2: 32, 4: 0x4000, 7: 4096}
    counts = [words_of(client.request(GET_IRQ_INFO, struct.pack("<IIII", 16, 0, k, 0)))[1::2] for k in range(5)]
    assert counts == [(7, 1), (1, 1), (1, 64), (1, 1), (0, 0)]


def test_what_it_cannot_do_is_refused_and_nothing_else_happens(client):
    for command in (6, 11, 12, 15, 16, 99):
        with pytest.raises(Refused, match="95"):
            client.request(command, bytes(64))
    with pytest.raises(Refused, match="22"):
        client.request(GET_REGION_INFO, struct.pack("<III", 32, 0, 9))
    with pytest.raises(Refused, match="22"):
        client.request(SET_IRQS, struct.pack("<IIIII", 20, DISABLE, MSIX, 60, 5))
    assert client.read32(STATUS) == 1 << 19 | 1 << 7


@pytest.mark.parametrize("device", ["10fb", "10f7", "1528"])
def test_configuration_space(tmp_path, device):
    served = Served(tmp_path, f"device={device}")
    with Client(served.path) as client:
        config = client.read(CONFIG, 0, 4096)
        assert struct.unpack_from("<HH", config) == (0x8086, int(device, 16))
        assert config[9:12] == b"\0\0\2"  # class: Ethernet
        at, chain = config[0x34], []
        while at:
            chain.append((config[at], at))
            at = config[at + 1]
        assert chain == [(1, 0x40), (5, 0x50), (0x11, 0x70), (0x10, 0xA0)]  # PM, MSI, MSI-X, PCI Express
        assert struct.unpack_from("<HII", config, 0x72) == (63, 4, 0x2004)
        assert config[0x30:0x34] == bytes(4)  # no expansion ROM
        for bar, size in ((0x10, 0x20000), (0x20, 0x4000)):
            client.write(CONFIG, bar, b"\xff" * 8)
            assert -int.from_bytes(client.read(CONFIG, bar, 8), "little") + 0xC & (1 << 64) - 1 == size
        client.write(CONFIG, 0, b"\xff" * 4)
        assert client.read(CONFIG, 0, 4) == config[:4]
    served.close()


def test_registers_of_every_access_size(client):
    client.write32(0xA200, 0x44332211)
    assert client.read(BAR0, 0xA200, 1) == b"\x11" and client.read(BAR0, 0xA203, 1) == b"\x44"
    assert client.read(BAR0, 0xA201, 2) == b"\x22\x33"
    client.write(BAR0, 0xA208, bytes(range(8)))
    assert client.read(BAR0, 0xA208, 8) == bytes(range(8))
    client.write(BAR0, 0xA208, b"\xff")  # the hardware knows only whole registers
    assert client.read(BAR0, 0xA208, 8) == bytes(range(8))


def test_the_window_of_bar_2_reaches_all_registers(client):
    client.write(2, 0, struct.pack("<I", 0xA200))
    client.write(2, 4, struct.pack("<I", 0x12345678))
    assert client.read32(0xA200) == 0x12345678
    assert client.read(2, 4, 4) == struct.pack("<I", 0x12345678)
    client.write(2, 0, struct.pack("<I", 0xFFFFFFF0))
    assert client.read(2, 4, 4) == bytes(4)


# DMA


def send(client, memory, data, index=0):
    memory.put(TX_DATA, data)
    memory.words[TX_RING // 8 + 2 * index] = IOVA + TX_DATA
    memory.words[TX_RING // 8 + 2 * index + 1] = TX_WHOLE | TX_RS | len(data) | len(data) << 46
    client.write32(0x6018, index + 1)
    assert client.read32(0x6018) == index + 1


def test_frames_go_both_ways_through_the_clients_memory(served, client, memory):
    bring_up(client, memory)
    served.bus.step()
    for k in range(5):
        word = int(memory.words[RX_RING // 8 + 2 * k + 1])
        assert word & (DD | EOP) == DD | EOP and word >> 32 & 0xFFFF == 60
        assert memory.array[RX_DATA + 2048 * k :][:6].tobytes() == MAC
    send(client, memory, frame(100))
    served.bus.step()
    assert int(memory.words[TX_RING // 8 + 1]) >> 32 & DD
    assert served.bus.summary()["sent"] == 1 and served.faults == 0
    assert client.read32(0x6010) == 1 and client.read32(0x1010) == 5


def test_nothing_is_reached_outside_the_map(served, client, memory):
    bring_up(client, memory)
    memory.words[RX_RING // 8] = IOVA + memory.size - 59  # one byte too far
    memory.words[RX_RING // 8 + 2] = 0xDEAD0000
    served.bus.step()
    assert served.faults == 2
    client.unmap(memory)
    before = memory.array.copy()
    memory.words[TX_RING // 8 + 1] = TX_WHOLE | TX_RS | 60
    client.write32(0x6018, 1)
    assert client.read32(0x6018) == 1
    served.bus.step()
    assert served.faults == 3
    assert (memory.array[RX_DATA:] == before[RX_DATA:]).all()


def test_nothing_moves_while_bus_mastering_is_off(served, client, memory):
    bring_up(client, memory)
    client.set_command(2)
    assert served.bus.step() == 0
    client.set_command(6)
    assert served.bus.step() == 5


@pytest.mark.parametrize("reset", [
    lambda client: client.write(CONFIG, 0xA8, struct.pack("<H", 1 << 15)), lambda client: client.request(RESET)])
def test_a_function_reset_stops_everything_and_keeps_the_map(served, client, memory, reset):
    bring_up(client, memory)
    reset(client)
    assert client.read32(0x1028) & ENABLE == 0 and client.read32(0x3000) == 0
    assert client.read(CONFIG, 4, 2) == bytes(2) and client.read(CONFIG, 0xA8, 2) == b"\x10\x28"
    assert served.bus.step() == 0
    bring_up(client, memory, map_it=False)
    assert served.bus.step() == 5 and served.faults == 0


def test_regions_come_and_go(served, client):
    regions = [Memory(0x2000, IOVA + 0x2000 * k) for k in range(4)]
    for region in regions:
        client.map(region)
    assert served.bus.model.state.mappings == 4
    client.request(DMA_UNMAP, struct.pack("<IIQQ", 24, 0, IOVA + 0x2000, 0x4000))  # two at once
    assert served.bus.model.state.mappings == 2
    client.request(DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 0))
    assert served.bus.model.state.mappings == 0
    for region in regions:
        region.close()


def test_regions_keep_no_file_open_and_are_unmapped_when_taken_back(served, client, memory):
    def mapped():
        with open("/proc/self/maps") as lines:
            return sum("memfd:guest" in line for line in lines)

    files, before = open_files(), mapped()
    for k in range(100):
        client.request(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, k << 16, 0x1000), [memory.file])
    assert served.bus.model.state.mappings == 100
    assert open_files() <= files and mapped() == before + 100
    client.request(DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0, 50 << 16))
    assert mapped() == before + 50
    client.request(DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 0))
    assert mapped() == before


def test_regions_without_a_file_or_without_write_access_are_not_reached(served, client, memory):
    client.request(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0xC0000, 0x20000))
    client.map(memory, flags=1)
    assert served.bus.model.state.mappings == 0
    client.unmap(memory)
    client.map(memory)
    assert served.bus.model.state.mappings == 1


def test_the_queues_registers_can_be_mapped(tmp_path, memory):
    served = Served(tmp_path, "frames=5", map_rings=True)
    with Client(served.path) as client:
        ask = struct.pack("<IIIIQQ", 80, 0, 0, 0, 0, 0)
        client.send(GET_REGION_INFO, ask)
        reply, (file,) = client.receive()
        assert struct.unpack_from("<IIIIQQ", reply) == (80, 3 | 4 | 8, 0, 32, 0x20000, 0)
        assert struct.unpack_from("<HHIIIQQQQ", reply, 32) == (1, 1, 0, 2, 0, 0x1000, 0x1000, 0x6000, 0x1000)
        bring_up(client, memory)
        for block in (0x1000, 0x6000):
            client.write32(block + 0x28, 0)
        assert client.read32(0x6028) == 0  # what was posted is done
        pages = [np.frombuffer(mmap.mmap(file, 0x1000, offset=offset), "<u4") for offset in (0x1000, 0x6000)]
        for page in pages:
            page[0x28 // 4] = ENABLE
        pages[0][0x18 // 4] = 7
        assert served.bus.step() == 0 and served.bus.step() == 5  # it has to look first
        assert pages[0][0x10 // 4] == 5  # RDH
        memory.put(TX_DATA, frame(60))
        memory.words[TX_RING // 8] = IOVA + TX_DATA
        memory.words[TX_RING // 8 + 1] = TX_WHOLE | TX_RS | 60
        pages[1][0x18 // 4] = 1
        assert served.bus.step() == 1 and served.bus.summary()["sent"] == 1
        pages[1][0x28 // 4] = 0
        pages[1][0x18 // 4] = 2
        assert served.bus.step() == 0 == served.bus.step() and served.bus.summary()["sent"] == 1
        os.close(file)
    served.close()


def test_the_mapped_registers_cannot_be_cut_off(tmp_path):
    served = Served(tmp_path, map_rings=True)
    with Client(served.path) as client:
        client.send(GET_REGION_INFO, struct.pack("<IIIIQQ", 80, 0, 0, 0, 0, 0))
        _, (file,) = client.receive()
        for size in (0x40000, 0):  # to cut it off would end this process
            with pytest.raises(PermissionError):
                os.ftruncate(file, size)
        os.close(file)
        assert client.read32(STATUS) == 1 << 19 | 1 << 7
    served.close()


def test_the_device_is_off_once_its_client_has_gone(served, memory):
    with Client(served.path) as client:
        bring_up(client, memory)
    with Client(served.path) as client:
        assert served.bus.model.state.mappings == 0 and client.read32(0x1028) & ENABLE == 0
        assert served.bus.step() == 0
        bring_up(client, memory)
        assert served.bus.step() == 5


# Interrupts


def test_each_queue_raises_its_vector(served, client, memory):
    files = client.interrupts(MSIX, 3)
    bring_up(client, memory)
    client.write32(GPIE, 1 << 4)
    client.write32(EIAC, 0xFFFF)
    client.write32(IVAR, 0x80 | 2 | (0x80 | 1) << 8)  # receive: vector 2, transmit: vector 1
    client.write32(EIMS, 0x7)
    send(client, memory, frame(60))
    served.bus.step()
    assert [fired(one) for one in files] == [0, 1, 1]
    served.bus.step()
    assert [fired(one) for one in files] == [0, 0, 0]


def test_no_message_without_bus_mastering(client):
    (file,) = client.interrupts(MSIX, 1)
    client.write32(GPIE, 1 << 4)
    client.write32(EIMS, 1)
    client.write32(EICS, 1)
    assert client.read32(EIMS) == 1 and fired(file) == 0


def test_a_vector_without_an_eventfd_keeps_its_message_until_it_has_one(client):
    client.set_command(4)
    client.interrupts(MSIX, 1)
    client.write32(GPIE, 1 << 4)
    client.write32(EIMS, 3)
    client.write32(EICS, 2)
    files = client.interrupts(MSIX, 2)
    assert [fired(one) for one in files] == [0, 1]


def test_msi(client):
    (file,) = client.interrupts(MSI, 1)
    client.set_command(4)
    client.write32(EIMS, 1)
    client.write32(EICS, 1)
    client.read32(EIMS)
    assert fired(file) == 1
    client.request(SET_IRQS, struct.pack("<IIIII", 20, DISABLE, MSI, 0, 0))
    client.read32(0x800)
    client.write32(EICS, 1)
    client.read32(EIMS)
    assert fired(file) == 0


def test_the_pin_fires_again_when_it_is_unmasked_and_still_driven(client):
    (file,) = client.interrupts(INTX, 1)
    unmask = struct.pack("<IIIII", 20, UNMASK_NONE, INTX, 0, 1)
    client.write32(EIMS, 3)
    client.write32(EICS, 1)
    client.write32(EICS, 2)
    client.read32(EIMS)
    assert fired(file) == 1
    client.request(SET_IRQS, unmask)
    assert fired(file) == 1
    client.read32(0x800)  # EICR: nobody drives it any more
    client.request(SET_IRQS, unmask)
    assert fired(file) == 0
    client.set_command(1 << 10)  # interrupt disable
    client.write32(EICS, 1)
    client.read32(EIMS)
    assert fired(file) == 0


def test_the_pin_fires_once_it_is_enabled_again_and_the_status_shows_it_all_along(client):
    def status():
        return client.read(CONFIG, 6, 1)[0] & 1 << 3

    (file,) = client.interrupts(INTX, 1)
    client.write32(EIMS, 1)
    client.set_command(1 << 10)  # interrupt disable
    assert not status()
    client.write32(EICS, 1)
    assert status() and fired(file) == 0
    client.set_command(0)
    assert status() and fired(file) == 1
    client.set_command(1 << 10)
    client.set_command(0)
    assert fired(file) == 0  # masked since it fired
    client.read32(0x800)  # EICR: nobody drives it any more
    assert not status()


def test_a_client_can_raise_a_vector_itself(client):
    files = client.interrupts(MSIX, 3)
    client.request(SET_IRQS, struct.pack("<IIIII3B", 23, 2 | 0x20, MSIX, 0, 3, 1, 0, 1))
    assert [fired(one) for one in files] == [1, 0, 1]


def test_an_eventfd_that_nobody_reads_does_not_stop_the_device(client):
    file = os.eventfd(0)  # blocking
    os.write(file, ((1 << 64) - 2).to_bytes(8, "little"))
    client.request(SET_IRQS, struct.pack("<IIIII", 20, 0x24, MSI, 0, 1), [file])
    client.set_command(4)
    client.write32(EIMS, 1)
    client.write32(EICS, 1)
    assert client.read32(EIMS) == 1


# Clients that misbehave: one line each, and the next client finds a device in order


def header(command, size, flags=0):
    return HEADER.pack(1, command, size, flags, 0)


def request(command, payload):
    return header(command, 16 + len(payload)) + payload


BAD = {
    "garbage": (b"GET / HTTP/1.1\r\n\r\n", "expected a request of"),
    "shorter than its header": (header(GET_INFO, 15), "message of 15 bytes"),
    "oversized": (header(REGION_WRITE, 1 << 31), "message of 2147483648 bytes"),
    "a reply": (header(GET_INFO, 16, 1), "flags 0x1"),
    "half a header": (header(GET_INFO, 16)[:7], "ends after 7 of 16"),
    "half a message": (header(REGION_READ, 32) + b"12345", "ends after 5 of 16"),
    "too short for its command": (request(DMA_MAP, b"1234"), "command 2 with only 4 bytes"),
    "no data to write": (request(REGION_WRITE, struct.pack("<QII", 0, 0, 8) + b"1"), "a write of 8 bytes with only 1"),
    "a read beyond a region": (request(REGION_READ, struct.pack("<QII", 0x1FFFE, 0, 4)), "access of 4 bytes at"),
    "a read of nothing": (request(REGION_READ, struct.pack("<QII", 0, 0, 0)), "access of 0 bytes"),
    "a huge read": (request(REGION_READ, struct.pack("<QII", 0, 0, 1 << 30)), "access of 1073741824 bytes"),
    "an offset that wraps": (request(REGION_READ, struct.pack("<QII", (1 << 64) - 2, 0, 4)), "access of 4 bytes at"),
    "a region that is none": (request(REGION_READ, struct.pack("<QII", 0, 1, 4)), "of region 1, which has 0"),
    "an empty mapping": (request(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 0)), "DMA region of 0 bytes"),
    "a mapping that wraps": (request(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, (1 << 64) - 1, 2)), "reaches 2**64"),
    "a mapping up to the end": (request(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, (1 << 64) - 1, 1)), "reaches 2**64"),
}


def hangs_up(client):
    try:
        while client.stream.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("name", BAD)
def test_a_bad_message_ends_the_connection_with_one_line(served, capfd, name):
    message, line = BAD[name]
    with Client(served.path) as client:
        client.stream.sendall(message)
        if name.startswith("half"):
            client.stream.shutdown(socket.SHUT_WR)
        assert hangs_up(client)
    with Client(served.path) as client:
        assert client.read32(STATUS) == 1 << 19 | 1 << 7
    served.server.close()  # its thread prints until then
    ended = [text for text in capfd.readouterr().err.splitlines() if "connection ended" in text]
    assert len(ended) == 1 and line in ended[0] and str(served.path) in ended[0]


def test_a_client_that_says_nothing_first_but_the_version_may_go_on(served):
    with Client(served.path, greet=False) as client:
        client.send(GET_INFO, bytes(16))
        assert hangs_up(client)
    with Client(served.path, greet=False) as client:
        client.send(VERSION, struct.pack("<HH", 7, 0))
        assert hangs_up(client)


def test_a_message_that_stops_half_way_is_waited_for_but_not_for_ever(served, capfd, monkeypatch):
    monkeypatch.setattr("ixy_numba.sim.vfio_user.PATIENCE_S", 1)
    with Client(served.path) as client:
        client.stream.sendall(header(GET_INFO, 32))
        assert hangs_up(client)
    assert "stops after 0 of 16 bytes" in capfd.readouterr().err
    assert PATIENCE_S >= 1


def test_a_client_that_never_reads_loses_its_connection(served, monkeypatch):
    monkeypatch.setattr("ixy_numba.sim.vfio_user.PATIENCE_S", 1)
    with Client(served.path) as client:
        with pytest.raises(OSError):
            for _ in range(10000):
                client.send(REGION_READ, struct.pack("<QII", 0, CONFIG, 4096))
    with Client(served.path) as client:
        assert client.read32(STATUS)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_file_descriptors_are_counted_checked_and_never_kept(served, capfd):
    before = open_files()
    null = os.open("/dev/null", os.O_RDWR)
    region = Memory(0x1000, IOVA, sealed=False)
    mapping, irq = struct.pack("<IIQQQ", 32, 3, 0, IOVA, 0x1000), struct.pack("<IIIII", 20, 0x24, MSIX, 0, 1)
    longer = struct.pack("<IIQQQ", 32, 3, 0x1000, IOVA, 0x1000)
    for command, payload, files, line in (
            (GET_INFO, bytes(16), [null] * 17, "more than 16 file descriptors"),
            (DMA_MAP, mapping, [null], "of a file of 0"), (DMA_MAP, mapping, [region.file], "could shrink"),
            (DMA_MAP, longer, [region.file], "of a file of 4096"), (SET_IRQS, irq, [null], "is no eventfd")):
        with Client(served.path) as client:
            client.send(command, payload, files)
            assert hangs_up(client)
        with Client(served.path) as client:
            client.read32(STATUS)
        assert line in capfd.readouterr().err
    with Client(served.path) as client:
        for _ in range(3):
            client.send(GET_INFO, bytes(16), [null] * 16)
            client.receive()
            for one in client.interrupts(MSIX, 8):
                os.close(one)
        client.read32(STATUS)
    os.close(null)
    region.close()
    del region  # its mapping has a descriptor of its own
    with Client(served.path):  # the last one has been dealt with
        pass
    deadline = time.monotonic() + 10
    while open_files() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_files() == before


def waits_for(capfd, line):
    """What went to stderr up to `line`, which is to come soon."""
    text, deadline = "", time.monotonic() + 30
    while line not in text:
        assert time.monotonic() < deadline, text
        time.sleep(0.01)
        text += capfd.readouterr().err
    return text


def test_a_fault_of_the_server_ends_one_connection_with_one_line(served, capfd, monkeypatch):
    with Client(served.path) as client, monkeypatch.context() as patch:
        patch.setattr(served.bus.model, "read", lambda offset: 1 // 0)
        client.send(REGION_READ, struct.pack("<QII", STATUS, BAR0, 4))
        assert hangs_up(client)
    text = waits_for(capfd, "internal error")
    assert "ZeroDivisionError" in text and "Traceback" not in text
    with Client(served.path) as client:
        assert client.read32(STATUS) == 1 << 19 | 1 << 7


def test_a_lack_of_file_descriptors_does_not_end_the_service(served, capfd, monkeypatch):
    monkeypatch.setattr("ixy_numba.sim.vfio_user.RETRY_S", 0.1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Client(served.path):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert os.strerror(errno.EMFILE) in waits_for(capfd, "trying again")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with Client(served.path) as client:
        assert client.read32(STATUS) == 1 << 19 | 1 << 7


def test_a_region_cannot_be_mapped_twice_nor_taken_back_in_part(served, memory):
    for bad in (lambda client: client.send(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, IOVA + 0x1000, 0x1000),
                                           [memory.file]),
                lambda client: client.send(DMA_UNMAP, struct.pack("<IIQQ", 24, 0, IOVA, 0x1000))):
        with Client(served.path) as client:
            client.map(memory)
            bad(client)
            assert hangs_up(client)


def test_the_number_of_regions_is_limited(served, capfd):
    with Client(served.path) as client:
        for k in range(1024):
            client.request(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, k << 12, 0x1000))
        client.send(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 1 << 40, 0x1000))
        assert hangs_up(client)
    with Client(served.path):
        assert "more than 1024 DMA regions" in capfd.readouterr().err


COMMANDS = st.tuples(st.integers(0, 17), st.binary(max_size=64), st.sampled_from((0, 0x10, 1, 0x20)),
                     st.integers(-3, 3), st.integers(0, 2))
NUMBER = st.one_of(st.integers(0, 64), st.sampled_from([0xA8, 0x1000, 0x1018, 0x1028, 0x6018, 0x1FFFC, 0x20000, IOVA]),
                   st.integers(0, (1 << 64) - 1))


@settings(max_examples=60)
@given(st.lists(st.one_of(COMMANDS, st.tuples(
    st.sampled_from([DMA_MAP, DMA_UNMAP, SET_IRQS, REGION_READ, REGION_WRITE]),
    st.lists(NUMBER, min_size=3, max_size=5).map(lambda ns: struct.pack(f"<{len(ns)}Q", *ns)),
    st.just(0x10), st.just(0), st.integers(0, 1))), min_size=1, max_size=12))
@example([(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 0x1000), 0, 0, 1)])
def test_no_sequence_of_messages_stops_the_server(tmp_path_factory, messages):
    served = _fuzzed(tmp_path_factory)
    null = os.open("/dev/zero", os.O_RDWR)
    try:
        with Client(served.path) as client:
            for command, payload, flags, off_by, files in messages:
                data = HEADER.pack(0, command, max(0, 16 + len(payload) + off_by), flags, 0) + payload
                if files:
                    socket.send_fds(client.stream, [data], [null] * files)
                else:
                    client.stream.sendall(data)
            client.stream.shutdown(socket.SHUT_WR)
            hangs_up(client)
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        os.close(null)
    with Client(served.path) as client:
        assert client.read32(STATUS) == 1 << 19 | 1 << 7
    assert served.bus.model.state.mappings == 0


_FUZZED = []


def _fuzzed(factory):
    if not _FUZZED:
        _FUZZED.append(Served(factory.mktemp("fuzz")))
    return _FUZZED[0]


# The program


@pytest.fixture
def run_sim(tmp_path):
    running = []

    def start(*arguments):
        process = subprocess.Popen([sys.executable, "-m", "ixy_numba.sim", *map(str, arguments)], cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_two_linked_devices_in_one_program(run_sim, tmp_path, memory):
    process = run_sim("--listen", "a", "--wire", "link=b,mac=02:00:00:00:00:0a", "--trace", "a.trace",
                      "--listen", "b", "--device", "10f7", "--wire", "mac=02:00:00:00:00:01")
    assert [process.stdout.readline() for _ in range(2)] == ["listening at a\n", "listening at b\n"]
    other = Memory(1 << 18, IOVA)
    with Client(tmp_path / "a") as a, Client(tmp_path / "b") as b:
        assert a.read(CONFIG, 2, 2) == b"\xfb\x10" and b.read(CONFIG, 2, 2) == b"\xf7\x10"
        files = b.interrupts(MSIX, 1)
        for client, mine in ((a, memory), (b, other)):
            bring_up(client, mine)
        b.write32(GPIE, 1 << 4)
        b.write32(IVAR, 0x80)
        b.write32(EIMS, 1)
        assert b.read32(EIMS) == 1
        send(a, memory, frame(60))
        assert fired(files[0], timeout_s=30) == 1
        assert other.array[RX_DATA : RX_DATA + 60].tobytes() == frame(60)
    other.close()
    process.terminate()
    assert process.wait(30) == 0
    assert "connection ended" not in process.stderr.read()
    lines = [line.split() for line in (tmp_path / "a.trace").read_text().splitlines()]
    assert lines[0][1:] == ["W", "01000", "RDBAL[0]", "00000000"]
    assert ["W", "06018", "TDT[0]", "00000001"] in [line[1:] for line in lines]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--device", "10fb"], "expected --listen SOCK before it"), ([], "--listen"),
    (["--listen", "a", "--device", "xyz"], "expected a hexadecimal number"),
    (["--listen", "a", "--wire", "link=b"], "expected the SOCK of another --listen"),
    (["--listen", "a", "--wire", "speed=1"], "unknown key 'speed'"),
    (["--listen", "a", "--wire", "gen"], "expected KEY=VALUE"),
    (["--listen", "a", "--wire", "link=b", "--listen", "b", "--wire", "link=c", "--listen", "c"],
     "is linked to another device already"),
    (["--listen", "no/such/folder/a"], "cannot listen there")])
def test_wrong_arguments_are_one_line(run_sim, arguments, message):
    process = run_sim(*arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == (1 if "cannot listen" in message else 2) and message in err
    assert "Traceback" not in err


def test_a_socket_in_use_is_refused_and_one_left_behind_is_replaced(served, tmp_path):
    with pytest.raises(IxyError, match="cannot listen there"):
        Server(str(served.path), served.bus)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    Server(str(tmp_path / "stale"), served.bus).close()


def test_a_socket_that_nobody_else_can_connect_to_now_is_in_use(served, tmp_path):
    path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        socket.setdefaulttimeout(5)  # or it would wait for ever
        try:
            with pytest.raises(IxyError, match="cannot listen there"):
                Server(path, served.bus)
        finally:
            socket.setdefaulttimeout(None)
        assert (tmp_path / "busy").exists()
