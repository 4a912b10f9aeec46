"""Run a handler between devices: one thread a queue, each with its own rings, pool and state."""

import copy

import numpy as np
from numba.core.errors import NumbaError

from .core.errors import IxyError, UsageError
from .core.packet import Packet
from .core.thread import KernelThread
from .datapath import DROP, MAX_PORTS, Handler, Lane, forward_loop, new_control
from .in_place import in_place_loop
from .waiting import TIMEOUT_MS, prepare

MAX_TIMEOUT_MS = 10_000


class Forwarder:
    """Forward between `devices` as `handler` says: `with Forwarder(devices, handler) as forwarder: …`.

    Port k is devices[k]. With several queues each has a thread of its own and a deep copy of `state`: see `states`.
    `packets` ends the run once that many are forwarded (exactly with one queue, at least with more).
    `in_place`, for two devices opened with `open_devices(…, in_place=True)`: packets are sent from where they were
    received, which is fastest, but can only go to the other port or nowhere; any other verdict is a failure.
    `interrupts`, for devices opened with `open_devices(…, interrupts=True)`: while little or nothing arrives, the
    threads sleep until something does, and at most `timeout_ms` at a time.
    Raises UsageError if the devices do not share their pools (`open_devices` sees to that).
    """

    def __init__(self, devices, handler, *, state=None, batch_size=32, packets=None, in_place=False, interrupts=False,
                 timeout_ms=TIMEOUT_MS):
        if not isinstance(handler, Handler):
            raise UsageError(f"{handler!r}: expected a function under the @handler decorator")
        if not 1 <= len(devices) <= MAX_PORTS:
            raise UsageError(f"{len(devices)} devices: expected 1 to {MAX_PORTS}")
        if not 1 <= batch_size <= 256:
            raise UsageError(f"batch size {batch_size}: expected 1 to 256")
        if packets is not None and packets < 0:
            raise UsageError(f"{packets} packets: expected 0 or more")
        if handler.takes_state != (state is not None):
            raise UsageError(f"handler {handler.__name__}: "
                             + ("takes a state, none was given" if state is None else "takes no state, one was given"))
        for device in devices[1:]:
            if list(map(id, device.pools)) != list(map(id, devices[0].pools)):
                raise UsageError(f"{devices[0].name} and {device.name} have pools of their own; open them with "
                                 "open_devices, or open the second with pools=first.pools")
        if any(device.in_place != in_place for device in devices) or in_place and len(devices) != 2:
            raise UsageError("to forward in place, open two devices with open_devices(…, in_place=True) and say "
                             "in_place=True here; to forward otherwise, in neither place")
        if interrupts and not all(device.events for device in devices):
            raise UsageError("to sleep until an interrupt, open all devices with open_devices(…, interrupts=True)")
        if not 1 <= timeout_ms <= MAX_TIMEOUT_MS:
            raise UsageError(f"a time-out of {timeout_ms} ms: expected 1 to {MAX_TIMEOUT_MS}")
        held = sum(device.ring_size + device.UNREPORTED for device in devices)
        for pool in () if in_place else devices[0].pools:
            if pool.usable <= held:
                raise UsageError(f"a pool with {pool.usable} buffers for {len(devices)} device(s): more than {held} "
                                 "are needed for their rings; make a larger one")
        self.devices, self.handler, self.packets, self.in_place = devices, handler, packets, in_place
        queues = devices[0].queues
        self.states = [state] + [copy.deepcopy(state) for _ in range(queues - 1)]
        self.controls = [new_control(len(devices), batch_size, packets) for _ in range(queues)]
        self._threads = [self._thread(k, timeout_ms if interrupts else None) for k in range(queues)]

    def _thread(self, k, timeout_ms):
        rxqs = tuple(device.rx[k] for device in self.devices)
        txqs = tuple(device.tx[k] for device in self.devices)
        loop = in_place_loop if self.in_place else forward_loop
        wake = None
        if timeout_ms is not None:
            wake = prepare(self.controls[k], [device.events[k] for device in self.devices], timeout_ms)
        return KernelThread(loop, rxqs, txqs, Lane(self.handler, self.states[k], self.controls[k]), wake=wake)

    def start(self):
        for thread in self._threads:
            thread.start()
        return self

    def stop(self, timeout_s=60.0):
        """End the loops after the pass they are in. IxyError if one that is compiled has not within `timeout_s` s."""
        for thread in self._threads:
            thread.tell(1)
        for thread in self._threads:
            if thread.ident is not None and not thread.end(timeout_s):
                raise IxyError(f"{thread.name} did not end within {timeout_s} s; its devices are left as they are")
        self.check()

    def check(self):
        """Raise what went wrong: a handler that does not compile, a device or file that failed."""
        for thread, state in zip(self._threads, self.states, strict=True):
            if isinstance(thread.error, NumbaError):
                raise UsageError(self.handler.explain(state, thread.error))
            if thread.error is not None:
                raise thread.error
        for device in self.devices:
            device.check()

    @property
    def began(self):
        """When the first loop began (time.monotonic()), once all of them have; None while one is being compiled."""
        times = [thread.began for thread in self._threads]
        return None if None in times else min(times)

    @property
    def ended(self):
        """When the last loop ended; None while one runs."""
        times = [thread.ended for thread in self._threads]
        return None if None in times else max(times)

    @property
    def finished(self):
        """Whether the run came to its own end: the count is reached, or every input has ended and is dealt with."""
        if self.packets is not None and self.count("forwarded") >= self.packets:
            return True
        buses = [device.bus for device in self.devices]
        # Twice: what the first look saw received may have been on its way to a device looked at before.
        return any(bus.finite for bus in buses) and all(bus.finished for _ in range(2) for bus in buses)

    def count(self, name):
        """The sum over all lanes of a field of the control records: `forwarded`, `dropped` (by the handler), `failed`,
        `busy_cycles`, `passes`, `sleeps`.
        """
        return sum(int(control[name]) for control in self.controls)

    def explain_failure(self):
        """What the handler did wrong on the first packet that it failed on, or None.

        The packet is replayed in the interpreter, so that the message can name the handler's own line. The state is a
        copy of what it is now.
        """
        for control, state in zip(self.controls, self.states, strict=True):
            if control.failed:
                length = int(control.sample_length)
                packet = Packet(control.sample[:length].copy(), int(control.sample_port))
                ports = [1 - packet.port] if self.in_place else range(len(self.devices))
                return _replay(self.handler, packet, copy.deepcopy(state), ports)
        return None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


def _replay(handler, packet, state, ports):
    code = handler.function.__code__
    where = f"handler {handler.__name__} ({code.co_filename}:{code.co_firstlineno})"
    try:
        with np.errstate(all="ignore"):
            verdict = handler(packet, state)
    except Exception as error:
        trace, line = error.__traceback__, code.co_firstlineno
        while trace is not None:
            if trace.tb_frame.f_code is code:
                line = trace.tb_lineno
            trace = trace.tb_next
        return f"{code.co_filename}:{line}: handler {handler.__name__}: {type(error).__name__}: {error}"
    if verdict == DROP or verdict in ports:
        return f"{where}: failed on a packet of {len(packet)} bytes, but not again on the same packet"
    expected = f"a port from 0 to {ports[-1]}" if ports[0] == 0 < ports[-1] else f"port {ports[0]}"
    return f"{where}: returned {verdict}; expected {expected}, or DROP"
