"""A violation while packets are in flight: its packet or its loop ends, nothing is lost, the device can be closed."""

import time

import numpy as np
import pytest
from tinynic import account, attach

from ixy_numba import (
    MAX_BATCH,
    Forwarder,
    KernelError,
    Pool,
    UsageError,
    alloc_batch,
    free_batch,
    handler,
    kernel,
    rx_batch,
    tx_batch,
)
from ixy_numba.core.jit import CHECKED, INTERPRETED
from ixy_numba.core.thread import KernelThread
from ixy_numba.datapath import Lane, forward_pass, new_control

compiled_only = pytest.mark.skipif(INTERPRETED, reason="NUMBA_DISABLE_JIT=1: nothing is compiled")
checked_only = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast checks nothing")
U = np.uint64
TOP = (1 << 64) - 1


# ---- in the loop


@handler
def careless(packet, state):
    """Byte 0 says what goes wrong."""
    if packet[0] == 1:
        state[0] += U(TOP)
    elif packet[0] == 2:
        packet[1] = packet[0] + 254
    elif packet[0] == 3:
        packet.set_be16(2, 1 << 16)
    return 0


@checked_only
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_violation_in_a_handler_costs_its_packet_only():
    pool = Pool(128)
    device, nic = attach(pool)
    state = np.ones(1, np.uint64)
    control = new_control(1, 32)
    kinds = [0, 1, 2, 0, 3, 0] if not INTERPRETED else [0, 2, 0, 3, 0]  # NumPy's own uint64 wraps
    for kind in kinds:
        assert nic.receive(bytes([kind]) * 60)
    while forward_pass(device.rx[0], tuple(device.tx), Lane(careless, state, control), 0):
        account(pool, [device])
    assert nic.send() == [bytes(60)] * 3
    assert control.forwarded == 3 and control.failed == control.dropped == len(kinds) - 3 and state[0] == 1
    device.close()
    assert pool.available == pool.count


@checked_only
def test_a_violation_in_a_handler_is_explained():
    pool = Pool(128)
    device, nic = attach(pool)
    forwarder = Forwarder([device], careless, state=np.ones(1, np.uint64), packets=1)
    nic.receive(bytes([2]) * 60)
    nic.receive(bytes(60))
    with forwarder:
        deadline = time.monotonic() + 60
        while not forwarder.finished and time.monotonic() < deadline:
            time.sleep(0.001)
    line = careless.function.__code__.co_firstlineno + 6
    assert forwarder.explain_failure() == (
        f"{__file__}:{line}: handler careless: OverflowError: 256 does not fit 1 byte(s)")
    device.close()


@handler
def refused(packet, state):
    return packet.port + state.sum()


@compiled_only
@checked_only
def test_a_handler_that_cannot_be_checked_is_named_with_its_line():
    device, _ = attach(Pool(128))
    forwarder = Forwarder([device], refused, state=np.zeros(1, np.int64)).start()
    with pytest.raises(UsageError) as error:
        forwarder.stop()
    device.close()
    line = refused.function.__code__.co_firstlineno + 2
    assert str(error.value).startswith(f"{__file__}:{line}: handler refused does not compile: sum of array(int64")


@kernel
def sums(rxq, batch, table):
    """A user's own loop, which overflows with packets in its hands."""
    n = rx_batch(rxq, batch, U(32))
    for k in range(n):
        table[0] += batch.packet[k] | U(1 << 63)
    return n


@kernel
def walks_off(rxq, batch, table):
    """Another, which goes beyond its table."""
    n = rx_batch(rxq, batch, U(32))
    for k in range(n):
        table[k + U(1)] = batch.packet[k]
    return n


@compiled_only
@checked_only
@pytest.mark.parametrize("loop, words", [(sums, "OverflowError: uint64 overflow in +"),
                                         (walks_off, "IndexError: index is out of bounds")])
def test_a_violation_in_a_loop_of_ones_own_is_one_error(loop, words):
    pool = Pool(128)
    device, nic = attach(pool)
    for _ in range(5):
        nic.receive(bytes(60))
    batch, table = pool.batch(), np.zeros(5, np.uint64)
    thread = KernelThread(loop, device.rx[0], batch, table[:2])
    thread.start()
    thread.join(120)
    line = loop.py_func.__code__.co_firstlineno + 5
    assert isinstance(thread.error, KernelError)
    assert str(thread.error) == f"{__file__}:{line}: kernel {loop.__name__}: {words}"
    assert not table[2:].any()
    account(pool, [device], batch.packet[:5])  # what it had taken is its own to free
    assert free_batch(pool.view, batch, U(0), U(5)) == 5
    device.close()
    assert pool.available == pool.count


# ---- what applications hand to the verbs


@checked_only
@pytest.mark.parametrize("verb", [lambda rxq, txq, batch: rx_batch(rxq, batch, -1),
                                  lambda rxq, txq, batch: tx_batch(txq, batch, -1, 5),
                                  lambda rxq, txq, batch: tx_batch(txq, batch, 0, -5)])
def test_after_a_negative_argument_the_device_can_be_closed(verb):
    pool = Pool(256)
    device, _ = attach(pool)
    with pytest.raises(OverflowError):
        verb(device.rx[0], device.tx[0], pool.batch())
    device.close(timeout_s=5)
    assert pool.available == pool.count


@pytest.mark.parametrize("bad", [MAX_BATCH + 1, 1 << 32, (1 << 64) - 1])
def test_batches_end_at_their_end(bad):
    """What is beyond the batch is cut off: limits, ends and beginnings."""
    pool = Pool(1024)
    device, nic = attach(pool, 512)
    batch = pool.batch()
    for _ in range(300):
        nic.receive(bytes(60))
    assert rx_batch(device.rx[0], batch, U(bad)) == MAX_BATCH
    account(pool, [device], batch.packet)
    assert tx_batch(device.tx[0], batch, U(bad), U(bad)) == MAX_BATCH
    assert free_batch(pool.view, batch, U(bad), U(bad)) == 0
    assert tx_batch(device.tx[0], batch, U(0), U(bad)) == MAX_BATCH
    assert alloc_batch(pool.view, batch, U(bad)) == MAX_BATCH
    account(pool, [device], batch.packet)
    assert free_batch(pool.view, batch, U(0), U(bad)) == MAX_BATCH
    device.close()
    assert pool.available == pool.count
