"""The bus that plugs the simulated 82599 into a driver, with what is at the other end of its cable."""

import itertools
import sys
import threading
import time

import numpy as np

from ..bus import Bus, parse_options
from ..core.capture import Capture, CaptureWriter
from ..core.errors import IxyError
from ..core.memory import ANY
from .cable import Cable, open_tap
from .engine import ENGINE
from .events import Events
from .model import Model
from .spec import Spec, parse
from .state import BATCH, CAPTURE, FILE, GENERATOR, INBOX, LINK, SCRATCH_SIZE, TAP, UNPLUGGED, U
from .template import template

ENDLESS = 1 << 62
_numbers = itertools.count(1)


class SimBus(Bus):
    """A simulated device. With `manual=True` nothing moves but by `step()`, on a clock of its own that starts at 0."""

    vendor = 0x8086
    simulated = True
    memory_needs = ANY

    def __init__(self, name="sim", spec=None, manual=False):
        self.name, self.manual, self.spec = name, manual, spec or Spec()
        self.device, self.finite = self.spec.device, self.spec.finite
        number = next(_numbers)
        mac = self.spec.mac or bytes((2, 0x82, 0x59, 0x90, number >> 8 & 255, number & 255))
        self.model = Model(mac, self.device, 1e9 if manual else ENGINE.cycles_per_second)
        self.bar0 = self.model.bar0
        self._lock, self._failure, self._closed, self._started = threading.Lock(), None, False, False
        self._capture = self._writer = self._tap = self._cable = self._events = None
        self._now_ns, self._epoch_ns = 0, time.time_ns()
        try:
            self._connect_source()
            self._connect_sink()
        except BaseException:
            self.close()
            raise

    # The seam to the driver

    def read32(self, offset):
        return self.model.read(offset)

    def write32(self, offset, value):
        self.model.write(offset, value)

    def doorbell(self, offset, writer):
        return self.model.doorbell(offset, writer)

    def enable_interrupts(self, vectors):
        self.disable_interrupts()
        self._events = Events(vectors)
        self.model.connect(self._events, self._events.files)
        return self._events.files

    def disable_interrupts(self):
        if self._events:
            self.model.connect(None)
            self._events.close()
            self._events = None

    def map_dma(self, memory):
        self.model.map(memory.iova, memory.size, memory.virtual_address)
        return memory.iova + np.arange(memory.size // memory.page_size, dtype=np.uint64) * U(memory.page_size)

    def unmap_dma(self, memory):
        self.model.unmap(memory.iova)

    def start(self):
        if not self.manual and not self._started:
            self._started = True
            ENGINE.start(self.model.slot, self._service)

    def step(self, n_frames=BATCH, elapsed_us=0):
        """Manual mode: let time pass, then deal with up to `n_frames` frames each way; returns how many it was."""
        self._now_ns += round(elapsed_us * 1000)
        done = self.model.step(self._now_ns, self._epoch_ns + self._now_ns, n_frames)
        if self.model.state.attention:
            self.model.state.attention = 0
            self._service()
        return done

    def close(self):
        if self._closed:
            return
        self._closed = True
        ENGINE.stop(self.model.slot)
        self.disable_interrupts()
        with self._lock, self.model.held() as state:
            state.source = state.sink = 0
        if self._cable:
            self._cable.leave(self)
        if self._tap:
            self._tap.close()
        self.model.close()
        if self._capture:
            self._capture.close()
        if self._writer:
            self._writer.close()

    @property
    def finished(self):
        if self.spec.endless or not self._settled:
            return False
        with self.model.held():  # the first look was on the move
            return self._settled

    @property
    def _settled(self):
        state = self.model.state
        ended = not self.finite or int(state.taken) == int(state.limit) and self.model.all_taken
        return ended and self.model.quiet

    def watch_cable(self):
        """Let the device see whether its TAP interface is up; if not, its link is down."""
        if self._tap:
            self.model.set_link(self._tap.up)

    def check(self):
        ENGINE.check(self.model.slot)
        if self._failure:
            raise self._failure

    def summary(self):
        """Counters of the wire, as a dict of ints.

        received / sent: frames the wire brought and took. lost, corrupted: by the fault injector. sequence_checked,
        sequence_errors, sequence_gaps: numbered frames at the sink, those out of order, those missing between.
        dma_faults: accesses outside what was mapped. model_faults: descriptors and tails that make no sense.
        """
        counters = self.model.wire_counters()
        with self.model.held() as state:
            used = state.tx[np.asarray(state.tx["checked"]) > 0]
            checked = int(used["checked"].sum())
            span = int(used["next"].max() - used["first"].min()) if checked else 0
            errors = int(used["errors"].sum())
        return {**counters, "sequence_checked": checked, "sequence_errors": errors,
                "sequence_gaps": max(0, span - checked + errors)}

    # The cable

    def _connect_source(self):
        spec, state = self.spec, self.model.state
        per_second = self.model.per_second
        state.min_frame = spec.min_frame
        state.delay = round(spec.delay_us * 1e-6 * per_second)
        state.loss, state.corrupt = round(spec.loss * 2**32), round(spec.corrupt * 2**32)
        state.random = _scrambled(spec.seed)
        if spec.rate:
            state.paced, state.per_cycle = 1, spec.rate / per_second
        state.limit = ENDLESS if spec.frames is None else spec.frames
        if spec.generate:
            frame, checksum = template(self.model.management.eeprom.mac, spec.size)
            state.template[: spec.size] = np.frombuffer(frame, np.uint8)
            state.frame_size, state.flows, state.checksum, state.source = spec.size, spec.flows, checksum, GENERATOR
        elif spec.capture_in:
            self._connect_capture()
        elif spec.link:
            self._cable = Cable.join(spec.link, self)
            state.inbox, state.outbox = self._cable.fifos(self)
            state.source, state.sink = INBOX, LINK
        elif spec.tap:
            self._tap = open_tap(spec.tap)
            state.tap, state.tap_reads, state.inbox = self._tap.descriptor, 1, self._tap.fifo
            state.source, state.sink = INBOX, TAP
        state.changed = 1

    def _connect_capture(self):
        state = self.model.state
        capture = self._capture = Capture(self.spec.capture_in)
        state.file, state.offsets = capture.data.ctypes.data, capture.offsets.ctypes.data
        state.lengths, state.frames = capture.lengths.ctypes.data, len(capture)
        state.limit, state.source = len(capture) * self.spec.loop, CAPTURE
        lengths = np.asarray(capture.lengths)
        odd = int(((lengths < 14) | (lengths > SCRATCH_SIZE - 4)).sum())
        if odd:
            print(f"{self.spec.capture_in}: warning: {odd} of {len(capture)} frames are shorter than 14 or longer than "
                  f"{SCRATCH_SIZE - 4} bytes and are left out", file=sys.stderr)

    def _connect_sink(self):
        if self.spec.capture_out:
            state = self.model.state
            self._writer = CaptureWriter(self.spec.capture_out)
            state.out = self._writer.out
            self._writer.out = state.out  # one record for the writer and the engine
            state.sink = FILE

    def _service(self):
        """The engine wants Python: room in the output file, or an end with an error."""
        with self._lock:
            state = self.model.state
            try:
                if state.error:
                    raise IxyError(f"{self.name}: TAP interface {self.spec.tap} failed: error {int(state.error)}; "
                                   f"was it removed?")
                if self._writer and not self._closed:
                    self._writer.service()
                self.model.service()
            except IxyError as error:
                self._failure = error
                with self.model.held():
                    state.sink = UNPLUGGED  # what is sent from now on is lost


def _scrambled(seed):
    """A state of the random number generator, never 0, that is far from those of neighbouring seeds (splitmix64)."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15) & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31 or 1


def open_bus(spec, rest, manual=False):
    """The simulated device that `spec` (the text that the user typed) describes with `rest`, its KEY=VALUE,…"""
    return SimBus(spec, parse(spec, parse_options(spec, rest)), manual)
