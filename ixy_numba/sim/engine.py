"""The engine: threads that move the frames of all running devices, each in a kernel without the interpreter."""

import contextlib
import itertools
import os
import threading
import time

import numpy as np

from ..core.capture import Clock, now_ns
from ..core.errors import IxyError, KernelError, UsageError
from ..core.jit import kernel
from ..core.libc import sleep_us
from ..core.memory import new_record
from ..core.mmio import cycles, fence, load_acquire, pause, store_release
from ..core.raw import load32
from .events import raise_events
from .receive import receive
from .state import BATCH, DEVICE, MAX_DEVICES, ONE, ZERO, U, enter, leave
from .transmit import transmit

CONTROL = np.dtype([("stop", "u8"), ("worker", "u8"), ("slice", "u8"), ("slots", "u8"), ("rounds", "u8")])
QUEUE_CONTROL, MAPPABLE_QUEUES = U(0x28), 64
SPINS, NAP_US = U(2000), U(50)  # idle rounds before the first nap


@kernel
def controls_changed(device):
    """Whether RXDCTL or TXDCTL of one of the 64 queues that can be mapped was written past the registers' handlers."""
    for k in range(MAPPABLE_QUEUES):
        rx, tx = device.rx[k], device.tx[k]
        if load32(rx.registers + QUEUE_CONTROL) != rx.control or load32(tx.registers + QUEUE_CONTROL) != tx.control:
            return True
    return False


@kernel
def visit(device, now, time_ns, budget):
    """One device's turn: up to `budget` frames received and as many descriptors a transmit queue. Returns the sum."""
    device.now = now
    if device.watched and controls_changed(device):
        device.attention = ONE
        return ZERO
    work = receive(device, now, budget)
    if device.tx_on:
        for k in range(device.tx_queues):
            queue = device.tx[device.tx_enabled[k]]
            if queue.enabled:
                work += transmit(device, queue, now, time_ns, budget)
    if device.direct:
        raise_events(device, now)
    if device.happened & device.armed or now >= device.alarm:
        device.attention = ONE
    return work


@kernel
def assign(device, worker):
    """Make `worker` (0: nobody) serve the device; visible to the workers when this returns."""
    store_release(device, "worker", worker)
    fence()


@kernel
def serve(control, devices, clock):
    """Turns for the devices of one worker, until it is told to stop, its slice ends or a device needs service."""
    idle, end = ZERO, cycles() + control.slice
    while load_acquire(control, "stop") == ZERO:
        store_release(control, "rounds", control.rounds + ONE)
        now, time_ns, work, attention = cycles(), now_ns(clock), ZERO, ZERO
        if now > end:
            return
        for slot in range(load_acquire(control, "slots")):
            device = devices[slot]
            if load_acquire(device, "worker") == control.worker and enter(device):
                work += visit(device, now, time_ns, U(BATCH))
                leave(device)
                attention |= device.attention
        if attention:  # once all had their turn: a device that always wants it must not starve the others
            return
        if work:
            idle = ZERO
        else:
            idle += ONE
            if idle > SPINS:
                sleep_us(NAP_US)
            else:
                pause()


class Engine:
    """All devices of the process and the threads that serve them.

    There are as many threads as devices, but on at most half of the processors; the thread that starts a device, and
    the threads that it starts later, run on the others. Left alone, the scheduler of a virtual machine was seen to keep
    the simulation and the driver on one processor for seconds while the other one was idle.
    """

    def __init__(self):
        self.devices = np.zeros(MAX_DEVICES, np.dtype((np.record, DEVICE)))
        self._free = list(reversed(range(MAX_DEVICES)))
        self._lock = threading.Lock()
        self._workers = {}
        self._clock = None
        self._running = {}  # slot: (worker, service)
        self._failed = {}  # slot: what its kernels raised
        self._processors, self._confined = None, set()  # before they were divided; threads that keep to their part

    @property
    def clock(self):
        if self._clock is None:
            self._clock = Clock()
        return self._clock

    @property
    def cycles_per_second(self):
        record = self.clock.record
        return 1e9 * 2**32 / int(record.multiplier[int(record.turn) & 1])

    def new_device(self):
        """(slot, zeroed state) for a device."""
        with self._lock:
            if not self._free:
                raise UsageError(f"a process can simulate {MAX_DEVICES} devices, all are in use; close one")
            slot = self._free.pop()
            self._failed.pop(slot, None)
        self.devices.view(np.uint8).reshape(MAX_DEVICES, -1)[slot] = 0
        return slot, self.devices[slot]

    def free_device(self, slot):
        with self._lock:
            self._free.append(slot)

    def compile(self):
        """Have all kernels ready, however long it takes."""
        control = new_record(CONTROL)
        control.stop = 1
        serve(control, self.devices, self.clock.record)

    def start(self, slot, service):
        """Let a worker serve the device; `service(wanted)` is called in its thread when the device wants Python."""
        with self._lock:
            ours = self._divide_processors()
            load = {number: 0 for number, worker in self._workers.items() if not worker.failed}
            for number, _ in self._running.values():
                if number in load:
                    load[number] += 1
            if not load or len(load) < len(ours) and all(load.values()):
                number = next(k for k in itertools.count(1) if k not in self._workers)
                self._workers[number] = _Worker(self, number, ours)
            else:
                number = min(load, key=load.get)
            self._running[slot] = number, service
            assign(self.devices[slot], U(number))
            control = self._workers[number].control
            control.slots = max(int(control.slots), slot + 1)

    def stop(self, slot):
        """No worker touches the device any more once this returns."""
        with self._lock:
            number, _ = self._running.pop(slot, (0, None))
            if not number:
                return
            assign(self.devices[slot], ZERO)
            worker = self._workers[number]
            if any(other == number for other, _ in self._running.values()):
                worker.finish_round()
                return
            del self._workers[number]
            worker.stop()
            if not self._workers:
                self._share_processors()

    def _divide_processors(self):
        """The processors for the simulation; the calling thread keeps to the others until all devices have stopped."""
        if self._processors is None:
            self._processors = sorted(os.sched_getaffinity(0))
        kept = max(1, len(self._processors) // 2)
        os.sched_setaffinity(0, self._processors[:kept])
        self._confined.add(threading.get_native_id())
        return self._processors[kept:] or self._processors

    def _share_processors(self):
        for thread in self._confined:
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(thread, self._processors)
        self._confined.clear()
        self._processors = None

    def check(self, slot):
        """IxyError if the device has failed, or the thread that serves it has died."""
        if error := self.failed(slot):
            raise IxyError(f"the simulated device failed: {error}") from error
        worker = self._workers.get(self._running.get(slot, (0, None))[0])
        if worker and worker.failed:
            raise IxyError(f"the simulation's thread died: {worker.failed}") from worker.failed

    def failed(self, slot):
        """What ended the device, or None."""
        return self._failed.get(slot)

    def fail(self, number, error):
        """A kernel of a worker raised `error`: the device that it was at is served no more, the others are."""
        broken = [slot for slot, (owner, _) in list(self._running.items())
                  if owner == number and self.devices[slot].busy]
        if not broken:
            raise error
        for slot in broken:
            self._failed[slot] = error
            assign(self.devices[slot], ZERO)
            self.devices[slot].busy = 0

    def service(self, number):
        """What the devices of a worker asked of Python."""
        self.clock.update()
        for slot, (owner, service) in list(self._running.items()):
            if owner == number and self.devices[slot].attention:
                self.devices[slot].attention = 0
                service()


class _Worker:
    def __init__(self, engine, number, processors):
        self.engine, self.number, self.processors = engine, number, processors
        self.control = new_record(CONTROL)
        self.control.worker = number
        self.control.slice = int(engine.cycles_per_second)  # a second: then the clock is compared with the system's
        self.failed = None
        self.thread = threading.Thread(target=self._run, name=f"82599 simulation {number}", daemon=True)
        self.thread.start()

    def _run(self):
        devices = self.engine.devices
        try:
            os.sched_setaffinity(0, self.processors)
            while not self.control.stop:
                try:
                    serve(self.control, devices, self.engine.clock.record)
                except (ArithmeticError, LookupError) as error:
                    self.engine.fail(self.number, KernelError.of(error))
                self.engine.service(self.number)
        except BaseException as error:  # reported by the devices' check()
            self.failed = error
            for device in self.engine.devices:
                if device.worker == self.number:
                    device.busy = 0

    def finish_round(self):
        """Wait until the kernel has begun another round, and so ended its visits of the last one."""
        before = int(self.control.rounds)
        self._wait(lambda: int(self.control.rounds) != before)

    def stop(self):
        self.control.stop = 1
        self._wait(lambda: False)

    def _wait(self, done, timeout_s=30.0):
        """Until `done()` or the end of the thread; the time does not count while its kernels are being compiled."""
        deadline = time.monotonic() + timeout_s
        while self.thread.is_alive() and not done():
            if not self.control.rounds:
                deadline = time.monotonic() + timeout_s
            elif time.monotonic() > deadline:
                raise IxyError(f"the simulation's thread did not answer within {timeout_s} s")
            self.thread.join(0.001)


ENGINE = Engine()
