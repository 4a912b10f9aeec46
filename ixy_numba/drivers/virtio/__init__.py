"""Virtio network devices over split virtqueues (virtio 1.1, section 5.1), on any virtio transport."""

import os

import numpy as np

from ...bus.virtio import NETWORK, RingAddresses, VirtioTransport
from ...bus.virtio import VENDOR as VENDOR
from ...core.errors import DmaError, IxyError, UsageError
from ...core.memory import DmaMemory, new_record
from ...core.pool import ADDRESS_SHIFT, BUFFER_SIZE
from ...device import Device, Statistics
from . import descriptors, kernels
from . import regs as r

IDS = {NETWORK: "virtio network device", 0x1000: "transitional virtio network device"}
REFUSED = {}
WANTED = r.MAC | r.STATUS | r.MTU | r.MRG_RXBUF | r.EVENT_IDX | r.ANY_LAYOUT | r.VERSION_1


class Virtio(Device):
    """One virtio network device. See `device.Device` for what it offers.

    Received are frames for any address: there is no control queue, and so no filter.
    """

    driver = "virtio"
    MAX_QUEUES = 128
    UNREPORTED = int(kernels.BLOCK) - 1
    RING_SIZES = tuple(1 << k for k in range(6, 16))
    FIRST = 0  # the position at which the rings begin

    def _set_up(self):
        self.rx, self.tx, self._memory, self.transport = [], [], None, None
        self._counted = Statistics()
        self.transport = _transport(self.bus)
        if self.queues > self.transport.max_queue_pairs:
            raise UsageError(f"{self.name}: {self.queues} queues: the device has {self.transport.max_queue_pairs}")
        self._negotiate()
        config = self.transport.read_config(r.CONFIG_MAC, 6) if self.features & r.MAC else None
        self._mac = config or _random_mac()
        layout = descriptors.ring(self.ring_size)
        self._memory = DmaMemory(2 * self.queues * layout.itemsize, self.bus.memory_needs, self.bus.numa_node,
                                 self.bus.shares_memory)
        pages = self.bus.map_dma(self._memory)
        if (np.diff(pages.astype(np.int64)) != self._memory.page_size).any():
            raise DmaError(f"{self.name}: the rings are not contiguous for the device; choose a smaller ring size")
        for k in range(self.queues):
            self.rx.append(self._receive_queue(k, layout))
            self.tx.append(self._transmit_queue(k, layout))

    def _negotiate(self):
        """Accept what is wanted of what is offered (2.2), and nothing that would change a frame on its way."""
        offered = self.transport.offered_features()
        self.features = offered & (WANTED | (r.MQ if self.queues > 1 else 0))
        if self.queues > 1 and not self.features & r.MQ:
            raise UsageError(f"{self.name}: {self.queues} queues: the device has one pair, it does not offer more (MQ)")
        if not self.features & (r.VERSION_1 | r.ANY_LAYOUT):
            raise IxyError(f"{self.name}: the device offers features {offered:#x}, with neither VERSION_1 nor "
                           "ANY_LAYOUT; it is too old")
        if self.features & r.VERSION_1:
            self.features &= ~r.ANY_LAYOUT  # part of version 1
        self.transport.accept_features(self.features)
        short = not self.features & (r.VERSION_1 | r.MRG_RXBUF)
        self.header_size = descriptors.LEGACY_HEADER_SIZE if short else descriptors.HEADER_SIZE

    def _queue(self, number, layout, state_dtype, flags):
        """(ring, state) of a queue whose descriptor k is made available at slot k, and no buffer in it yet."""
        ring, iova = self._memory.take(layout, align=4096)
        state = new_record(state_dtype)
        ring.avail = state.posted = state.slot_of = np.arange(self.ring_size)
        ring.desc["flags"] = flags
        ring.desc["len"] = BUFFER_SIZE + self.header_size
        ring.avail_idx = ring.used_idx = self.FIRST & 0xFFFF
        state.ready, state.header = self.FIRST, self.header_size
        state.event_idx = bool(self.features & r.EVENT_IDX)
        # The driver polls. With EVENT_IDX there is no flag for that, only an index as far away as can be.
        ring.avail_flags = 0 if state.event_idx else descriptors.NO_INTERRUPT
        ring.used_event = (self.FIRST - 1) & 0xFFFF
        at = {name: iova + layout.fields[name][1] for name in ("desc", "avail_flags", "used_flags")}
        notifier = self.transport.set_queue(number, RingAddresses(self.ring_size, *at.values()))
        state.eventfd, state.one = notifier.eventfd, 1
        state.one_address = np.asarray(state).ctypes.data + state_dtype.fields["one"][1]
        return ring, state

    def _receive_queue(self, k, layout):
        """Queue 2k, with a buffer of its pool at every slot."""
        pool = self.pools[k]
        ring, state = self._queue(2 * k, layout, kernels.rx_state(self.ring_size), descriptors.DEVICE_WRITES)
        buffers = pool.reserve(self.ring_size)
        state.held, state.index = buffers, self.FIRST
        state.sure = BUFFER_SIZE - bool(self.features & r.MRG_RXBUF)
        ring.desc["addr"] = (pool.view.table.word[buffers] >> ADDRESS_SHIFT) - np.uint64(self.header_size)
        ring.avail_idx = (self.FIRST + self.ring_size) & 0xFFFF
        return kernels.RxQueue(ring, state, pool.view)

    def _transmit_queue(self, k, layout):
        ring, state = self._queue(2 * k + 1, layout, kernels.tx_state(self.ring_size), 0)
        state.tail = state.clean = self.FIRST
        return kernels.TxQueue(ring, state, self.pools[k].view)

    def _quiesce(self):
        return self.transport.stop() if self.transport else []

    def _release(self):
        held = [np.zeros(0, np.uint32)] * self.queues
        for k, (rxq, txq) in enumerate(zip(self.rx, self.tx, strict=True)):
            unsent = np.arange(int(txq.state.clean), int(txq.state.tail)) % self.ring_size
            held[k] = np.concatenate([rxq.state.held, txq.state.held[unsent]])
        if self._memory is not None:
            self.bus.unmap_dma(self._memory)
            self._memory.close()
        return held

    def check(self):
        super().check()
        for number, queue in enumerate(queue for pair in zip(self.rx, self.tx, strict=True) for queue in pair):
            if queue.state.broken:
                raise IxyError(f"{self.name}: queue {number} is broken: its used index jumped to "
                               f"{int(queue.ring.used_idx)}, beyond what was posted; restart the device's side")

    @property
    def link_mbit(self):
        """Mbit/s: nominal, what is behind the device is not known. 0 while it is away or says that its link is down."""
        status = self.transport.read_config(r.CONFIG_STATUS, 2) if self.features & r.STATUS else None
        up = status is None or status[0] & r.LINK_UP
        return 10000 if up and self.transport.connected else 0

    def wait_for_link(self, timeout_s=10.0):
        return self.link_mbit

    @property
    def mac(self):
        return self._mac

    def set_mac(self, address):
        if len(address) != 6 or address[0] & 1:
            raise UsageError(f"{self.name}: MAC address {bytes(address).hex(':')}: expected 6 bytes, no group address")
        self._mac = bytes(address)

    def _set_promiscuous(self, on):
        """Nothing: without a control queue there is no filter to switch."""

    def _read_counters(self):
        rx, tx = [queue.state for queue in self.rx], [queue.state for queue in self.tx]
        total = Statistics(rx_packets=sum(int(state.packets) - int(state.errors) for state in rx),
                           rx_bytes=sum(int(state.bytes) for state in rx),
                           tx_packets=sum(int(state.packets) for state in tx),
                           tx_bytes=sum(int(state.bytes) for state in tx))
        counted, self._counted = self._counted, total
        return total - counted

    def _kernel_counters(self):
        errors, dropped = super()._kernel_counters()
        return errors + sum(int(txq.state.errors) for txq in self.tx), dropped


def _random_mac():
    """A locally administered unicast address, for a device that has none (5.1.5)."""
    return bytes([0x02]) + os.urandom(5)


def _transport(bus):
    """The virtio transport behind `bus`."""
    if not isinstance(bus, VirtioTransport):
        raise UsageError(f"{bus.name}: a virtio device on a bus that this driver does not know")
    return bus
