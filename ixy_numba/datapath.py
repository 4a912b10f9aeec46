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
from numba.core.errors import NumbaError
from numba.extending import NativeValue, models, overload, register_model, typeof_impl, unbox

from .core import lifetime
from .core.dispatch import dispatched, verb
from .core.errors import ClosedError, UsageError
from .core.integers import wrapping_sub
from .core.jit import OPTIONS, fingerprint, kernel, module_of
from .core.memory import new_record
from .core.mmio import cycles, likely, load_acquire
from .core.packet import packet_type, view
from .core.pool import (
    ADDRESS_SHIFT,
    BUFFER_SIZE,
    LENGTH_MASK,
    LENGTH_SHIFT,
    ONE,
    ZERO,
    U,
    index_of,
    leave,
    sendable,
    take,
    word_of,
)
from .waiting import MAX_PORTS, WAIT, rest

EMPTY = U(1 << 16)  # what rx_next says instead of a length; 16 bits of a descriptor cannot be mistaken for it
# In every driver's transmit state: since when (in cycles) the ring has been full, noted by forward_loop, 0 again when
# the driver takes sent buffers back; and the packets that were dropped because it did not move.
TX_COUNTERS = [("stalled", "u8"), ("dropped", "u8")]
STALL_LIMIT = U(1 << 33)  # cycles: some 2 to 4 seconds on x86-64


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
    the caller's packets are counted in the pool's `bad_handles` and skipped. Buffers of packets sent before return to
    the pool first.
    """


@verb
def rx_start(rxq):
    """The position of the next descriptor to look at."""


@verb
def rx_next(rxq, position):
    """The length of the packet received at `position`; EMPTY if there is none yet, or one that is broken."""


@verb
def rx_broken(rxq, position):
    """Whether something was received at `position` that makes no sense: no whole frame, or longer than its buffer."""


@verb
def rx_prefetch(rxq, position):
    """Bring the first bytes of the packet at `position` into the cache, if there is one by now."""


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

    `bus_addr` is where the device sees the buffer: whoever calls has just loaded it from the pool's table.
    """


@verb
def tx_finish(txq, position):
    """Hand all filled descriptors before `position` to the device."""


@kernel
def send_batch(txq, batch, first, end):
    """`tx_batch` in those steps: what drivers register, unless theirs has a better way."""
    table, size = txq.pool.table, U(len(batch.packet))
    k, end = min(U(first), size), min(U(end), size)
    lifetime.enter(txq.state)
    tail = tx_start(txq)
    last = min(end, k + tx_space(txq))
    while k < last:
        handle = batch.packet[k]
        if likely(sendable(txq.pool, handle)):
            index = index_of(table, handle)
            tail = tx_post(txq, tail, index, leave(table, index), handle >> LENGTH_SHIFT & LENGTH_MASK)
        else:
            table.bad_handles += ONE
            last = min(end, last + ONE)  # it took no descriptor
        k += ONE
    if tail != txq.state.tail:
        tx_finish(txq, tail)
    lifetime.leave(txq.state)
    return k


# ---- handlers

DROP = -1  # a verdict: the packet goes nowhere
_FAILED, _UNDECIDED, _BROKEN, _FULL = -2, -3, -4, -5
_WAITS = U(0xFFFFFFFF)  # no buffer's index
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
        kind = HandlerType(f"handler {module_of(self.function)}.{self.__qualname__} {fingerprint(self.function)}")
        _handlers[kind.name] = self
        return kind

    def explain(self, state, error):
        """Why Numba refused the handler, as one line that names the handler's own line."""
        where = f"{self.function.__code__.co_filename}:{self.function.__code__.co_firstlineno}"
        try:
            kinds = (packet_type, numba.typeof(state))[: 2 if self.takes_state else 1]
            self.kernel.compile(kinds)  # alone: the loop around it would only blur the message
            result = self.kernel.overloads[kinds].signature.return_type
            if isinstance(result, types.Integer):
                return f"handler {self.__name__}: {error}"
            reason = f"returns {result}, expected a port's index or DROP on every path"
        except ValueError:  # of typeof
            reason = f"its state is a {type(state).__name__}; expected a NumPy array, a record or a NamedTuple of them"
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


_judge = dispatched(_judge, _kernel_of, returns=types.Integer)


# ---- the loop

CONTROL = np.dtype([
    ("stop", "u8"),  # set by anyone: the loop ends after the pass it is in
    ("batch_size", "u8"), ("budget", "u8"),  # most packets a pass; most packets to forward, all told
    ("ports", "i8"),  # how many there are
    ("output", "i8", (MAX_PORTS,)), ("verdict", "i8", (MAX_PORTS,)),  # per arrival: last output, a verdict that waits
    ("forwarded", "u8"), ("dropped", "u8"), ("failed", "u8"), ("busy_cycles", "u8"), ("passes", "u8"),
    ("sample_length", "u8"), ("sample_port", "u8"), ("sample", "u1", (BUFFER_SIZE,)),  # the first packet that failed
    *WAIT,
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
    Ctrl-C. ClosedError if one of the devices is closed, or was before.
    """
    control = lane.control
    now, idle, closed = cycles(), ZERO, ZERO
    lifetime.occupy(rxqs, ONE)
    lifetime.occupy(txqs, ONE)
    while load_acquire(control, "stop") == ZERO and control.forwarded < control.budget:
        closed = lifetime.any_closed(rxqs) | lifetime.any_closed(txqs)
        if closed != ZERO:
            break
        moved = forward_round(rxqs, txqs, lane, 0)
        before, now = now, cycles()
        control.passes += ONE
        if moved != ZERO:
            control.busy_cycles += now - before
            idle = ZERO
        else:
            idle = rest(rxqs, control, idle, control.forwarded + control.dropped)
    lifetime.occupy(rxqs, ZERO)
    lifetime.occupy(txqs, ZERO)
    if closed != ZERO:
        raise ClosedError(lifetime.CLOSED)


# The tuples hold queues of different types: what runs over them is unrolled when it is compiled.
_UNROLLED = {"forceinline": True, **OPTIONS}
PREFETCH = U(8)  # how many packets ahead of the handler
FEW_PORTS = 2  # up to so many, the pass is compiled into the loop for each of them


def forward_round(rxqs, txqs, lane, port):
    """One pass over each of `rxqs`, the first being that of `port`; returns how many packets moved."""
    return sum(forward_pass(rxq, txqs, lane, port + k) for k, rxq in enumerate(rxqs))


@overload(forward_round, jit_options=_UNROLLED)
def _forward_round(rxqs, txqs, lane, port):
    one_pass = _inlined_pass if len(txqs) <= FEW_PORTS else forward_pass
    if len(rxqs) == 1:
        return lambda rxqs, txqs, lane, port: one_pass(rxqs[0], txqs, lane, port)
    return lambda rxqs, txqs, lane, port: (
        one_pass(rxqs[0], txqs, lane, port) + forward_round(rxqs[1:], txqs, lane, port + 1))


def _pass(rxq, txqs, lane, arrival):
    """Up to a batch of packets of one receive queue, each to the port that the handler says; returns how many.

    Packets for the port that the last one went to, or for none, go the short way of `_run`. The first for another port
    is dealt with alone, and `_run` goes on with that port.
    """
    control, arrival = lane.control, U(arrival)
    limit = min(control.batch_size, control.budget - control.forwarded)
    taken, verdict = ZERO, control.verdict[arrival]
    while taken < limit:
        if verdict == _UNDECIDED:
            n, verdict = _run_to(txqs, 0, rxq, lane, limit - taken, arrival)
            taken += n
            if verdict == _UNDECIDED:
                break
        if _settle(rxq, txqs, lane, arrival, verdict) == ZERO:
            break
        taken += ONE
        verdict = np.int64(_UNDECIDED)
    return taken


forward_pass, _inlined_pass = kernel(_pass), kernel(_pass, inline=True)


def _run_to(txqs, port, rxq, lane, limit, arrival):
    """`_run` with the queue of the last output; the first of `txqs` is that of `port`."""
    output = lane.control.output[arrival]
    return _run(rxq, txqs[output - port], lane, limit, (arrival, output))


@overload(_run_to, jit_options=_UNROLLED)
def _run_to_compiled(txqs, port, rxq, lane, limit, arrival):
    if len(txqs) == 1:
        return lambda txqs, port, rxq, lane, limit, arrival: _run(rxq, txqs[0], lane, limit, (arrival, port))

    def unrolled(txqs, port, rxq, lane, limit, arrival):
        if lane.control.output[arrival] == port:
            return _run(rxq, txqs[0], lane, limit, (arrival, port))
        return _run_to(txqs[1:], port + 1, rxq, lane, limit, arrival)

    return unrolled


@kernel(inline=True)
def _run(rxq, txq, lane, limit, route):
    """Packets of `rxq` in order, as long as they go to `txq` or nowhere; returns how many.

    `route` is the ports that they come in and go out: constants once this is inlined, so that a handler which always
    says the same costs nothing to ask.

    The second result is the verdict that ended this, on the packet that is then at the head of the ring, or _FULL when
    `txq` or the pool had no room at all. A buffer that is sent is replaced from the pool, one that is dropped stays.
    """
    control, table = lane.control, rxq.pool.table
    (arrival, output), verdict = route, np.int64(_UNDECIDED)
    room = tx_space(txq)
    top = table.top
    room = min(room, top)
    if room == ZERO:
        return ZERO, np.int64(_FULL)
    limit = min(limit, room)
    i, tail, n = rx_start(rxq), tx_start(txq), ZERO
    while n < limit:
        length = rx_next(rxq, i)
        if not likely(length != EMPTY):
            if rx_broken(rxq, i):
                verdict = np.int64(_BROKEN)
            break
        index = rx_buffer(rxq, i)
        rx_prefetch(rxq, i + PREFETCH)
        verdict = _decide(lane, view(rxq.pool.memory, index, length, arrival))
        if verdict == output:
            tail = tx_post(txq, tail, index, word_of(table, index) >> ADDRESS_SHIFT, length)
            index = take(table, top)
            top = wrapping_sub(top, ONE)  # limit <= top; below 0 `sent` would overflow
        elif verdict != DROP:
            break
        verdict = np.int64(_UNDECIDED)
        i = rx_refill(rxq, i, index)
        n += ONE
    if n != ZERO:
        sent = table.top - top
        if sent != ZERO:
            table.top = top
            tx_finish(txq, tail)  # before rx_finish: who sees the descriptors returned sees the packets sent
        rx_finish(rxq, i)
        control.forwarded += sent
        control.dropped += n - sent
    return n, verdict


@kernel
def _settle(rxq, txqs, lane, arrival, verdict):
    """Deal with the one packet at the head of the ring; returns 1, or 0 while it waits: then its verdict is kept."""
    control = lane.control
    position = rx_start(rxq)
    length, index = rx_next(rxq, position), rx_buffer(rxq, position)
    if length == EMPTY:
        if not rx_broken(rxq, position):
            return ZERO
        verdict = np.int64(_BROKEN)
    elif verdict == _FULL:
        verdict = _decide(lane, view(rxq.pool.memory, index, length, arrival))
    instead = index
    if 0 <= verdict < control.ports:
        control.output[arrival] = control.verdict[arrival] = verdict
        if rxq.pool.table.top == ZERO:
            _reclaim(txqs)
        instead = _send_to(txqs, verdict, index, length)
        if instead == _WAITS:
            return ZERO
    elif verdict == _BROKEN:
        rxq.state.errors += ONE
    elif verdict != DROP:
        _note_failure(control, view(rxq.pool.memory, index, length, arrival))
    control.verdict[arrival] = _UNDECIDED
    rx_finish(rxq, rx_refill(rxq, position, instead))
    if instead != index:
        control.forwarded += ONE
    else:
        control.dropped += ONE
    return ONE


def _reclaim(txqs):
    """Take back what any of the queues has sent: of those that nothing goes to now, nobody else would."""
    for txq in txqs:
        tx_space(txq)


@overload(_reclaim, jit_options=_UNROLLED)
def _reclaim_compiled(txqs):
    if len(txqs) == 1:
        return lambda txqs: tx_space(txqs[0])
    return lambda txqs: tx_space(txqs[0]) + _reclaim(txqs[1:])


def _send_to(txqs, output, index, length):
    """`_send` on the queue of `output`."""
    return _send(txqs[output], index, length)


@overload(_send_to, jit_options=_UNROLLED)
def _send_to_compiled(txqs, output, index, length):
    if len(txqs) == 1:
        return lambda txqs, output, index, length: _send(txqs[0], index, length)

    def unrolled(txqs, output, index, length):
        if output == 0:
            return _send(txqs[0], index, length)
        return _send_to(txqs[1:], output - 1, index, length)

    return unrolled


@kernel
def _send(txq, index, length):
    """Send one packet; returns the buffer to receive into instead: the same one if it is dropped, or _WAITS."""
    table = txq.pool.table
    if tx_space(txq) == ZERO:
        return index if _stalled(txq) else _WAITS
    if table.top == ZERO:
        table.empty += ONE
        return _WAITS
    tx_finish(txq, tx_post(txq, tx_start(txq), index, word_of(table, index) >> ADDRESS_SHIFT, length))
    instead = take(table, table.top)
    table.top -= ONE
    return instead


@kernel
def _stalled(txq):
    """Whether a full ring has not moved for so long (its link is down) that its packets are better dropped."""
    now = cycles()
    if txq.state.stalled == ZERO:
        txq.state.stalled = now
    if now < txq.state.stalled or now - txq.state.stalled <= STALL_LIMIT:
        return False
    txq.state.dropped += ONE
    return True


@kernel(inline=True)
def _decide(lane, packet):
    """The handler's verdict; _FAILED when it raises or returns a negative number that is not DROP."""
    try:
        verdict = max(np.int64(_judge(lane.handler, packet, lane.state)), np.int64(_FAILED))
    except Exception:
        verdict = np.int64(_FAILED)
    return verdict


@kernel
def _note_failure(control, packet):
    """Count a packet that the handler failed on, and keep the first, to explain it later."""
    if control.failed == ZERO:
        control.sample_port, control.sample_length = packet.port, len(packet)
        for k in range(len(packet)):
            control.sample[k] = packet[k]
    control.failed += ONE
