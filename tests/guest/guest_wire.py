"""The far end of an emulated NIC's cable: frames in and out of QEMU's unix socket, byte for byte."""

import socket
import struct
import threading
import time

SEND_S = 60  # a NIC that takes nothing in for so long is dead


class Wire:
    """Listens at `path` for the NIC; `received` grows by what it sends. `inject` sends it frames."""

    def __init__(self, path):
        self.path, self.received = path, []
        self._changed = threading.Condition()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._connection = None

    def accept(self, timeout_s):
        self._listening.settimeout(timeout_s)
        self._connection, _ = self._listening.accept()
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
        threading.Thread(target=self._receive, args=(self._connection.makefile("rb"),), daemon=True).start()

    def _receive(self, stream):
        while length := stream.read(4):
            frame = stream.read(int.from_bytes(length, "big"))
            with self._changed:
                self.received.append(frame)
                self._changed.notify_all()

    def send(self, frame):
        self._connection.sendall(len(frame).to_bytes(4, "big") + frame)

    def wait_for(self, count, timeout_s):
        """Until `count` frames have been received; whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.received) >= count, timeout_s)

    def clear(self, quiet_s=0.3):
        """Forget what was received, once nothing more has come for `quiet_s` seconds."""
        with self._changed:
            while self._changed.wait(quiet_s):
                pass
            self.received.clear()

    def close(self):
        for one in filter(None, (self._connection, self._listening)):
            one.close()


def carry(source, target, frames, window, timeout_s=60):
    """Send `frames` into `source` and return what then comes out of `target`.

    At most `window` of them are under way, so that no receive ring can overflow: whatever is missing was lost. Ends
    early when nothing has come for `timeout_s` seconds.
    """
    for k, frame in enumerate(frames):
        if not target.wait_for(k + 1 - window, timeout_s):
            break
        source.send(frame)
    target.wait_for(len(frames), timeout_s)
    return list(target.received)


def until(condition, timeout_s, what):
    """Poll until `condition()` is true and return it."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)
    return value
