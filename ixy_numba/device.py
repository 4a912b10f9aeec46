"""`open_device(spec)`: from what a user types to a network device that is up, whatever its bus and driver."""

import atexit
import contextlib
import importlib
import os
import re
import sys
import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import numpy as np

from .core.errors import ClosedError, DmaError, IxyError, UsageError
from .core.lifetime import close_queues
from .core.memory import strongest
from .core.pool import Pool
from .core.thread import stop_kernels

PCI_ADDRESS = re.compile(r"([0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
PCI = "ixy_numba.bus.pci"
# A module with `open_bus(spec, rest)`, where `rest` is what follows the scheme.
SCHEMES = {"sim": "ixy_numba.sim", "vhost-user": "ixy_numba.bus.vhost_user"}


@dataclass
class Statistics:
    """Packets and bytes since the device was opened; bytes without CRC. Errors are damaged or misshapen frames."""

    rx_packets: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    rx_errors: int = 0
    rx_dropped: int = 0  # no descriptor was free
    tx_dropped: int = 0

    def __add__(self, other):
        return Statistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other):
        return Statistics(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def mbit(packets, data_bytes):
    """Megabits on the wire: a frame has 4 bytes of CRC, and 20 of preamble and gap around it."""
    return (data_bytes + 24 * packets) * 8 / 1e6


DRAIN_S = 0.1  # for what is queued when a device is closed
_open = set()  # keeps every device, its pools and their memory alive until it is closed, or the interpreter ends


class WhileOpen:
    """An attribute of a device that is gone once it is closed: ClosedError from then on."""

    def __set_name__(self, owner, name):
        self._name = name

    def __get__(self, device, owner=None):
        if device is None:
            return self
        device._check_open()
        return vars(device)[self._name]

    def __set__(self, device, value):
        vars(device)[self._name] = value


class Device(ABC):
    """A network device that is up: `queues` receive and transmit queues, queue k of both on `pools[k]`.

    `rx[k]` and `tx[k]` are what the verbs of `ixy_numba.datapath` take. `events[k]` is the eventfd of the interrupts of
    `rx[k]`, if it was opened with interrupts: one is raised once a loop asks for it (`waiting`). Use the device as a
    context manager, or `close()` it: until then it stays open, even if nobody refers to it any more.
    """

    driver = "?"
    rx, tx, regs = WhileOpen(), WhileOpen(), WhileOpen()
    UNREPORTED = 0  # packets that may be sent and still hold their buffers, for as long as nothing more is sent
    in_place = False  # whether it sends from another device's receive rings: such a device has no pool
    MAX_QUEUES, RING_SIZES = 1, ()

    def __init__(self, bus, queues, ring_size, pools, promiscuous, trace, interrupts=False):
        self.bus, self.name, self.simulated = bus, bus.name, bus.simulated
        self.queues, self.ring_size, self.promiscuous, self.trace = queues, ring_size, promiscuous, trace
        if not 1 <= queues <= self.MAX_QUEUES:
            raise UsageError(f"{self.name}: {queues} queues: expected 1 to {self.MAX_QUEUES}")
        if ring_size not in self.RING_SIZES:
            raise UsageError(f"{self.name}: ring size {ring_size}: expected a power of two from "
                             f"{self.RING_SIZES[0]} to {self.RING_SIZES[-1]}")
        self.pools = pools or self.new_pools(queues, ring_size, [bus])
        if len(self.pools) != queues:
            raise UsageError(f"{self.name}: {len(self.pools)} pools for {queues} queues: expected one each")
        if len(set(map(id, self.pools))) != queues:
            raise UsageError(f"{self.name}: a pool for two queues: expected one each, a pool is for one thread")
        self._total, self._closed = Statistics(), False
        with contextlib.ExitStack() as undo:
            for pool in self.pools:
                pool.map(bus)
                undo.callback(pool.unmap, bus)
            undo.callback(bus.disable_interrupts)
            self.events = bus.enable_interrupts(queues) if interrupts else []
            undo.callback(self._stop)
            self._set_up()
            self._start()
            if not self.wait_for_link():
                warnings.warn(f"{self.name}: the link is down; it is used all the same, packets wait for it",
                              RuntimeWarning, stacklevel=4)
            undo.pop_all()
        _open.add(self)

    @classmethod
    def new_pools(cls, queues, ring_size, buses):
        """What the devices behind `buses` share, one a queue."""
        return transient_pools(queues, ring_size, buses)

    @property
    def pool(self):
        """What `alloc_batch`, `free_batch` and `packet` take: the pool of queue 0."""
        self._check_open()
        return self.pools[0].view

    def stats(self):
        """Statistics since the device was opened, accumulated from the hardware's counters."""
        self._check_open()
        self._total = self._total + self._read_counters()
        errors, dropped = self._kernel_counters()
        return self._total + Statistics(rx_errors=errors, tx_dropped=dropped)

    def _kernel_counters(self):
        """What kernels counted since the device was opened: (misshapen frames, packets dropped instead of sent)."""
        return sum(int(rxq.state.errors) for rxq in self.rx), sum(int(txq.state.dropped) for txq in self.tx)

    def check(self):
        """Raise IxyError if the device or its transport failed since it was opened."""
        self.bus.check()

    def set_promiscuous(self, on):
        """Accept frames for any address (the default), or only the device's own and broadcast."""
        self._check_open()
        self._set_promiscuous(on)
        self.promiscuous = on

    def set_mac(self, address):
        """Change the address that the filter accepts."""
        self._check_open()
        if len(address) != 6 or address[0] & 1:
            raise UsageError(f"{self.name}: MAC address {bytes(address).hex(':')}: expected 6 bytes, no group address")
        self._set_mac(bytes(address))

    def wait_for_link(self, timeout_s=10.0):
        """Mbit/s of the link, 0 if it is still down after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while not (mbit := self.link_mbit) and time.monotonic() < deadline:
            time.sleep(0.01)
        return mbit

    def wait_until_sent(self, timeout_s):
        """Whether the device has sent all that it was given, within `timeout_s` seconds or until its link is down."""
        deadline = time.monotonic() + timeout_s
        try:
            while unsent := self._unsent():
                if not self.link_mbit or time.monotonic() >= deadline:
                    break
                time.sleep(0.0005)
        except IxyError:  # it is gone
            return False
        return not unsent

    def close(self, timeout_s=60.0):
        """Kernels stopped, queues off, DMA stopped, memory back. Safe to call twice.

        What it was given to send it may still send: it has a moment for that, far longer than a full ring takes.

        A Forwarder or KernelThread on the device is told to stop and waited for. Any other kernel gets a ClosedError
        from its next verb on one of the queues. IxyError, and nothing is given back, if one is still inside of a verb
        or a loop after `timeout_s` seconds. IxyError, but closed, if the device does not become quiet.
        """
        if self._closed:
            return
        self._end_kernels(timeout_s)
        self.wait_until_sent(DRAIN_S)
        try:
            errors = self._stop()
            self.bus.disable_interrupts()
            for pool in self.pools:
                pool.unmap(self.bus)
            self.bus.close()
        finally:
            self._closed = True
            _open.discard(self)
        if errors:
            raise IxyError(f"{self.name}: closed, but it did not become quiet: {errors[0]}")

    def _end_kernels(self, timeout_s):
        states = [queue.state for queue in (*self.rx, *self.tx) if "state" in queue._fields]
        try:
            stop_kernels(lambda record: any(record is state for state in states), timeout_s)
            close_queues(states, timeout_s)
        except IxyError as error:
            raise IxyError(f"{self.name} stays open: {error}") from None

    def _stop(self):
        """All DMA off, and all buffers back to their pools; returns the errors met."""
        errors = self._quiesce()
        self.bus.stop_dma()  # before its memory may be somebody else's
        for pool, buffers in zip(self.pools, self._release(), strict=True):
            pool.restore(buffers)
        return errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _check_open(self):
        if self._closed:
            raise ClosedError(f"{self.name} is closed; open it again")

    @abstractmethod
    def _set_up(self):
        """Bring the device up and make `rx` and `tx`. On an error `_quiesce` and `_release` undo what was done."""

    def _start(self):
        """Let packets flow."""
        self.bus.start()

    def _take_ring(self, memory, pages, layout):
        """A ring out of `memory`, whose pages the device sees at `pages` (`Bus.map_dma`): (record, device address)."""
        # Aligned so that none larger than a page goes across one: pages next to each other need not be so for a device.
        ring, iova = memory.take(layout, align=1 << (layout.itemsize - 1).bit_length())
        start, page = iova - memory.iova, memory.page_size
        touched = pages[start // page : (start + layout.itemsize - 1) // page + 1].astype(np.int64)
        if (np.diff(touched) != page).any():
            raise DmaError(f"{self.name}: a ring of {self.ring_size} descriptors is not contiguous for the device; "
                           "choose a smaller ring size")
        return ring, int(touched[0]) + start % page

    @abstractmethod
    def _unsent(self):
        """Whether a transmit queue holds packets that the device has not sent."""

    @abstractmethod
    def _quiesce(self):
        """Stop all DMA; returns the errors met."""

    @abstractmethod
    def _release(self):
        """Unmap and free what `_set_up` took; returns the indices of the buffers that each queue's rings held."""

    @abstractmethod
    def _read_counters(self):
        """What the hardware counted since the last call, as Statistics."""

    @abstractmethod
    def _set_promiscuous(self, on):
        """Switch the filter."""

    @property
    @abstractmethod
    def link_mbit(self):
        """Mbit/s of the link, 0 when it is down."""

    @property
    @abstractmethod
    def mac(self):
        """The address that the filter accepts, 6 bytes."""

    @abstractmethod
    def _set_mac(self, address):
        """Change it; it has been checked."""


os.register_at_fork(after_in_child=_open.clear)  # a device stays its parent's


@atexit.register
def _close_all():
    """The interpreter ends: no device may write to memory after that, nor a kernel read it while it goes."""
    for device in list(_open):
        try:
            device.close()
        except IxyError as error:
            print(f"error: {error}", file=sys.stderr)


def transient_pools(queues, ring_size, buses):
    """A pool a queue, each enough for both rings of every device and batches in hand, in powers of two."""
    count = max(4096, 1 << (2 * ring_size * len(buses) + 1024 - 1).bit_length())
    needs, shared = strongest(bus.memory_needs for bus in buses), any(bus.shares_memory for bus in buses)
    return [Pool(count, needs, True, buses[0].numa_node, shared) for _ in range(queues)]


def open_device(spec, *, queues=1, ring_size=512, pools=None, promiscuous=True, interrupts=False, unbind=False,
                trace=None):
    """Open what `spec` names and bring it up: a PCI address such as `0000:03:00.0`, `sim:KEY=VALUE,…` (see
    `ixy_numba.sim`), or `vhost-user:PATH` (see `ixy_numba.bus.vhost_user`).

    queues       receive and transmit queues (82599: 1 to 64; vhost-user: what the back-end has, up to 7)
    ring_size    descriptors a ring (a power of two; 82599: 64 to 4096, virtio: 64 to 32768)
    pools        one `Pool` a queue; devices that forward to each other share them. Default: pools of the device's own
    interrupts   have an eventfd a receive queue, so that a loop can sleep while nothing arrives
    unbind       take a PCI device from its kernel driver, unless an interface of it is up
    trace        called as trace("R" or "W", register, value) for every register access of the set-up
    UsageError for a spec or an argument that cannot be, IxyError for a device that does not come up.
    """
    bus = open_bus(spec, unbind)
    try:
        return _attach(bus, queues, ring_size, pools, promiscuous, trace, interrupts)
    except BaseException:
        with contextlib.ExitStack() as undo:  # all of it, whatever else goes wrong
            undo.callback(bus.give_back)
            undo.callback(bus.close)
            raise


def _driver(bus, in_place=False):
    from .drivers import find  # the drivers import this module

    return find(bus, in_place)


def _attach(bus, queues, ring_size, pools, promiscuous=True, trace=None, interrupts=False):
    return _driver(bus)(bus, queues, ring_size, pools, promiscuous, trace, interrupts)


def open_devices(specs, *, queues=1, ring_size=512, in_place=False, promiscuous=True, interrupts=False, unbind=False,
                 trace=None):
    """Open several devices that share one pool a queue, so that packets can go from each to any; see `open_device`.

    With `in_place`, two devices that share their rings instead, for `Forwarder(…, in_place=True)` only.
    On an error those already open are closed again.
    """
    if in_place and len(specs) != 2:
        raise UsageError(f"{len(specs)} device(s): expected two, to forward in place")
    opened, buses, drivers = [], [], []
    for spec in specs:
        _locate(spec)  # a spec that cannot be is told of before a card is taken from its driver
    try:
        for spec in specs:
            buses.append(open_bus(spec, unbind))
            drivers.append(_driver(buses[-1], in_place))
        pools = drivers[0].new_pools(queues, ring_size, buses) if specs else None
        for driver, bus in zip(drivers, buses, strict=True):
            opened.append(driver(bus, queues, ring_size, pools, promiscuous, trace, interrupts))
    except BaseException:
        with contextlib.ExitStack() as undo:  # all of it, whatever else goes wrong
            for bus in buses:
                undo.callback(bus.give_back)
            for one in (*opened, *buses[len(opened):]):
                undo.callback(one.close)
            raise
    return opened


def open_bus(spec, unbind=False):
    """The transport behind a device spec."""
    module, rest = _locate(spec)
    return importlib.import_module(module).open_bus(spec, unbind if rest is None else rest)


def _locate(spec):
    """The module for a device spec, and what follows the scheme: None for a PCI address. UsageError for neither."""
    if not spec.isprintable():  # a line break or a terminal's escape sequence would come out in every message
        raise UsageError(f"device {spec!r}: expected printable characters only; rename the file or interface it names")
    if PCI_ADDRESS.fullmatch(spec):
        return PCI, None
    scheme, _, rest = spec.partition(":")
    if scheme not in SCHEMES:
        raise UsageError(f"no such device {spec!r}: expected a PCI address such as 0000:03:00.0, "
                         f"{' or '.join(SCHEMES)}, or {scheme_example()}")
    return SCHEMES[scheme], rest


def scheme_example():
    return "'sim:KEY=VALUE,…' such as 'sim:in=file.pcap', or 'vhost-user:PATH'"

