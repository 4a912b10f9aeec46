"""What the apps share: arguments, errors as one line, Ctrl-C, figures every second, JSON at the end."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time

from .core.errors import IxyError
from .core.jit import MODE
from .core.thread import AT_ONCE, KernelThread
from .device import Statistics, mbit, open_devices
from .forwarder import Forwarder

EXIT_OK, EXIT_FAILURE, EXIT_USAGE = 0, 1, 2
TICK_S, IDLE_TICK_S = 0.005, 0.05  # how often the main thread looks after a run; one that sleeps must cost little


def parser(app, description, example):
    """An argument parser in the house style, with --json."""
    made = argparse.ArgumentParser(
        prog=f"python -m ixy_numba.{app}", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example:\n  {example}\n\ndevices:\n{device_help()}")
    made.add_argument("--unbind", action="store_true",
                      help="take PCI devices from their kernel drivers (never one whose interface is up)")
    made.add_argument("--json", action="store_true",
                      help="figures go to stderr; the last line of stdout is one JSON object")
    return made


def device_help():
    from .bus import vhost_user
    from .sim import OPTIONS

    kinds = {"0000:03:00.0  a PCI device: through VFIO if it is bound to vfio-pci, else as root": {},
             "sim[:KEY=VALUE,...]  a simulated 82599; keys:": OPTIONS,
             "vhost-user:PATH[,KEY=VALUE,...]  a vhost-user back-end that listens there; keys:": vhost_user.OPTIONS}
    return "\n".join(line for kind, options in kinds.items() for line in (
        f"  {kind}", *(f"    {key:<12} {text}" for key, text in options.items())))


def between(low, high, kind=int):
    """An argparse type: a number from `low` to `high` (None: what 64 bits hold; no upper end for another `kind`)."""
    if high is None:
        high = (1 << 64) - 1 if kind is int else float("inf")

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # nor is nan between anything
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {word} from {low} to {high}")
        return value

    return convert


class Stop:
    """What Ctrl-C sets. Not a threading.Event: its lock may be held where the signal comes in, for ever then."""

    def __init__(self):
        self._set = False

    def set(self):
        self._set = True

    def is_set(self):
        return self._set

    def wait(self, period_s):
        """Sleep for `period_s` seconds, which should be short, since no signal ends it; returns `is_set()` then."""
        time.sleep(period_s)
        return self._set


def main(run, argv=None):
    """Run an app: `run(argv, stop)` returns its exit code. Ends the process's errors as one line each.

    `stop` is a Stop that Ctrl-C, SIGTERM and SIGHUP set (the last not where it is ignored, as under nohup). A second
    Ctrl-C ends the process at once.
    """
    stop = Stop()

    def ask_to_stop(number, frame):
        if stop.is_set() and number == signal.SIGINT:
            os._exit(128 + number)  # asked twice: not even for the compiler, which cannot be interrupted
        stop.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = [(number, signal.signal(number, ask_to_stop)) for number in numbers]
    try:
        code = run(argv, stop)
        if sys.stdout is not None:  # closed before we began: `>&-`
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough: `| head`
        discard_output()
        code = EXIT_OK
    except IxyError as error:
        error = _first(error)
        complain(error)
        code = error.exit_code
    except OSError as error:  # of the output, such as a full disk; what devices and files raise is an IxyError
        discard_output()
        complain(f"the output cannot be written: {error}")
        code = EXIT_FAILURE
    except MemoryError:
        complain("out of memory; use fewer queues or smaller rings")
        code = EXIT_FAILURE
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
    return code


def _first(error):
    """The error that all began with: closing what it left may have failed as well, and comes first in the chain."""
    while isinstance(error.__context__, IxyError) and not error.__suppress_context__:
        error = error.__context__
    return error


def complain(what):
    with contextlib.suppress(OSError):  # the terminal is gone, or the disk of our stderr is full
        print(f"error: {what}", file=sys.stderr)


def discard_output():
    """What stdout still holds goes nowhere: the interpreter would fail to write it once more when it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def forward(app, specs, handler, stop, *, state=None, queues=1, ring_size=512, batch_size=32, packets=None,
            duration_s=None, in_place=False, interrupts=False, unbind=False, as_json=False):
    """Run `handler` between the devices named by `specs` until `stop` is set or the run ends; returns the exit code."""
    with contextlib.ExitStack() as stack:
        devices = open_devices(specs, queues=queues, ring_size=ring_size, in_place=in_place, interrupts=interrupts,
                               unbind=unbind)
        for device in devices:
            stack.callback(device.close)
        report = Report(app, devices, as_json, stop, duration_s)
        with Forwarder(devices, handler, state=state, batch_size=batch_size, packets=packets,
                       in_place=in_place, interrupts=interrupts) as forwarder:
            report.watch(forwarder, lambda: forwarder.finished, forwarder.check, IDLE_TICK_S if interrupts else TICK_S)
        forwarded, failed = forwarder.count("forwarded"), forwarder.count("failed")
        if failed:
            print(f"the handler failed on {failed} packets, which were dropped; the first: "
                  f"{forwarder.explain_failure()}", file=sys.stderr)
        mpps = rate(forwarded, report.seconds)
        cycles = forwarder.count("busy_cycles") / forwarded if forwarded else 0.0
        report.finish(f"forwarded {forwarded} packets in {report.seconds:.3f} s: {mpps:.3f} Mpps, {cycles:.1f} cycles "
                      "a packet", batch_size=batch_size, in_place=in_place, interrupts=interrupts,
                      sleeps=forwarder.count("sleeps"), forwarded_packets=forwarded, mpps=mpps,
                      cycles_per_packet=cycles, handler_dropped=forwarder.count("dropped"), handler_failed=failed)
    return EXIT_OK


def run(handler, specs, **options):
    """Run a handler as a program: open `specs` (a list of device specs), forward until Ctrl-C; returns the exit code.

    `state` may be what the handler takes; the other options are those of `forward`. Figures go to stdout, errors to
    stderr, one line each: `sys.exit(run(my_handler, sys.argv[1:]))`.
    """
    return main(lambda _, stop: forward(handler.__name__, specs, handler, stop, **options))


class Worker:
    """A kernel that runs in a thread until its stop word is set: 1 = when it is done with its batch, 2 = at once.

    `tick` is called while waiting for its end; what it or the kernel raises is raised here. `wake`: see KernelThread.
    """

    def __init__(self, tick, kernel, *args, wake=None):
        self._tick, self._thread = tick, KernelThread(kernel, *args, wake=wake)

    def tick(self):
        self._tick()
        if self._thread.error is not None:
            raise self._thread.error

    @property
    def began(self):
        return self._thread.began

    @property
    def ended(self):
        return self._thread.ended

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        self._thread.tell(1)
        try:
            while self._thread.is_alive():
                self._tick()
                self._thread.join(0.005)
        except BaseException:
            self._thread.tell(AT_ONCE)
            self._thread.join()
            raise
        if error is None:
            self.tick()


class Report:
    """Figures while an app runs: a line a device and second, and the summary that ends the run."""

    def __init__(self, app, devices, as_json, stop, duration_s=None):
        self.app, self.devices, self.as_json, self.stop = app, devices, as_json, stop
        self.duration_s = duration_s
        self.out = sys.stderr if as_json else sys.stdout
        self._run = None

    def watch(self, run, finished, tick, period_s=TICK_S):
        """Print once a second until `finished()`, the duration, or a stop; calls `tick` every `period_s` seconds.

        `run` has `began` and `ended` (time.monotonic()): a Forwarder or a Worker. The duration counts from `began`.
        """
        self._run = run
        asked, told = time.monotonic(), False
        last, before = None, [device.stats() for device in self.devices]
        while not self.stop.is_set():
            tick()
            now = time.monotonic()
            if run.began is None:
                if not told and now - asked > 1.5 and sys.stderr and sys.stderr.isatty():
                    told = True
                    print("compiling kernels for this machine (once; they are cached) …", file=sys.stderr, flush=True)
            else:
                last = last or run.began
                if now - last >= 1:
                    stats = [device.stats() for device in self.devices]
                    for device, new, old in zip(self.devices, stats, before, strict=True):
                        self._line(device, new - old, now - last)
                    last, before = now, stats
                if self.duration_s is not None and now - run.began >= self.duration_s:
                    break
            if finished():
                break
            self.stop.wait(period_s)

    @property
    def seconds(self):
        """How long the kernel ran, compilation not counted; 0 if it never did."""
        return self._run.ended - self._run.began if self._run.began is not None else 0.0

    def _line(self, device, change, seconds):
        parts = []
        for way, packets, data_bytes in (("rx", change.rx_packets, change.rx_bytes),
                                         ("tx", change.tx_packets, change.tx_bytes)):
            parts.append(f"{way} {packets / seconds / 1e6:7.3f} Mpps {mbit(packets, data_bytes) / seconds:9.1f} Mbit/s")
        kind = " (simulated)" if device.simulated else ""
        print(f"{device.name}{kind}: {'   '.join(parts)}", file=self.out, flush=True)

    def finish(self, sentence, **values):
        """The last words: `sentence` for people, or all `values` and the ports as JSON."""
        simulated = any(device.simulated for device in self.devices)
        print(f"{sentence}{' (simulated)' if simulated else ''}", file=self.out, flush=True)
        if self.as_json:
            ports = [port_summary(device) for device in self.devices]
            print(json.dumps({"app": self.app, "seconds": round(self.seconds, 6), "mode": MODE, **values,
                              "ports": ports}), flush=True)


def port_summary(device):
    """One port for the JSON: who it is, its Statistics, and what its bus has to add."""
    stats: Statistics = device.stats()
    return {"device": device.name, "driver": device.driver, "simulated": device.simulated, **vars(stats),
            **device.bus.summary()}


def rate(packets, seconds):
    """Mpps, 0 for an empty run."""
    return packets / seconds / 1e6 if seconds > 0 else 0.0
