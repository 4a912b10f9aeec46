"""Runs in the guest as root, with the package imported once: starts apps as forked processes for the tests outside.

Requests and answers are lines of JSON on a virtio serial port. A forked child is a process like any other, with its own
user, signals and exit code, but need not import Numba, which takes the emulated processor ten seconds. Where the very
command line is to be seen to work, the child becomes an interpreter of its own.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback

from ixy_numba import cli, fwd, pcap, pktgen  # noqa: F401 - imported for the children, here and below
from ixy_numba.bus import sysfs, vfio  # noqa: F401
from ixy_numba.core.jit import cache_directory
from tools import bind, main  # noqa: F401

SHARE = "/run/guest"
PROGRAM = "python -m "
children = {}  # pid: exit code, once it has ended


def start(target, args, user):
    """Fork; the child runs `target` with `args`: an app, a tool, a function `module:name`, or `python -m module`.

    Its pid names its files.
    """
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{SHARE}/{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            become(user)
            code = run(target, args) or 0
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stderr.flush()
        os._exit(code)
    children[pid] = None
    return pid


def become(user):
    """Another user, with locked memory as an administrator would grant it (docs/guest.md)."""
    if user is not None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (256 << 20, 256 << 20))
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


def run(target, args):
    if target.startswith(PROGRAM):
        os.execv(sys.executable, [sys.executable, "-m", target.removeprefix(PROGRAM), *args])
    name, _, function = target.partition(":")
    module = importlib.import_module(name)
    try:
        if function:
            return getattr(module, function)(*args)
        if name.startswith("tools."):
            main(lambda: module.command(args))
        return cli.main(module.run, args)
    except SystemExit as end:  # of argparse, and of every tool
        return end.code


def wait(pid, timeout_s):
    """The exit code (a signal as a negative number), or None if it still runs."""
    deadline = time.monotonic() + timeout_s
    while children[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            break
        else:
            time.sleep(0.02)
    return children[pid]


def kill(pid, number):
    if children[pid] is None:
        os.kill(pid, number)


def shell(command, timeout_s):
    done = subprocess.run(command, shell=True, text=True, capture_output=True, timeout=timeout_s,
                          stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


def serve(port):
    verbs = {verb.__name__: verb for verb in (start, wait, kill, shell)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        port.write(json.dumps("ready").encode() + b"\n")
        for line in port:
            verb, *args = json.loads(line)
            if verb == "end":
                return
            try:
                answer = [True, verbs[verb](*args)]
            except Exception:
                answer = [False, traceback.format_exc()]
            port.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    cache_directory().chmod(0o777)  # for the children of other users; it is in the guest's own layer
    with open("/dev/virtio-ports/agent", "r+b", buffering=0) as agent:
        serve(agent)
