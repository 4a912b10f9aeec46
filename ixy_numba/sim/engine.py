"""The engine: threads that move the frames of all running devices, each in a kernel without the interpreter."""

import itertools
import os
import threading
import time

import numpy as np

from ..core.capture import Clock, now_ns
from ..core.errors import IxyError, UsageError
from ..core.jit import kernel
from ..core.memory import new_record
from ..core.mmio import cycles, load_acquire, pause
from .libc import sleep_us
from .receive import receive
from .state import BATCH, DEVICE, MAX_DEVICES, ONE, ZERO, U, enter, leave
from .transmit import transmit

CONTROL = np.dtype([("stop", "u8"), ("worker", "u8"), ("slice", "u8"), ("slots", "u8")])
SPINS, NAP_US = U(2000), U(50)  # idle rounds before the first nap


@kernel
def visit(device, now, time_ns, budget):
    """One device's turn: up to `budget` frames received and as many descriptors a transmit queue. Returns the sum."""
    work = receive(device, now, budget)
    if device.tx_on:
        for k in range(device.tx_queues):
            queue = device.tx[device.tx_enabled[k]]
            if queue.enabled:
                work += transmit(device, queue, now, time_ns, budget)
    return work


@kernel
def serve(control, devices, clock):
    """Turns for the devices of one worker, until it is told to stop, its slice ends or a device needs service."""
    idle, end = ZERO, cycles() + control.slice
    while load_acquire(control, "stop") == ZERO:
        now, time_ns, work = cycles(), now_ns(clock), ZERO
        if now > end:
            return
        for slot in range(load_acquire(control, "slots")):
            device = devices[slot]
            if load_acquire(device, "worker") == control.worker and enter(device):
                work += visit(device, now, time_ns, U(BATCH))
                leave(device)
                if device.attention:
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
        self._processors = None  # before they were divided

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
        self.devices.view(np.uint8).reshape(MAX_DEVICES, -1)[slot] = 0
        return slot, self.devices[slot]

    def free_device(self, slot):
        with self._lock:
            self._free.append(slot)

    def start(self, slot, service):
        """Let a worker serve the device; `service(wanted)` is called in its thread when the device wants Python."""
        with self._lock:
            ours = self._divide_processors()
            load = {number: 0 for number in self._workers}
            for number, _ in self._running.values():
                load[number] += 1
            if len(load) < len(ours) and all(load.values()):
                number = next(k for k in itertools.count(1) if k not in load)
                self._workers[number] = _Worker(self, number, ours)
            else:
                number = min(load, key=load.get)
            self._running[slot] = number, service
            self.devices[slot].worker = number
            control = self._workers[number].control
            control.slots = max(int(control.slots), slot + 1)

    def stop(self, slot):
        """No worker touches the device any more, once the state has been claimed or this returned."""
        with self._lock:
            number, _ = self._running.pop(slot, (0, None))
            self.devices[slot].worker = 0
            if not number or any(other == number for other, _ in self._running.values()):
                return
            worker = self._workers.pop(number)
            if not self._workers:
                os.sched_setaffinity(0, self._processors)
                self._processors = None
        worker.stop()

    def _divide_processors(self):
        """The processors for the simulation; the calling thread keeps to the others."""
        if self._processors is None:
            self._processors = os.sched_getaffinity(0)
        usable = sorted(self._processors)
        kept = max(1, len(usable) // 2)
        os.sched_setaffinity(0, usable[:kept])
        return usable[kept:] or usable

    def check(self, slot):
        """IxyError if the thread that serves the device has died."""
        worker = self._workers.get(self._running.get(slot, (0, None))[0])
        if worker and worker.failed:
            raise IxyError(f"the simulation's thread died: {worker.failed}") from worker.failed

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
                serve(self.control, devices, self.engine.clock.record)
                self.engine.service(self.number)
        except BaseException as error:  # reported by the devices' check()
            self.failed = error

    def stop(self, timeout_s=30.0):
        self.control.stop = 1
        deadline = time.monotonic() + timeout_s
        while self.thread.is_alive():
            if time.monotonic() > deadline:
                raise IxyError(f"the simulation's thread did not stop within {timeout_s} s")
            self.thread.join(0.05)


ENGINE = Engine()
