"""Virtio on PCI against a card that does what each test says: set-up, queues, notifications, the control queue."""

import struct

import pytest
from test_virtio import close, frame, receive, send
from virtio_card import ACCESS_PLATFORM, ADDRESS, COMMON, CONTROL, DEVICE, NOTIFY, Card
from virtio_peer import ANY_LAYOUT, MAC, MQ, MRG_RXBUF, STATUS, VERSION_1, attach

from ixy_numba.core.errors import DeviceGoneError, IxyError, UsageError
from ixy_numba.drivers.virtio import control, pci
from ixy_numba.drivers.virtio import regs as r

BOTH = pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "modern"])
PROMISCUOUS, ALL_MULTICAST = (0, 0), (0, 1)


def refusal(card, kind=IxyError, **more):
    with pytest.raises(kind) as caught:
        attach(card, **more)
    card.close()
    return str(caught.value)


# ---- set-up

@BOTH
def test_the_steps_of_the_specification(legacy):
    """3.1.1: reset, acknowledge, driver, features, (features are fine), queues, driver is fine; then reset again."""
    card = Card(legacy)
    device = attach(card)
    steps = [value for name, value in card.log if name == "status"]
    assert steps == ([0, 1, 3, 7] if legacy else [0, 1, 3, 11, 15])
    names = [name for name, _ in card.log]
    enable = "page" if legacy else "enable"
    ready = len(names) - 1 - names[::-1].index("status")
    assert names.index("accepted") < names.index(enable) and names.count(enable) == 3
    assert max(k for k, name in enumerate(names) if name == enable) < ready
    assert device.mac == ADDRESS and device.link_mbit == 10000 and not device.simulated
    close(device)
    assert card.log[-1] == ("status", 0) and card.status == 0


@BOTH
def test_what_is_offered_and_wanted_is_accepted(legacy):
    card = Card(legacy, offered=(1 << 34) - 1)
    device = attach(card)
    mine = MAC | STATUS | r.MTU | MRG_RXBUF | r.EVENT_IDX | CONTROL
    assert card.accepted == mine | (ANY_LAYOUT if legacy else VERSION_1 | ACCESS_PLATFORM)
    close(device)


def test_features_that_the_device_refuses():
    card = Card()
    card.refuses_features = True
    assert "the device refuses the features 0x3" in refusal(card)


@pytest.mark.parametrize("ring_size, size", [(64, 64), (256, 256), (1024, 256)])
def test_a_modern_device_says_how_long_a_queue_is_at_most(ring_size, size):
    device = attach(Card(), ring_size=ring_size)
    assert {len(queue.ring.desc) for queue in (*device.rx, *device.tx)} == {size}
    close(device)


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_a_legacy_device_says_how_long_a_queue_is(size):
    device = attach(Card(legacy=True, sizes=size), ring_size=128)
    assert {len(queue.ring.desc) for queue in (*device.rx, *device.tx)} == {size}
    close(device)


@BOTH
def test_queues_that_are_not_there(legacy):
    assert "the device has no queue 0" in refusal(Card(legacy, sizes=0))


@BOTH
def test_more_queues(legacy):
    """The control queue comes behind all pairs that there are, and tells how many are used."""
    offered = (ANY_LAYOUT if legacy else VERSION_1) | MQ | CONTROL
    card = Card(legacy, offered=offered, pairs=3)
    device = attach(card, queues=2)
    assert sorted(card.queues) == [0, 1, 2, 3, 6] and card.commands[0] == ((4, 0), struct.pack("<H", 2))
    close(device)
    assert "4 queues: the device has 3" in refusal(Card(legacy, offered=offered, pairs=3), UsageError, queues=4)


def test_configuration_behind_the_vectors_registers():
    card = Card(legacy=True)
    card.msix_enabled = True
    device = attach(card)
    assert device.mac == ADDRESS
    close(device)


def test_a_configuration_that_does_not_come_to_rest():
    card = Card()
    card.restless = True
    assert "configuration does not come to rest" in refusal(card)


# ---- the data path

@BOTH
@pytest.mark.parametrize("short", [False, True])
def test_frames_both_ways(legacy, short):
    card = Card(legacy, offered=(ANY_LAYOUT if legacy else VERSION_1) | (0 if short else MRG_RXBUF))
    device = attach(card, ring_size=256)
    frames = [frame(k, 14 + 7 * k) for k in range(200)]
    for k in range(0, 200, 40):
        for one in frames[k : k + 40]:
            assert card.deliver(one) == 1
        got = receive(device, 20) + receive(device, 20)
        assert got == frames[k : k + 40]
        assert send(device, got) == 40
        assert card.collect() == got
    assert not card.faults
    assert (device.stats().rx_packets, device.stats().tx_packets) == (200, 200)
    close(device)


@BOTH
def test_the_device_is_notified_where_it_says(legacy):
    card = Card(legacy)
    device = attach(card)
    assert legacy or card.kicks(0), "of the buffers that it gets at the start"
    card.kicks(0), card.kicks(1)
    send(device, [frame(1)])
    assert card.kicks(1) and not card.kicks(0)
    card.deliver(frame(2))
    receive(device)
    assert card.kicks(0) and not card.kicks(1)
    card.bytes_of_flags(1)[:] = 1  # NO_NOTIFY
    send(device, [frame(3)])
    assert not card.kicks(1)
    close(device)


@BOTH
def test_a_closed_device_is_notified_no_more(legacy):
    """The number of the file that a port was behind may be another file's by then."""
    card = Card(legacy)
    device = attach(card)
    queues = device.rx + device.tx
    close(device)
    assert all(queue.state.descriptor == -1 for queue in queues)


# ---- the control queue

@BOTH
def test_the_filter_and_the_address(legacy):
    card = Card(legacy)
    device = attach(card)
    assert card.commands == [(PROMISCUOUS, b"\1"), (ALL_MULTICAST, b"\1")]
    device.set_promiscuous(False)
    assert card.commands[2:] == [(PROMISCUOUS, b"\0"), (ALL_MULTICAST, b"\0")]
    device.set_mac(bytes.fromhex("020000000001"))
    assert card.commands[4:] == [((1, 1), bytes.fromhex("020000000001"))] and device.mac[-1] == 1
    close(device)


@BOTH
def test_a_device_without_a_filter(legacy):
    card = Card(legacy, offered=(ANY_LAYOUT if legacy else VERSION_1) | MAC)
    device = attach(card)
    device.set_promiscuous(False)
    device.set_mac(bytes(6))
    assert sorted(card.queues) == [0, 1] and device.mac == bytes(6)
    close(device)


def test_a_command_that_is_refused_or_not_answered(monkeypatch):
    card = Card()
    device = attach(card)
    card.answer = 1
    with pytest.raises(IxyError, match=r"the device refuses control command \(1, 1\)"):
        device.set_mac(bytes(6))
    assert device.mac == ADDRESS
    card.answer = None
    monkeypatch.setattr(control, "TIMEOUT_S", 0.05)
    with pytest.raises(IxyError, match=r"no answer to control command \(0, 0\) within 0.05 s"):
        device.set_promiscuous(False)
    assert device.promiscuous
    close(device)


# ---- devices that are not what they should be

@BOTH
def test_a_device_that_goes(legacy):
    card = Card(legacy)
    device = attach(card)
    device.check()
    card.gone = True
    with pytest.raises(DeviceGoneError, match="the device is gone"):
        device.check()
    with pytest.raises(IxyError, match="it did not become quiet: card: the device is gone"):
        device.close()


@BOTH
def test_a_device_that_is_gone_from_the_start(legacy):
    card = Card(legacy)
    card.gone = True
    assert "the device is gone" in refusal(card, DeviceGoneError)


def test_a_device_that_somebody_resets():
    card = Card()
    device = attach(card)
    card.status = 0
    with pytest.raises(DeviceGoneError, match="card: the device is gone, or somebody has reset it: .* 0x0"):
        device.check()
    close(device)


def test_a_device_that_met_an_error():
    card = Card()
    device = attach(card)
    card.status |= 64
    with pytest.raises(IxyError, match="has met an error and stands still .*an address that it cannot reach"):
        device.check()
    close(device)


@BOTH
def test_a_reset_that_does_not_end(legacy, monkeypatch):
    monkeypatch.setattr(pci, "RESET_TIMEOUT_S", 0.02)
    card = Card(legacy)
    card.stuck = True
    assert "status still 0xf 0.02 s after a reset" in refusal(card)


def test_a_bar_that_is_too_small():
    card = Card(legacy=True)
    card.bar(0).size = 16
    assert "BAR 0 has 0x10 bytes, expected at least 0x14" in refusal(card)


@pytest.mark.parametrize("k, broken, why", [
    (0, (COMMON, 4, 0xF80, 0x100), "BAR 4 has 0x1000 bytes, registers of 0x100 at 0xf80 do not fit"),
    (0, (COMMON, 4, 0x100, 32), "registers of 0x20 at 0x100 do not fit or are too few"),
    (1, (NOTIFY, 2, 0x40, 4), "queue 1 is notified at 0x4, outside of the registers for that"),
    (1, (5, 2, 0, 4), "without the capabilities notifications; is it one of version 1"),
    (3, (DEVICE, 6, 0, 4), "without the capabilities device configuration"),
])
def test_capabilities_that_cannot_be(k, broken, why):
    card = Card()
    card.capability_list[k] = broken
    assert why in refusal(card)


def test_a_modern_device_without_capabilities():
    card = Card(legacy=True)
    card.device = 0x1041
    assert "without the capabilities common configuration, notifications, device configuration" in refusal(card)


def test_a_queue_that_a_legacy_device_cannot_address(monkeypatch):
    monkeypatch.setattr(pci, "PAGE_SHIFT", 0)
    assert "expected a page below 16 TiB" in refusal(Card(legacy=True))
