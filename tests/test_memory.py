"""DMA memory: how much, where the device sees it, what is refused, and that closing gives it back under live views."""

import collections
import gc
import mmap
import os
import re

import numpy as np
import pytest

from ixy_numba.core import memory
from ixy_numba.core.errors import ClosedError, DmaError, UsageError
from ixy_numba.core.memory import ANY, GIANT_PAGE, HUGE, HUGE_PAGE, PAGE, PINNED, DmaMemory, new_record, record

MIB = 1 << 20
map_memory = mmap.mmap
PAIR = np.dtype([("a", "u8"), ("b", "u4", (6,))])


class FakeMmap:
    """mmap.mmap that knows the answer to requests for huge pages (an errno or None: ordinary memory) and to others."""

    def __init__(self, huge, ordinary=None, giant=12):
        self.errors, self.asked = {HUGE_PAGE: huge, PAGE: ordinary, GIANT_PAGE: giant}, []

    def __call__(self, fd, length, flags):
        page = 1 << (flags >> 26) if flags & memory._MAP_HUGETLB else PAGE
        self.asked.append((length, page))
        if self.errors[page] is not None:
            raise OSError(self.errors[page], "no such memory")
        return map_memory(fd, length, flags=flags & 0xFF)


@pytest.fixture
def no_huge_pages(monkeypatch):
    fake = FakeMmap(huge=12)
    monkeypatch.setattr(memory.mmap, "mmap", fake)
    return fake


@pytest.fixture
def huge_pages(monkeypatch):
    fake = FakeMmap(huge=None)
    monkeypatch.setattr(memory.mmap, "mmap", fake)
    return fake


def resident():
    """Bytes of physical memory that this process holds."""
    with open("/proc/self/status") as status:
        found = re.findall(r"^(?:VmRSS|HugetlbPages):\s+(\d+) kB", status.read(), re.M)
    return sum(map(int, found)) * 1024


# ---- how much

@pytest.mark.parametrize("size, rounded", [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (3 * MIB, 3 * MIB)])
def test_ordinary_pages_are_rounded_up_to_one_page(no_huge_pages, size, rounded):
    dma = DmaMemory(size)
    assert (dma.size, dma.page_size, dma.array.shape, dma.array.dtype) == (rounded, PAGE, (rounded,), np.uint8)
    assert not dma.array.any()
    addresses = rounded + HUGE_PAGE * (rounded >= HUGE_PAGE)  # to begin where a huge page can
    assert no_huge_pages.asked == [(-(-size // HUGE_PAGE) * HUGE_PAGE, HUGE_PAGE), (addresses, PAGE)]
    dma.close()


@pytest.mark.parametrize("needs", [ANY, PINNED, HUGE])
def test_huge_pages_are_taken_where_there_are_any(huge_pages, needs):
    dma = DmaMemory(HUGE_PAGE + 1, needs)
    assert (dma.size, dma.page_size) == (2 * HUGE_PAGE, HUGE_PAGE)
    assert huge_pages.asked == [(2 * HUGE_PAGE, HUGE_PAGE)]
    dma.close()


def test_a_page_of_a_gibibyte_serves_where_there_are_no_smaller_ones(monkeypatch):
    fake = FakeMmap(huge=12, giant=None)
    monkeypatch.setattr(memory.mmap, "mmap", fake)
    monkeypatch.setattr(memory, "_populate", lambda mapping, array: None)  # not a gibibyte of real memory
    dma = DmaMemory(HUGE_PAGE + 1, HUGE)
    assert (dma.size, dma.page_size, len(dma._map)) == (2 * HUGE_PAGE, HUGE_PAGE, GIANT_PAGE)
    dma.close()
    DmaMemory(PAGE, ANY).close()  # no waste for what does not need it
    assert fake.asked == [(2 * HUGE_PAGE, HUGE_PAGE), (GIANT_PAGE, GIANT_PAGE), (HUGE_PAGE, HUGE_PAGE), (PAGE, PAGE)]


def test_huge_pages_that_turn_out_not_to_be_there(huge_pages, monkeypatch):
    """Another process's limit, or a control group's: refused, and not found out by a dead process later."""
    def refuse(mapping, array):
        raise OSError(14, "Bad address")

    monkeypatch.setattr(memory, "_populate", refuse)
    with pytest.raises(DmaError, match="1 free huge pages of 2 MiB needed"):
        DmaMemory(PAGE, HUGE)
    dma = DmaMemory(PAGE, ANY)
    assert dma.page_size == PAGE
    dma.close()


@pytest.mark.parametrize("needs", [PINNED, HUGE])
def test_a_child_process_does_not_have_what_a_device_writes_to(huge_pages, needs):
    """A fork would share the pages, and the next write would give the parent others than the device's."""
    dma = DmaMemory(HUGE_PAGE, needs)
    child = os.fork()
    if not child:
        with open("/proc/self/maps") as maps:
            spans = [tuple(int(part, 16) for part in line.split()[0].split("-")) for line in maps]
        os._exit(any(start <= dma.virtual_address < end for start, end in spans))
    assert os.waitpid(child, 0)[1] == 0
    dma.close()


@pytest.mark.parametrize("kind", ["huge_pages", "no_huge_pages"])
def test_pages_come_from_the_devices_node(request, kind):
    request.getfixturevalue(kind)
    dma = DmaMemory(HUGE_PAGE, PINNED, node=0)
    with open("/proc/self/numa_maps") as lines:
        policies = {int(line.split()[0], 16): line.split()[1] for line in lines}
    assert policies[max(start for start in policies if start <= dma.virtual_address)] == "prefer:0"
    dma.close()
    DmaMemory(PAGE, PINNED, node=1000).close()  # a node that is not there is no error: it is a preference


def test_never_more_than_asked(no_huge_pages):
    before = resident()
    dma = DmaMemory(64 * MIB)
    dma.array[:] = 1
    assert 60 * MIB < resident() - before < 66 * MIB
    dma.close()
    assert resident() - before < 4 * MIB


def test_it_leaves_nothing_behind_when_the_process_is_killed():
    """Private and without a file: there is nothing that could outlive the process."""
    dma = DmaMemory(PAGE)
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, rights, _, _, inode, *name = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= dma.virtual_address < end:
                assert rights == "rw-p" and (not name or "deleted" in line or inode == "0")
                break
        else:
            pytest.fail("not mapped")
    dma.close()


# ---- what is refused

@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_cannot_be(size):
    with pytest.raises(UsageError, match=f"{size} bytes: expected at least 1"):
        DmaMemory(size)


def test_one_region_is_at_most_a_gibibyte(no_huge_pages):
    with pytest.raises(DmaError, match="expected at most 1 GiB a region"):
        DmaMemory((1 << 30) + 1)
    assert no_huge_pages.asked == []  # nothing was taken first


def test_huge_pages_needed_and_not_there(no_huge_pages):
    with pytest.raises(DmaError) as caught:
        DmaMemory(3 * HUGE_PAGE, HUGE)
    assert str(caught.value) == ("DMA memory: 3 free huge pages of 2 MiB needed, fewer are there; set them up: "
                                 "echo 67 > /proc/sys/vm/nr_hugepages (as root)")
    assert no_huge_pages.asked == [(3 * HUGE_PAGE, HUGE_PAGE), (GIANT_PAGE, GIANT_PAGE)]
    assert isinstance(caught.value, MemoryError) and caught.value.exit_code == 1


def test_what_the_bus_pins_is_not_locked_as_well(no_huge_pages, monkeypatch):
    """It would count twice against the user's limit; a software device's memory is locked where that is allowed."""
    locked = []
    monkeypatch.setattr(memory._libc, "mlock", lambda address, length: locked.append(length.value))
    DmaMemory(2 * PAGE, PINNED).close()
    assert not locked
    DmaMemory(2 * PAGE, ANY).close()
    assert locked == [2 * PAGE]


def test_out_of_memory(monkeypatch):
    monkeypatch.setattr(memory.mmap, "mmap", FakeMmap(huge=12, ordinary=12))
    with pytest.raises(DmaError, match="DMA memory of 8192 bytes: no such memory; free some memory or ask for less"):
        DmaMemory(2 * PAGE)


# ---- where the device sees it

def test_device_addresses_are_no_virtual_ones_and_never_shared():
    regions = [DmaMemory(PAGE) for _ in range(8)]
    spans = sorted((dma.iova, dma.iova + dma.size) for dma in regions)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert spans[0][0] >= 4 << 30 and spans[-1][1] <= 1 << 39
    assert not {dma.iova for dma in regions} & {dma.virtual_address for dma in regions}
    for dma in regions:
        dma.close()


def test_addresses_can_be_used_again(monkeypatch):
    monkeypatch.setattr(memory, "_iovas", collections.deque([1 << 30, 2 << 30, 3 << 30]))
    first, second = DmaMemory(PAGE), DmaMemory(PAGE)
    first.close()
    third = DmaMemory(PAGE)
    assert third.iova == 3 << 30  # the freed one comes last: a device that still writes there is found out
    assert DmaMemory(PAGE).iova == 1 << 30 and second.iova == 2 << 30
    gc.collect()  # the last one was dropped without being closed
    assert list(memory._iovas) == [1 << 30]


def test_no_address_left(monkeypatch):
    monkeypatch.setattr(memory, "_iovas", collections.deque([1 << 30]))
    dma = DmaMemory(PAGE)
    with pytest.raises(DmaError, match="all 508 regions are in use; close the devices and pools"):
        DmaMemory(PAGE)
    dma.close()
    dma.close()
    assert list(memory._iovas) == [1 << 30]


# ---- records

def test_take_hands_out_aligned_parts_that_do_not_overlap(no_huge_pages):
    dma = DmaMemory(PAGE)
    parts = [dma.take(PAIR, align) for align in (64, 64, 128, 1024)]
    assert [iova - dma.iova for _, iova in parts] == [0, 64, 128, 1024]
    for k, (part, iova) in enumerate(parts, 1):
        part.a, part.b = k, k
        assert (dma.array[iova - dma.iova : iova - dma.iova + 8].view("<u8") == k).all()
    assert [int(part.a) for part, _ in parts] == [1, 2, 3, 4]


def test_take_more_than_there_is(no_huge_pages):
    dma = DmaMemory(PAGE)
    dma.take(np.dtype([("all", "u1", (PAGE - 10,))]))
    with pytest.raises(DmaError, match="32 bytes asked for, 0 left"):
        dma.take(PAIR)
    last, _ = dma.take(np.dtype([("rest", "u1", (10,))]), align=2)
    last.rest = 9
    assert dma.array[-10:].tolist() == [9] * 10


def test_new_records_are_zero_and_aligned():
    for _ in range(20):
        made = new_record(PAIR)
        assert made.a == 0 and not made.b.any()
        assert made.__array_interface__["data"][0] % 64 == 0
        made.a = 5
        assert made["a"] == 5


def test_a_record_covers_exactly_its_bytes():
    with pytest.raises(ValueError):
        record(np.zeros(PAIR.itemsize + 1, np.uint8), PAIR)


# ---- closing

def test_close_unmaps():
    dma = DmaMemory(PAGE)
    dma.close()
    assert dma.closed and dma._map.closed
    dma.close()


def test_close_under_live_views():
    dma = DmaMemory(2 * PAGE)
    part, _ = dma.take(PAIR)
    view = dma.array[PAGE:]
    part.a, view[:] = 7, 8
    dma.close()
    assert dma.closed
    assert part.a == 0 and not view.any()  # the pages are gone, the addresses are still ours
    part.a = 1  # no fault
    dma.close()


@pytest.mark.parametrize("use", [lambda dma: dma.take(PAIR), lambda dma: dma.virtual_address])
@pytest.mark.parametrize("hold_a_view", [False, True])
def test_use_after_close(use, hold_a_view):
    dma = DmaMemory(PAGE)
    view = dma.array if hold_a_view else None
    dma.close()
    with pytest.raises(ClosedError, match="this DMA memory is closed; open the device again"):
        use(dma)
    del view
