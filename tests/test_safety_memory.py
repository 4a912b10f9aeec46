"""Closed devices, dropped pools, freed memory: kernels are stopped first, and what was kept is refused, not touched."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from tinynic import TinyNic, account, attach
from unprotected import outcomes, outcomes_without

from ixy_numba import DROP, Forwarder, Pool, alloc_batch, free_batch, handler, packet, resize, rx_batch, tx_batch
from ixy_numba import device as device_module
from ixy_numba.core import lifetime
from ixy_numba.core.errors import ClosedError, IxyError, UsageError
from ixy_numba.core.jit import CHECKED, kernel
from ixy_numba.core.memory import DmaMemory, new_record
from ixy_numba.core.mmio import load_acquire
from ixy_numba.core.pool import U
from ixy_numba.core.thread import KernelThread
from ixy_numba.datapath import Lane, forward_loop, new_control
from ixy_numba.drivers.ixgbe.in_place import InPlaceIxgbe
from ixy_numba.in_place import in_place_loop

ROOT = Path(__file__).resolve().parent.parent
MARK = "memory_use_after_free"
checked = pytest.mark.skipif(not CHECKED, reason="IXY_NUMBA_MODE=fast checks nothing")
PART = np.dtype([("words", "u8", (8,))])
JOB = np.dtype([("stop", "u8"), ("rounds", "u8")])


@handler
def drop(packet):
    return DROP


@handler
def send_on(packet):
    return 1 - packet.port


def wait(done, timeout_s=300):
    """The first call compiles, whatever that takes."""
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert done()


@kernel
def poll(rxq, batch, job):
    """A user's loop that has no end of its own but its stop word."""
    while load_acquire(job, "stop") == U(0):
        free_batch(rxq.pool, batch, U(0), rx_batch(rxq, batch, U(8)))
        job.rounds += U(1)


@kernel
def poll_forever(rxq, batch, job):
    while True:
        free_batch(rxq.pool, batch, U(0), rx_batch(rxq, batch, U(8)))
        job.rounds += U(1)


# ---- kernels that run are stopped first


@pytest.mark.safety(MARK)
@pytest.mark.parametrize("queues", [1, 2])
def test_closing_a_device_stops_its_forwarder(queues):
    pools = [Pool(256) for _ in range(queues)]
    devices = [device_module._attach(TinyNic(), queues, 64, pools) for _ in range(2)]
    forwarder = Forwarder(devices, drop).start()
    wait(lambda: forwarder.count("passes") > 0)
    devices[0].close()
    assert forwarder.ended is not None
    forwarder.check()  # told to stop, it ended without an error
    devices[1].close()
    for pool in pools:
        account(pool, [])


@pytest.mark.safety(MARK)
def test_closing_a_device_stops_a_users_kernel():
    pool = Pool(256)
    device, _ = attach(pool)
    job = new_record(JOB)
    thread = KernelThread(poll, device.rx[0], pool.batch(), job)
    thread.start()
    wait(lambda: job.rounds > 0)
    device.close()
    assert not thread.is_alive() and thread.error is None and job.stop
    account(pool, [])


@pytest.mark.safety(MARK)
@pytest.mark.parametrize("user", ["forwarder", "device"])
def test_a_kernel_that_is_being_compiled_is_waited_for(user, monkeypatch):
    """However long that takes: the time-out is for what a stop word can end."""
    compile, pool = Dispatcher.compile, Pool(256)
    monkeypatch.setattr(Dispatcher, "compile", lambda *args: time.sleep(1) or compile(*args))
    devices, _ = zip(*(attach(pool) for _ in range(2)), strict=True)
    forwarder = Forwarder(devices, drop).start()
    if user == "forwarder":
        forwarder.stop(timeout_s=0.5)
    for device in devices:
        device.close(timeout_s=0.5)
    assert forwarder.ended is not None
    forwarder.check()
    account(pool, [])


@checked
@pytest.mark.safety(MARK)
def test_a_kernel_that_cannot_be_told_is_refused_at_its_next_verb():
    """In a thread that nobody knows of, without a stop word."""
    pool = Pool(256)
    device, _ = attach(pool)
    job, errors = new_record(JOB), []

    def run(rxq):
        try:
            poll_forever(rxq, pool.batch(), job)
        except ClosedError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run, args=(device.rx[0],), daemon=True)
    thread.start()
    wait(lambda: job.rounds > 0)
    device.close()
    thread.join(60)
    assert not thread.is_alive() and errors == [lifetime.CLOSED]
    account(pool, [])


@kernel
def deaf(rxq, job):
    """Sees neither the end of its device nor its stop word, until the test says so."""
    while load_acquire(job, "rounds") == U(0):
        pass


@pytest.mark.safety(MARK)
def test_a_kernel_that_does_not_end_keeps_everything_mapped():
    pool = Pool(256)
    device, nic = attach(pool)
    job = new_record(JOB)
    thread = KernelThread(deaf, device.rx[0], job)
    thread.start()
    wait(lambda: thread.began is not None)
    with pytest.raises(IxyError, match="tiny stays open: deaf still runs on it 0.05 s after .* nothing was unmapped"):
        device.close(timeout_s=0.05)
    assert nic.pages and not nic.closed and device.rx and device.stats().rx_packets == 0
    job.rounds = 1
    device.close()
    assert nic.pages == {} and nic.closed
    account(pool, [])


@checked
@pytest.mark.safety(MARK)
def test_a_queue_that_somebody_is_inside_of_keeps_everything_mapped():
    pool = Pool(256)
    device, nic = attach(pool)
    rxq = device.rx[0]
    rxq.state.busy = 1  # a verb in mid-batch
    with pytest.raises(IxyError, match="a kernel still works on it after 0.05 s; nothing was unmapped"):
        device.close(timeout_s=0.05)
    assert nic.pages and not nic.closed
    with pytest.raises(ClosedError):
        rx_batch(rxq, pool.batch(), U(1))  # which leaves it
    device.close()
    account(pool, [])


def test_closing_memory_stops_the_kernels_on_it():
    memory, job = DmaMemory(4096), new_record(JOB)
    part, _ = memory.take(PART)
    thread = KernelThread(count, part, job)
    thread.start()
    wait(lambda: job.rounds > 0)
    memory.close()
    assert not thread.is_alive() and thread.error is None
    assert part.words[0] == 0  # still mapped, no longer that memory


@kernel
def count(part, job):
    while load_acquire(job, "stop") == U(0):
        part.words[0] = job.rounds
        job.rounds += U(1)


# ---- what was kept is refused


@pytest.mark.safety(MARK)
@pytest.mark.parametrize("ask", ["rx", "tx", "pool", "mac", "link_mbit", "regs"])
def test_a_closed_devices_parts_are_gone(ask):
    device, _ = attach(Pool(256))
    getattr(device, ask)
    device.close()
    with pytest.raises(ClosedError, match="tiny is closed; open it again"):
        getattr(device, ask)


@pytest.mark.safety(MARK)
@pytest.mark.parametrize("call", [
    lambda device: device.stats(), lambda device: device.set_promiscuous(True), lambda device: device.set_mac(bytes(6)),
    lambda device: device.wait_for_link(0)])
def test_a_closed_device_does_nothing_more(call):
    device, _ = attach(Pool(256))
    device.close()
    with pytest.raises(ClosedError, match="tiny is closed; open it again"):
        call(device)


@kernel
def look(pool, handle):
    return len(packet(pool, handle))


@checked
@pytest.mark.safety(MARK)
@pytest.mark.parametrize("own_pool", [False, True])
def test_verbs_refuse_queues_of_a_closed_device(own_pool):
    """Whether the pool went with the device or not: kept queues are refused, and nothing moves."""
    pool = Pool(256, transient=not own_pool)
    device, nic = attach(pool)
    rxq, txq, batch = device.rx[0], device.tx[0], pool.batch()
    assert alloc_batch(rxq.pool, batch, U(2)) == 2
    handles = [resize(batch.packet[k], U(60)) for k in range(2)]
    nic.receive(b"x" * 60)
    device.close()
    batch.packet[:2] = handles
    for use in (lambda: rx_batch(rxq, batch, U(8)), lambda: tx_batch(txq, batch, U(0), U(2)),
                lambda: forward_loop((rxq,), (txq,), Lane(drop, None, new_control(1, 32)))):
        with pytest.raises(ClosedError, match="the device of this queue is closed; open it again"):
            use()
    assert rxq.state.busy == txq.state.busy == 0
    if own_pool:
        assert look(rxq.pool, handles[0]) == 60 and free_batch(rxq.pool, batch, U(0), U(2)) == 2
        account(pool, [])
    else:
        for use in (lambda: alloc_batch(rxq.pool, batch, U(1)), lambda: free_batch(rxq.pool, batch, U(0), U(2))):
            with pytest.raises(ClosedError, match="this pool is closed; make another"):
                use()
        with pytest.raises(IndexError, match="no packet of the application's"):
            look(rxq.pool, handles[0])


@checked
@pytest.mark.safety(MARK)
def test_queues_in_place_are_refused_as_well():
    nics = [TinyNic(), TinyNic()]
    pools = InPlaceIxgbe.new_pools(1, 64, nics)
    devices = [InPlaceIxgbe(nic, 1, 64, pools, True, None) for nic in nics]
    rxqs, txqs = tuple(d.rx[0] for d in devices), tuple(d.tx[0] for d in devices)
    for device in devices:
        device.close()
    with pytest.raises(ClosedError, match="the device of this queue is closed"):
        in_place_loop(rxqs, txqs, Lane(send_on, None, new_control(2, 32)))


@pytest.mark.safety(MARK)
def test_a_pool_in_use_is_not_closed():
    pool = Pool(256)
    device, _ = attach(pool)
    for close in (pool.close, pool.memory.close):
        with pytest.raises(UsageError, match=r"in use by 1 open device\(s\); close them first"):
            close()
    assert not pool.memory.closed
    account(pool, [device])
    device.close()
    pool.close()
    assert pool.memory.closed


# ---- nobody refers to it any more


@pytest.mark.safety(MARK)
def test_a_dropped_pool_lives_as_long_as_its_device():
    pool = Pool(256)
    device, nic = attach(pool)
    nic.receive(b"y" * 60)
    batch = pool.batch()
    del pool
    gc.collect()
    assert rx_batch(device.rx[0], batch, U(8)) == 1
    assert device.pool.memory.buffer[int(batch.packet[0]) & 0xFFFFFFFF].octets[:60].tobytes() == b"y" * 60
    device.close()


@pytest.mark.safety(MARK)
def test_queues_keep_their_memory_and_an_open_device_stays_open():
    """A device that nobody refers to goes on: who holds a queue of it uses a live one."""
    device, nic = attach(Pool(256))
    rxq, name, batch = device.rx[0], id(device), device.pools[0].batch()
    del device
    gc.collect()
    nic.receive(b"z" * 60)
    assert rx_batch(rxq, batch, U(8)) == 1 and nic.pages
    next(one for one in device_module._open if id(one) == name).close()
    gc.collect()
    for record in (rxq.ring, rxq.state, rxq.regs, rxq.pool.table, rxq.pool.memory):
        record.tobytes()  # all still mapped
    assert not rxq.ring.desc["addr"].any()


END = """
import atexit, time
seen = []
atexit.register(lambda: print(seen[0].ended is not None, seen[1].closed))  # registered first, it runs last
from test_safety_memory import Forwarder, Pool, attach, drop
device, nic = attach(Pool(256))
forwarder = Forwarder([device], drop).start()
while not forwarder.count("passes"):
    forwarder.check()
    time.sleep(0.01)
seen += [forwarder, nic]
"""


@pytest.mark.safety(MARK)
def test_the_end_of_the_interpreter_stops_kernels_and_closes_devices():
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")


# ---- the protection is the cause


def kept_queue():
    """Receives on a queue of a closed device: how many packets, and how many buffers its pool then has left."""
    pool = Pool(256)
    device, _ = attach(pool)
    rxq, batch = device.rx[0], pool.batch()
    device.close()
    rxq.ring.desc["done"][:3] = 3 | 60 << 32  # as if somebody had written there since
    return int(rx_batch(rxq, batch, U(8))), pool.available


VIOLATIONS = {"kept queue": kept_queue}


@checked
@pytest.mark.safety(MARK)
def test_without_the_protection_a_closed_queue_hands_out_what_is_no_longer_its_own():
    assert outcomes(VIOLATIONS) == {"kept queue": "ClosedError"}
    assert outcomes_without("test_safety_memory", MARK) == {"kept queue": "(3, 253)"}
