"""A booted guest with an agent in it and wires to its NICs: what the tests of real PCI drive."""

import contextlib
import json
import signal
import socket
import sys
import tempfile
from pathlib import Path

from guest_wire import Wire, until

from tools import Refused
from tools.guest import Guest

HERE = Path(__file__).resolve().parent
PATHS = f"{HERE.parents[1]}:{HERE}"  # where Python finds the package, the tools and the tests' own modules
BOOT_S, STEP_S = 240, 240  # hangs, not slow machines
NOBODY = 65534
MEMORY, VFIO_USER_SLOT = "2G", 0x18  # of a guest with devices that are served; the first of these on the root bus


class Machine:
    """A guest with the NICs `kinds`; NIC k is `nics[k]` in the guest and `wires[k]` here."""

    def __init__(self, kinds, *, iommu, devices=()):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-wires-")))
            self.wires = [Wire(folder / str(k)) for k in range(len(kinds))]
            for wire in self.wires:
                stack.callback(wire.close)
            guest = Guest([sys.executable, str(HERE / "guest_agent.py")], iommu=iommu,
                          nics=[(kind, wire.path) for kind, wire in zip(kinds, self.wires, strict=True)],
                          devices=devices, channels={"agent": folder / "agent"},
                          environment={"PYTHONPATH": PATHS})
            self.nics, self.guest = guest.addresses, stack.enter_context(guest)
            for wire in self.wires:
                wire.accept(BOOT_S)
            self._agent = self._connect(folder / "agent")
            stack.callback(self._agent.close)
            self._stack = stack.pop_all()

    def _connect(self, path):
        channel = socket.socket(socket.AF_UNIX)
        until(path.exists, BOOT_S, "QEMU's socket")
        channel.connect(str(path))
        channel.settimeout(BOOT_S)
        stream = channel.makefile("rwb")
        try:
            assert json.loads(stream.readline() or "null") == "ready"
        except (AssertionError, TimeoutError):
            raise AssertionError(f"no agent in the guest:\n{self.console()}\n{self.guest.text('stderr')}") from None
        channel.settimeout(STEP_S + 30)
        return stream

    def console(self):
        return self.guest.text("console")

    def ask(self, *request):
        self._agent.write(json.dumps(request).encode() + b"\n")
        self._agent.flush()
        done, answer = json.loads(self._agent.readline())
        assert done, answer
        return answer

    def shell(self, command, code=0):
        """stdout of a shell command in the guest, run as root."""
        got, out, errors = self.ask("shell", command, STEP_S)
        assert got == code, f"{command}: exit code {got}\n{out}\n{errors}"
        return out

    def start(self, target, *args, user=None):
        return Process(self, target, self.ask("start", target, list(map(str, args)), user))

    def app(self, name, *args, user=None, code=0):
        """Run an app to its end."""
        return self.start(f"ixy_numba.{name}", *args, user=user).end(code)

    def tool(self, name, *args, code=0):
        """Run one of the tools as root; returns what it prints."""
        return self.start(f"tools.{name}", *args).end(code).out

    def close(self):
        with contextlib.suppress(OSError, Refused):  # what has died or hangs is killed below
            self._agent.write(b'["end"]\n')
            self._agent.flush()
            self.guest.wait(30)
        self._stack.close()


class Process:
    """A process in the guest."""

    def __init__(self, machine, name, pid):
        self.machine, self.name, self.pid = machine, name, pid

    @property
    def out(self):
        return self.machine.guest.text(f"{self.pid}.out")

    @property
    def errors(self):
        return self.machine.guest.text(f"{self.pid}.err")

    def says(self, words):
        """Wait until it has said `words`, on either stream."""
        def said():
            if words in self.out or words in self.errors:
                return True
            assert self.machine.ask("wait", self.pid, 0) is None, f"{self.name} has ended\n{self.out}\n{self.errors}"
            return False

        until(said, STEP_S, f"{self.name}: {words!r}\n{self.out}\n{self.errors}")

    def kill(self, number=signal.SIGKILL):
        self.machine.ask("kill", self.pid, int(number))

    def end(self, code=0, stop=None):
        """Wait for its end, after a signal if `stop` names one; returns the process itself."""
        if stop is not None:
            self.kill(stop)
        got = self.machine.ask("wait", self.pid, STEP_S)
        assert got == code, f"{self.name}: exit code {got}\n{self.out}\n{self.errors}"
        assert "Traceback" not in self.errors, self.errors
        return self

    @property
    def summary(self):
        """The JSON object that an app ends with."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def refusal(self):
        """The one line that it says on stderr."""
        lines = self.errors.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.errors
        return lines[0]


def vfio_user(*sockets):
    """QEMU's arguments for devices served on these sockets, and for memory that their servers can map."""
    words = ["-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on", "-machine", "memory-backend=ram",
             "-smp", "2"]
    for k, path in enumerate(sockets):
        words += ["-device", f'{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}},'
                  f'"addr":"{VFIO_USER_SLOT + k:#x}"}}']
    return words


def vfio_user_address(k):
    """The PCI address in the guest of device `k` of `vfio_user`."""
    return f"0000:00:{VFIO_USER_SLOT + k:02x}.0"
