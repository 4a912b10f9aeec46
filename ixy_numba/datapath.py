"""The verbs of the data path, and the loop that runs a handler between receive and transmit.

A verb is one name for the same operation of every driver; which kernel it means is decided when the caller is compiled,
by the type of the queue. Two ways to use this module:

- a handler, `@handler def f(packet) -> port`, compiled with the driver into one loop: `forward_loop`;
- the batch verbs `rx_batch`, `tx_batch`, `alloc_batch`, `free_batch`, for applications that keep or make packets.
"""

import functools
import inspect
import os
import re
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.core.errors import NumbaError, TypingError
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import NativeValue, models, overload, register_model, typeof_impl, unbox

from .core.errors import UsageError
from .core.jit import CHECKED, fingerprint, kernel
from .core.memory import new_record
from .core.mmio import cycles, load_acquire, pause
from .core.packet import packet_type, view
from .core.pool import BUFFER_SIZE, ONE, ZERO, U, bus_addr

EMPTY, BROKEN = U(0), U(0xFFFFFFFF)  # what rx_next says instead of a length
# In every driver's transmit state, kept by forward_loop: since when (in cycles) the ring has been full, packets lost by it.
TX_COUNTERS = [("stalled", "u8"), ("dropped", "u8")]


def _dispatched(stub, choose):
    """A function that calls the kernel which `choose(first argument, its class)` gives, on that slice of the arguments.

    Works on values in plain Python, and on types while Numba compiles a caller.
    """

    @functools.wraps(stub)
    def call(*args):
        chosen, part = choose(args[0], type(args[0]))
        return chosen(*args[part])

    def at_compile_time(kinds):
        return choose(kinds[0], getattr(kinds[0], "instance_class", None))

    class Template(AbstractTemplate):
        key = call

        def generic(self, args, kws):
            chosen, part = at_compile_time(args)
            template, _, inner, kws = chosen.get_call_template(args[part], kws)
            return signature(template(self.context).apply(inner, kws).return_type, *args)

    infer_global(call, types.Function(Template))

    @lower_builtin(call, types.VarArg(types.Any))
    def lower(context, builder, sig, args):
        chosen, part = at_compile_time(sig.args)
        inner = signature(sig.return_type, *sig.args[part])
        return context.get_function(types.Dispatcher(chosen), inner)(builder, args[part])

    return call


def verb(stub):
    """Make `stub` (a name and its contract) a verb; drivers add `@stub.implement(QueueClass)` kernels."""
    kernels = {}

    def choose(queue, queue_class):
        if queue_class not in kernels:
            raise TypingError(f"{stub.__name__}: expected a queue of a device as the first argument, got {queue}")
        return kernels[queue_class], slice(None)

    def implement(queue_class):
        return lambda function: kernels.setdefault(queue_class, function)

    call = _dispatched(stub, choose)
    call.implement = implement
    return call


@verb
def rx_batch(rxq, batch, limit):
    """Take up to `limit` (at most 256) received packets: handles in batch.packet[0:n]; returns n. The caller owns them.

    Descriptors that make no sense are counted (`rxq.state.errors`) and their buffers used again. An empty pool ends the
    batch early and is counted.
    """


@verb
def tx_batch(txq, batch, first, end):
    """Send packets batch.packet[first:end] in order; returns the index of the first one NOT taken.

    Those from the returned index on stay the caller's (the ring is full): try again or free them. Handles that are not
    the caller's packets are counted in the pool's `bad_handles` and skipped.
    """


@verb
def rx_start(rxq):
    """The position of the next descriptor to look at."""


@verb
def rx_next(rxq, position):
    """The length of the packet received at `position`; EMPTY if there is none yet, BROKEN if it makes no sense."""


@verb
def rx_buffer(rxq, position):
    """The index of the buffer at `position`."""


@verb
def rx_refill(rxq, position, index):
    """Give the descriptor at `position` the buffer `index` to receive into; returns the next position."""


@verb
def rx_finish(rxq, position):
    """Hand all refilled descriptors before `position` to the device."""


@verb
def tx_space(txq):
    """Take back the buffers that the device has sent; returns how many descriptors are free."""


@verb
def tx_start(txq):
    """The position of the next descriptor to fill."""


@verb
def tx_post(txq, position, index, bus_addr, length):
    """Put a packet of `length` bytes, buffer `index` of the queue's pool, at `position`; returns the next position.

    `bus_addr` is `pool.bus_addr(table, index)`: whoever calls has just loaded it.
    """


@verb
def tx_finish(txq, position):
    """Hand all filled descriptors before `position` to the device."""


# ---- handlers

DROP = -1  # a verdict: the packet goes nowhere
_FAILED, _UNDECIDED, _BROKEN = -2, -3, -4
MAX_PORTS = 16
_handlers = {}


class HandlerType(types.Opaque):
    """A handler in Numba's type system. Its name carries the code's fingerprint, so caches find it across processes."""

    def __init__(self, name):
        super().__init__(name)


register_model(HandlerType)(models.OpaqueModel)


class Handler:
    """What the `handler` decorator makes of a function. Called from Python, it runs on a `core.packet.Packet`."""

    def __init__(self, function):
        parameters = len(inspect.signature(function).parameters)
        if parameters not in (1, 2):
            raise UsageError(f"handler {function.__name__}: expected (packet) or (packet, state), got "
                             f"{parameters} parameters")
        self.function, self.takes_state = function, parameters == 2
        self.kernel = kernel(function, inline=True)
        functools.update_wrapper(self, function)

    @functools.cached_property
    def type(self):
        kind = HandlerType(f"handler {self.function.__module__}.{self.__qualname__} {fingerprint(self.function)}")
        _handlers[kind.name] = self
        return kind

    def explain(self, state, error):
        """Why Numba refused the handler, as one line that names the handler's own line."""
        kinds = (packet_type, numba.typeof(state))[: 2 if self.takes_state else 1]
        where = f"{self.function.__code__.co_filename}:{self.function.__code__.co_firstlineno}"
        try:
            self.kernel.compile(kinds)  # alone: the loop around it would only blur the message
            result = self.kernel.overloads[kinds].signature.return_type
            if isinstance(result, types.Integer):
                return f"handler {self.__name__}: {error}"
            reason = f"returns {result}, expected a port's index or DROP on every path"
        except NumbaError as refused:
            text = str(refused)
            lines = re.findall(rf'File "([^"]*{re.escape(os.path.basename(where.split(":")[0]))})", line (\d+)', text)
            where = f"{self.function.__code__.co_filename}:{lines[-1][1]}" if lines else where
            words = [line.strip() for line in text.splitlines() if line.strip()]
            reason = next((word for word in words if not word.startswith("Failed in")), text)
        return f"{where}: handler {self.__name__} does not compile: {reason}"

    def __call__(self, packet, state=None):
        return self.function(packet, state) if self.takes_state else self.function(packet)


def handler(function):
    """Compile `def f(packet)` or `def f(packet, state)` into the forwarding loop.

    `packet` is a `core.packet.Packet`; `packet.port` says where it came in. The function returns the index of the port
    to send the packet to, or DROP. `state` is whatever the loop was given: a NumPy array, a record, or a NamedTuple of
    them. An exception drops the packet and is counted.
    """
    return Handler(function)


@typeof_impl.register(Handler)
def _typeof_handler(value, context):
    return value.type


@unbox(HandlerType)
def _unbox_handler(kind, value, context):
    return NativeValue(context.context.get_dummy_value())


def _judge(handler, packet, state):
    """The handler's verdict on one packet."""


def _kernel_of(handler, _):
    handler = handler if isinstance(handler, Handler) else _handlers[handler.name]
    return handler.kernel, slice(1, 3 if handler.takes_state else 2)


_judge = _dispatched(_judge, _kernel_of)


# ---- the loop

CONTROL = np.dtype([
    ("stop", "u8"),  # set by anyone: the loop ends after the pass it is in
    ("batch_size", "u8"), ("budget", "u8"),  # most packets a pass; most packets to forward, all told
    ("ports", "i8"), ("arrival", "u8"),  # how many ports there are; the one the current pass receives on
    ("output", "i8", (MAX_PORTS,)), ("verdict", "i8", (MAX_PORTS,)),  # per arrival: last output, a verdict that waits
    ("forwarded", "u8"), ("dropped", "u8"), ("failed", "u8"), ("busy_cycles", "u8"), ("passes", "u8"),
    ("sample_length", "u8"), ("sample_port", "u8"), ("sample", "u1", (BUFFER_SIZE,)),  # the first packet that failed
])


class Lane(NamedTuple):
    """One thread's share of the work: a handler, its state, and the loop's control record."""

    handler: Any
    state: Any
    control: np.record


def new_control(ports, batch_size, budget=None):
    """A control record for `forward_loop`; `budget` None means no end."""
    control = new_record(CONTROL)
    control.ports, control.batch_size = ports, batch_size
    control.budget = (1 << 64) - 1 if budget is None else budget
    control.verdict = _UNDECIDED
    return control


@kernel
def forward_loop(rxqs, txqs, lane):
    """Receive on every queue of the tuple `rxqs`, ask the handler, send on the tuple `txqs`, until told to stop.

    Queue k of both belongs to port k. All of them share one pool. Ends when control.stop is set or control.budget
    packets are forwarded; nothing is left half-done then. Run it in a thread of its own: it holds no GIL and sees no
    Ctrl-C.
    """
    control = lane.control
    now = cycles()
    while load_acquire(control, "stop") == ZERO and control.forwarded < control.budget:
        moved = _each_port(rxqs, txqs, lane, 0)
        before, now = now, cycles()
        control.passes += ONE
        if moved != ZERO:
            control.busy_cycles += now - before
        else:
            pause()


def _each_port(rxqs, txqs, lane, port):
    """One pass over the receive queues from `port` on; returns how many packets moved."""
    return sum(forward_pass(rxq, txqs, lane, port + k) for k, rxq in enumerate(rxqs))


@overload(_each_port, jit_options={"forceinline": True, "boundscheck": CHECKED})
def _each_port_compiled(rxqs, txqs, lane, port):
    if len(rxqs) == 1:
        return lambda rxqs, txqs, lane, port: forward_pass(rxqs[0], txqs, lane, port)

    def unrolled(rxqs, txqs, lane, port):
        return forward_pass(rxqs[0], txqs, lane, port) + _each_port(rxqs[1:], txqs, lane, port + 1)

    return unrolled


@kernel
def forward_pass(rxq, txqs, lane, arrival):
    """Up to a batch of packets of one receive queue, each to the port that the handler says; returns how many."""
    control, arrival = lane.control, U(arrival)
    control.arrival = arrival
    limit = min(control.batch_size, control.budget - control.forwarded)
    taken = ZERO
    while True:
        taken += _to_output(txqs, rxq, lane, limit - taken, control.output[arrival])
        verdict = control.verdict[arrival]
        if taken >= limit or verdict == _UNDECIDED or verdict == control.output[arrival]:
            return taken  # batch full, ring empty, or the output full: the packet waits
        if 0 <= verdict < control.ports:
            control.output[arrival] = verdict
        else:
            _note_failure(rxq, control, verdict)
            control.verdict[arrival] = DROP


def _to_output(txqs, rxq, lane, limit, output):
    """`_run` with the output's queue, which may be of another type than its neighbours."""
    return _run(rxq, txqs[output], lane, limit)


@overload(_to_output, jit_options={"forceinline": True, "boundscheck": CHECKED})
def _to_output_compiled(txqs, rxq, lane, limit, output):
    if len(txqs) == 1:
        return lambda txqs, rxq, lane, limit, output: _run(rxq, txqs[0], lane, limit)

    def unrolled(txqs, rxq, lane, limit, output):
        if output == 0:
            return _run(rxq, txqs[0], lane, limit)
        return _to_output(txqs[1:], rxq, lane, limit, output - 1)

    return unrolled


@kernel
def _run(rxq, txq, lane, limit):
    """Packets of `rxq` in order, as long as they go to `txq` or nowhere; returns how many.

    Stops at a packet with any other verdict, or when `txq` or the pool has no room: that verdict waits in
    control.verdict, the packet itself at the head of its ring. A buffer that is sent is replaced from the pool, one that
    is dropped stays.
    """
    control, table, arrival = lane.control, rxq.pool.table, lane.control.arrival
    output, verdict = control.output[arrival], control.verdict[arrival]
    room = tx_space(txq)
    if room == ZERO:
        verdict = _stalled(txq, verdict)
    else:
        txq.state.stalled = ZERO
    top = table.top
    room = min(room, top)
    i, tail = rx_start(rxq), tx_start(txq)
    n, sent = ZERO, ZERO
    while n < limit:
        length = rx_next(rxq, i)
        if length == EMPTY:
            break
        index = rx_buffer(rxq, i)
        if verdict == _UNDECIDED:
            verdict = _decide(lane, view(rxq.pool.memory, index, length, arrival), length)
        if verdict == output:
            if sent == room:
                break
            sent += ONE
            tail = tx_post(txq, tail, index, bus_addr(table, index), length)
            index = U(table.free[top - sent])
        elif verdict != DROP:
            break
        i = rx_refill(rxq, i, index)
        n += ONE
        verdict = _UNDECIDED
    control.verdict[arrival] = verdict
    if sent != ZERO:
        table.top = top - sent
        tx_finish(txq, tail)  # before rx_finish: who sees the descriptors returned sees the packets sent
    elif room == top:
        table.empty += U(room == ZERO and verdict == output)
    if n != ZERO:
        rx_finish(rxq, i)
    control.forwarded += sent
    control.dropped += n - sent
    return n


@kernel(inline=True)
def _decide(lane, packet, length):
    """The handler's verdict; _FAILED when it raises, _BROKEN when the device's descriptor makes no sense."""
    if length == BROKEN:
        return np.int64(_BROKEN)
    try:
        verdict = max(np.int64(_judge(lane.handler, packet, lane.state)), np.int64(_FAILED))
    except Exception:
        verdict = np.int64(_FAILED)
    return verdict


@kernel
def _note_failure(rxq, control, verdict):
    """Count the packet at the head of its ring, and keep the first that the handler failed on, to explain it later."""
    if verdict == _BROKEN:
        rxq.state.errors += ONE
        return
    position = rx_start(rxq)
    index, length = rx_buffer(rxq, position), rx_next(rxq, position)
    if control.failed == ZERO:
        control.sample_port, control.sample_length = control.arrival, length
        for k in range(length):
            control.sample[k] = rxq.pool.memory.buffer[index].octets[k]
    control.failed += ONE


STALL_LIMIT = U(1 << 33)  # cycles: some 2 to 4 seconds on x86-64


@kernel
def _stalled(txq, verdict):
    """A full ring: packets wait, but not for ever on a port that sends nothing (its link is down)."""
    now = cycles()
    if txq.state.stalled == ZERO:
        txq.state.stalled = now
    if verdict != _UNDECIDED and now > txq.state.stalled and now - txq.state.stalled > STALL_LIMIT:
        txq.state.dropped += ONE
        return np.int64(DROP)
    return verdict
