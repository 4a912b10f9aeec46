"""Virtio network devices over split virtqueues (virtio 1.1, section 5.1), on any virtio transport."""

import os

import numpy as np

from ...bus.pci import PciBus
from ...bus.virtio import RingAddresses, VirtioTransport
from ...core.errors import IxyError, UsageError
from ...core.memory import DmaMemory, new_record, record
from ...core.pool import ADDRESS_SHIFT, BUFFER_SIZE
from ...device import Device, Statistics
from . import descriptors, kernels, pci
from . import regs as r
from .control import ALL_MULTICAST, COMMAND, PROMISCUOUS, SET_MAC, SET_PAIRS, ControlQueue
from .control import SIZE as CONTROL_SIZE

VENDOR = 0x1AF4
IDS = {0x1041: "virtio network device", r.TRANSITIONAL: "transitional virtio network device"}
REFUSED = {}
CONTROL = r.CTRL_VQ | r.CTRL_RX | r.CTRL_MAC_ADDR
WANTED = r.MAC | r.STATUS | r.MTU | r.MRG_RXBUF | r.EVENT_IDX | r.ANY_LAYOUT | r.VERSION_1


class Virtio(Device):
    """One virtio network device. See `device.Device` for what it offers.

    Where there is no control queue (vhost-user), frames for any address are received, unfiltered.
    """

    driver = "virtio"
    MAX_QUEUES = 128
    UNREPORTED = int(kernels.BLOCK) - 1
    RING_SIZES = tuple(1 << k for k in range(6, 16))
    FIRST = 0  # the position at which the rings begin

    def _set_up(self):
        self.rx, self.tx, self._memory, self.transport, self._control = [], [], None, None, None
        self._counted = Statistics()
        self.transport = _transport(self.bus)
        if self.queues > self.transport.max_queue_pairs:
            raise UsageError(f"{self.name}: {self.queues} queues: the device has {self.transport.max_queue_pairs}")
        self._negotiate()
        config = self.transport.read_config(r.CONFIG_MAC, 6) if self.features & r.MAC else None
        self._mac = config or _random_mac()
        self._take_memory()
        for k in range(self.queues):
            self.rx.append(self._receive_queue(k))
            self.tx.append(self._transmit_queue(k))
        if self.features & r.CTRL_VQ:
            self._control = self._control_queue()

    def _take_memory(self):
        """The rings, in DMA memory: `_rings[number]` is (record, device address); `_command` likewise."""
        sizes = {number: self.transport.queue_size(number, self.ring_size) for number in range(2 * self.queues)}
        control = 2 * (self.transport.max_queue_pairs if self.features & r.MQ else 1)
        if self.features & r.CTRL_VQ:
            sizes[control] = self.transport.queue_size(control, CONTROL_SIZE)
        layouts = {number: descriptors.ring(size) for number, size in sizes.items()} | {"command": COMMAND}
        total = sum(2 * layout.itemsize for layout in layouts.values())  # each is aligned to a power of two
        self._memory = DmaMemory(total, self.bus.memory_needs, self.bus.numa_node, self.bus.shares_memory)
        pages = self.bus.map_dma(self._memory)
        self._rings = {number: self._take_ring(self._memory, pages, layouts[number])
                       for number in sorted(layouts, key=lambda number: -layouts[number].itemsize)}
        self._control_number = control

    def _negotiate(self):
        """Accept what is wanted of what is offered (2.2), and nothing that would change a frame on its way."""
        offered = self.transport.offered_features()
        self.features = offered & (WANTED | (r.MQ if self.queues > 1 else 0))
        if self.transport.has_control_queue and offered & r.CTRL_VQ:
            self.features |= offered & CONTROL
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

    def _hand_over(self, number, vector=None):
        """Tell the device about queue `number`; returns its ring and its Notifier."""
        ring, address = self._rings[number]
        fields = ring.dtype.fields
        at = [address + fields[name][1] for name in ("desc", "avail_flags", "used_flags")]
        return ring, self.transport.set_queue(number, RingAddresses(len(ring.desc), *at), vector)

    def _queue(self, number, state_dtype, flags, vector=None):
        """(ring, state, doorbell) of a queue whose descriptor k is available at slot k, and no buffer in it yet."""
        ring = self._rings[number][0]
        state = new_record(state_dtype(len(ring.desc)))
        ring.avail = state.posted = state.slot_of = np.arange(len(ring.desc))
        ring.desc["flags"] = flags
        ring.desc["len"] = BUFFER_SIZE + self.header_size
        ring.avail_idx = ring.used_idx = self.FIRST & 0xFFFF
        state.ready, state.header = self.FIRST, self.header_size
        state.event_idx = bool(self.features & r.EVENT_IDX)
        # The driver polls. With EVENT_IDX there is no flag for that, only an index as far away as can be.
        ring.avail_flags = 0 if state.event_idx else descriptors.NO_INTERRUPT
        ring.used_event = (self.FIRST - 1) & 0xFFFF
        _, notifier = self._hand_over(number, vector)
        state.word, state.width = notifier.word, notifier.width
        state.descriptor, state.offset = notifier.descriptor, notifier.offset
        state.word_address = np.asarray(state).ctypes.data + state.dtype.fields["word"][1]
        if notifier.register is None:
            return ring, state, new_record(descriptors.DOORBELL)
        return ring, state, record(notifier.register, descriptors.DOORBELL)

    def _receive_queue(self, k):
        """Queue 2k, with a buffer of its pool at every slot."""
        pool = self.pools[k]
        ring, state, doorbell = self._queue(2 * k, kernels.rx_state, descriptors.DEVICE_WRITES,
                                           k if self.events else None)
        buffers = pool.reserve(len(ring.desc))
        state.held, state.index = buffers, self.FIRST
        state.sure = BUFFER_SIZE - bool(self.features & r.MRG_RXBUF)
        ring.desc["addr"] = (pool.view.table.word[buffers] >> ADDRESS_SHIFT) - np.uint64(self.header_size)
        ring.avail_idx = (self.FIRST + len(ring.desc)) & 0xFFFF
        return kernels.RxQueue(ring, state, pool.view, doorbell)

    def _transmit_queue(self, k):
        ring, state, doorbell = self._queue(2 * k + 1, kernels.tx_state, 0)
        state.tail = state.clean = self.FIRST
        return kernels.TxQueue(ring, state, self.pools[k].view, doorbell)

    def _control_queue(self):
        ring, notifier = self._hand_over(self._control_number)
        return ControlQueue(self.name, ring, *self._rings["command"], notifier)

    def _start(self):
        self.transport.start()
        if self._control and self.queues > 1:
            self._control.send(SET_PAIRS, self.queues.to_bytes(2, "little"))
        self._set_promiscuous(self.promiscuous)

    def _unsent(self):
        return any(int(txq.ring.used_idx) != int(txq.ring.avail_idx) for txq in self.tx)

    def _quiesce(self):
        return self.transport.stop() if self.transport else []

    def _release(self):
        held = [np.zeros(0, np.uint32)] * self.queues
        for k, rxq in enumerate(self.rx):
            held[k] = rxq.state.held
        for k, txq in enumerate(self.tx):  # there may be fewer, if the set-up failed
            unsent = np.arange(int(txq.state.clean), int(txq.state.tail)) % len(txq.ring.desc)
            held[k] = np.concatenate([held[k], txq.state.held[unsent]])
        for queue in self.rx + self.tx:
            queue.state.descriptor = -1  # its number may be another file's from now on
        if self._memory is not None:
            self.bus.unmap_dma(self._memory)
            self._memory.close()
        return held

    def check(self):
        self.transport.check()
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

    @property
    def mac(self):
        return self._mac

    def _set_mac(self, address):
        if self.features & r.CTRL_MAC_ADDR:
            self._control.send(SET_MAC, address)
        self._mac = address

    def _set_promiscuous(self, on):
        """Where the device has no filter to switch, it brings frames for any address."""
        if self.features & r.CTRL_RX:
            self._control.send(PROMISCUOUS, [on])
            self._control.send(ALL_MULTICAST, [on])

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
    if isinstance(bus, PciBus):
        return pci.transport(bus)
    if not isinstance(bus, VirtioTransport):
        raise UsageError(f"{bus.name}: a virtio device on a bus that this driver does not know")
    return bus
