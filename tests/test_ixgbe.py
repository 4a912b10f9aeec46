"""The 82599 driver on the simulated 82599: set-up step by step, statistics, limits, failures; nothing is lost."""

import contextlib
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ixy_numba import Forwarder, IxyError, Pool, RegisterTimeout, UsageError, open_device, open_devices
from ixy_numba import device as device_module
from ixy_numba.core.capture import Capture
from ixy_numba.core.errors import ClosedError, DeviceGoneError
from ixy_numba.core.packet import resize
from ixy_numba.core.pool import INDEX_MASK, U, alloc_batch
from ixy_numba.core.registers import ALL_ONES
from ixy_numba.datapath import Lane, forward_round, new_control, rx_batch, tx_batch
from ixy_numba.drivers.ixgbe import IDS, REFUSED
from ixy_numba.drivers.ixgbe import regs as r
from ixy_numba.fwd import touch_and_forward
from ixy_numba.sim import SimBus
from ixy_numba.sim import open_bus as open_sim


def manual(**options):
    """A simulated device that only moves when a test steps it."""
    text = ",".join(f"{key}={value}" for key, value in options.items())
    return open_sim(f"sim:{text}" if text else "sim", text, manual=True)


def attach(bus, queues=1, ring_size=64, pools=None, **more):
    return device_module._attach(bus, queues, ring_size, pools, **more)


@contextlib.contextmanager
def pair(ring_size=64, buffers=256, **options):
    """Two devices on one pool, with the same options."""
    pool = Pool(buffers)
    devices = [attach(manual(**options), ring_size=ring_size, pools=[pool]) for _ in range(2)]
    try:
        yield devices, pool
    finally:
        for device in devices:
            device.close()
    assert pool.available == pool.usable, "a closed device gives every buffer back"
    assert len(np.unique(pool.view.table.free[: pool.usable])) == pool.usable


# Set-up


def test_set_up_does_the_datasheets_steps_in_order():
    trace = []
    device = attach(manual(), queues=2, trace=lambda way, register, value: trace.append((way, register.name, value)))
    order = [("W", "EIMC", 0x7FFFFFFF), ("W", "CTRL", 0x04000008), ("W", "EIMC", 0x7FFFFFFF), ("R", "EEC", None),
             ("R", "RDRXCTL", None), ("W", "AUTOC", None), ("R", "CRCERRS", None), ("W", "FCTRL", 0x700),
             ("W", "SRRCTL[1]", None), ("W", "RXCTRL", 1), ("W", "RTTDCS", None), ("W", "DMATXCTL", 0x81000001),
             ("W", "TXDCTL[0]", None), ("W", "RXDCTL[0]", None), ("W", "RDT[0]", 63), ("W", "RDT[1]", 63)]
    at = 0
    for way, name, value in order:
        at = next(k for k in range(at, len(trace)) if trace[k][:2] == (way, name) and value in (None, trace[k][2])) + 1
    device.close()


def test_registers_after_set_up():
    device = attach(manual(), queues=2, ring_size=128)
    regs = device.regs
    for k in range(2):
        assert regs.read(r.RXDCTL[k]) & r.RXDCTL.ENABLE and regs.read(r.TXDCTL[k]) & r.TXDCTL.ENABLE
        assert regs.read(r.RDLEN[k]) == regs.read(r.TDLEN[k]) == 128 * 16
        assert regs.read(r.SRRCTL[k]) == 2 | 1 << 25 | 1 << 28  # 2 KiB, advanced one buffer, drop
        assert regs.read(r.RDT[k]) == 127 and regs.read(r.TDT[k]) == 0
        assert regs.read(r.TXDCTL[k]) & 0x7F0000 == 0  # WTHRESH: not every descriptor reports its status
    hlreg0 = regs.read(r.HLREG0)
    assert hlreg0 & (r.HLREG0.TXCRCEN | r.HLREG0.RXCRCSTRP | r.HLREG0.TXPADEN) == 0x403
    assert regs.read(r.FCTRL) & 0x700 == 0x700  # broadcast, and promiscuous as is the default
    assert regs.read(r.MRQC) & 0xF == 1  # RSS over two queues
    assert regs.read(r.RDRXCTL) & 3 << 25 == 3 << 25  # 8.2.3.8.8: software should set them
    assert regs.read(r.TXPBTHRESH[0]) == 158  # a packet of 2 KiB less than the 160 KiB of the buffer
    device.close()


class Stuck(SimBus):
    """A device of which one register always reads the same."""

    def __init__(self, register, value):
        super().__init__("stuck", manual=True)
        self.stuck, self.value = register.offset, value

    def read32(self, offset):
        return self.value if offset == self.stuck else super().read32(offset)


@pytest.mark.parametrize("register, value", [
    (r.CTRL, 0x04000000), (r.EEC, 0), (r.RDRXCTL, 0), (r.RXDCTL[0], 0), (r.TXDCTL[0], 0), (r.CTRL, ALL_ONES)])
def test_every_wait_of_the_set_up_ends_with_one_line(register, value):
    bus = Stuck(register, value)
    with pytest.raises(RegisterTimeout) as caught:
        attach(bus)
    message = str(caught.value)
    assert message.startswith(f"stuck: {register.name} is 0x") and "expected" in message and "\n" not in message
    bus.close()


def test_a_link_that_is_down_is_a_warning(monkeypatch):
    monkeypatch.setattr("ixy_numba.drivers.ixgbe.Ixgbe.wait_for_link", lambda self, timeout_s=10: 0)
    with pytest.warns(RuntimeWarning, match="the link is down"):
        device = attach(manual())
    device.close()


def test_link_speed():
    device = attach(manual())
    assert device.link_mbit == device.wait_for_link(0.1) == 10000
    device.close()


# Devices and limits


def test_a_card_that_goes_while_it_is_used(monkeypatch):
    """No statistics of billions of packets: one line, and closing gives the buffers back."""
    pool = Pool(256)
    device = attach(manual(), pools=[pool])
    monkeypatch.setattr(device.regs, "_read32", lambda offset: ALL_ONES)
    for use in (device.stats, lambda: device.set_promiscuous(False), lambda: device.link_mbit):
        with pytest.raises(DeviceGoneError, match="STATUS read all ones, the device is gone"):
            use()
    with pytest.raises(IxyError, match="it did not become quiet: .* the device is gone"):
        device.close()
    assert pool.available == pool.usable
    pool.close()


@pytest.mark.parametrize("number", sorted(IDS))
def test_every_listed_device_is_driven(number):
    device = open_device(f"sim:device={number:x}")
    assert device.driver == "ixgbe" and device.simulated
    device.close()


@pytest.mark.parametrize("number", [*sorted(REFUSED), 0x1572])
def test_other_devices_are_refused_by_name(number):
    with pytest.raises(UsageError, match=REFUSED.get(number, "no driver for 8086:1572")):
        open_device(f"sim:device={number:x}")


@pytest.mark.parametrize("queues, ring_size", [(0, 512), (65, 512), (1, 32), (1, 100), (1, 8192)])
def test_limits_are_one_line(queues, ring_size):
    with pytest.raises(UsageError, match="expected"):
        open_device("sim", queues=queues, ring_size=ring_size)


def test_sixty_four_queues_of_the_smallest_and_one_of_the_largest_ring():
    device = open_device("sim", queues=64, ring_size=64)
    assert len(device.rx) == len(device.tx) == 64
    device.close()
    device = open_device("sim", ring_size=4096)
    assert len(device.rx[0].ring.desc) == 4096
    device.close()


def test_open_devices_closes_what_it_opened():
    before = threading.active_count()
    with pytest.raises(UsageError):
        open_devices(["sim:gen=1000", "sim:nonsense=1"])
    assert threading.active_count() == before


# Filters and statistics


def test_mac_address():
    device = attach(manual(mac="02:11:22:33:44:55"))
    assert device.mac == bytes.fromhex("021122334455")
    device.set_mac(bytes.fromhex("02aabbccddee"))
    assert device.mac == bytes.fromhex("02aabbccddee")
    for bad in (bytes(5), bytes.fromhex("01aabbccddee")):
        with pytest.raises(UsageError):
            device.set_mac(bad)
    device.close()


def test_promiscuous_on_and_off():
    """The generator's frames are for the device; with another address only a promiscuous device takes them."""
    device = attach(manual(frames=30))
    device.set_mac(bytes.fromhex("02aabbccddee"))
    device.bus.step(10)
    assert device.stats().rx_packets == 10
    device.set_promiscuous(False)
    device.bus.step(10)
    assert device.stats().rx_packets == 10
    device.set_promiscuous(True)
    device.bus.step(10)
    assert device.stats().rx_packets == 20 and device.stats().rx_bytes == 20 * 60
    device.close()


def test_statistics_add_up_over_clearing_reads():
    device = attach(manual(gen=1e6, flows=1), queues=2, ring_size=64)  # with two queues a full one drops at once
    device.bus.step(1)  # the source waits for an answer before its clock starts
    assert sum(rx_batch(rxq, pool.batch(), 64) for rxq, pool in zip(device.rx, device.pools, strict=True)) == 1
    for _ in range(20):
        device.bus.step(64, elapsed_us=20)
        device.stats()
    stats = device.stats()
    assert stats.rx_packets == 64 and stats.rx_bytes == 64 * 60  # one ring of 63, and the first
    assert stats.rx_dropped > 200 and stats.rx_errors == 0
    with pytest.raises(AttributeError):
        stats.nonsense  # noqa: B018
    device.close()
    with pytest.raises(ClosedError):
        device.stats()


# The data path on the model, every buffer counted


def held(devices, pool):
    """Every buffer's place, as a sorted list of indices: free, waiting in a receive ring, or on its way out."""
    table = pool.view.table
    found = [table.free[: int(table.top)]]
    for device in devices:
        for rxq, txq in zip(device.rx, device.tx, strict=True):
            size, clean, tail = device.ring_size, int(txq.state.clean), int(txq.state.tail)
            sending = np.arange(clean, clean + (tail - clean) % size) % size
            found += [rxq.state.held & INDEX_MASK, txq.state.held[sending]]
    return np.sort(np.concatenate(found)).tolist()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["receive", "send", "forward"]), st.integers(0, 1), st.integers(1, 256)),
                max_size=60))
def test_no_buffer_is_ever_lost(steps):
    """Random bursts, partial completions, full rings and batch sizes 1 to 256."""
    with pair(frames=100000) as (devices, pool):
        rxqs, txqs = (tuple(d.rx[0] for d in devices), tuple(d.tx[0] for d in devices))
        control = new_control(2, 32)
        lane = Lane(touch_and_forward, None, control)
        everything = sorted(range(pool.usable))
        for what, which, amount in steps:
            if what == "forward":
                control.batch_size = amount
                forward_round(rxqs, txqs, lane, 0)
            else:
                devices[which].bus.step(amount)
            assert held(devices, pool) == everything
        for device in devices:
            device.bus.model.state.source = 0  # nothing more comes
        for _ in range(260):
            forward_round(rxqs, txqs, lane, 0)
            for device in devices:
                device.bus.step(64)
        received, sent = (sum(getattr(device.stats(), name) for device in devices)
                          for name in ("rx_packets", "tx_packets"))
        assert control.forwarded == received == sent and control.failed == 0
        assert all(device.bus.summary()["sequence_errors"] == 0 for device in devices)
        assert all(device.bus.summary()["dma_faults"] == 0 for device in devices)


def test_rss_spreads_flows_over_queues_and_keeps_them_there():
    device = attach(manual(frames=2000, flows=50), queues=4, ring_size=1024)
    for _ in range(40):
        device.bus.step(64)
    seen = {}
    for k, rxq in enumerate(device.rx):
        batch = device.pools[k].batch()
        while n := int(rx_batch(rxq, batch, 256)):
            for handle in batch.packet[:n]:
                octets = rxq.pool.memory.buffer[int(handle & INDEX_MASK)].octets
                seen.setdefault(bytes(octets[34:36]), set()).add(k)
    assert len(seen) == 50 and all(len(queues) == 1 for queues in seen.values())
    assert len({next(iter(queues)) for queues in seen.values()}) == 4
    device.close()


def test_forwarder_with_queues_of_its_own_threads(tmp_path):
    devices = open_devices(["sim:frames=20000,flows=64", f"sim:out={tmp_path / 'out.pcap'}"], queues=3, ring_size=256)
    with Forwarder(devices, touch_and_forward) as forwarder:
        for _ in range(6000):
            forwarder.check()
            if forwarder.finished:
                break
            threading.Event().wait(0.01)
    assert forwarder.count("forwarded") == 20000 == devices[1].stats().tx_packets
    assert sum(int(control.forwarded) > 0 for control in forwarder.controls) == 3
    for device in devices:
        device.close()


def test_close_leaves_the_device_quiet():
    bus = manual(frames=1000)
    device = attach(bus)
    written = []
    device.regs.trace = lambda way, register, value: written.append((way, register.name))
    device.close()
    assert ("W", "RXCTRL") in written and ("W", "CTRL") in written and ("R", "STATUS") in written
    device.close()  # twice is once
    with pytest.raises(ClosedError):
        device.set_promiscuous(True)


def test_a_device_that_does_not_become_quiet_is_told_of_and_gives_its_memory_back(monkeypatch):
    bus = Stuck(r.STATUS, r.STATUS.MASTER_ENABLED)
    pool, order = Pool(256), []
    device = attach(bus, pools=[pool])
    monkeypatch.setattr(bus, "stop_dma", lambda: order.append("off"))
    monkeypatch.setattr(bus, "unmap_dma", order.append)
    monkeypatch.setattr(pool, "restore", order.append)
    with pytest.raises(IxyError, match="did not become quiet"):
        device.close()
    assert order[0] == "off" and len(order) == 4, "the bus keeps it from memory before that is somebody else's"


@pytest.mark.parametrize("size", [60, 1500])
def test_what_was_to_be_sent_is_sent_before_the_device_closes(tmp_path, size):
    path = tmp_path / "out.pcap"
    with open_device(f"sim:out={path}", ring_size=512) as device:
        batch = device.pools[0].batch()
        alloc_batch(device.pool, batch, U(256))
        for k in range(256):
            batch.packet[k] = resize(batch.packet[k], U(size))
        assert tx_batch(device.tx[0], batch, U(0), U(256)) == 256
    assert len(Capture(path)) == 256


def test_a_device_that_sends_nothing_is_closed_all_the_same():
    device = attach(manual())
    batch = device.pools[0].batch()
    alloc_batch(device.pool, batch, U(1))
    batch.packet[0] = resize(batch.packet[0], U(60))
    tx_batch(device.tx[0], batch, U(0), U(1))
    assert not device.wait_until_sent(0.01)
    device.bus.step()
    assert device.wait_until_sent(0)
    device.close()


def test_a_forked_child_leaves_the_device_to_its_parent():
    device = attach(manual())
    child = os.fork()
    if not child:
        device_module._close_all()
        os._exit(0 if device.rx else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    device.close()
