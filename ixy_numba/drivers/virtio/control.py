"""The control queue of a virtio network device (virtio 1.1: 5.1.6.5): one command at a time, answered at once."""

import time

import numpy as np

from ...core.errors import IxyError
from .descriptors import DEVICE_WRITES, NEXT

SIZE = 64
TIMEOUT_S = 5.0
COMMAND = np.dtype([("head", "u1", (2,)), ("argument", "u1", (6,)), ("answer", "u1")])
OK, NO_ANSWER = 0, 0xFF

# (class, command): 5.1.6.5.1, .2, .5
PROMISCUOUS, ALL_MULTICAST, SET_MAC, SET_PAIRS = (0, 0), (0, 1), (1, 1), (4, 0)


class ControlQueue:
    """Commands go through descriptors 0 to 2 of `ring`, from `command`, a record that the device sees at `address`."""

    def __init__(self, name, ring, command, address, notifier):
        self._name, self._ring, self._command, self._notifier = name, ring, command, notifier
        ring.avail_flags = 1  # no interrupts
        for k, (part, flags) in enumerate((("head", NEXT), ("argument", NEXT), ("answer", DEVICE_WRITES))):
            ring.desc[k]["addr"] = address + COMMAND.fields[part][1]
            ring.desc[k]["flags"], ring.desc[k]["next"] = flags, k + 1
            ring.desc[k]["len"] = COMMAND.fields[part][0].itemsize

    def send(self, command, data):
        """Have `command` done with the bytes `data`. IxyError if the device refuses or does not answer in time."""
        ring, here = self._ring, self._command
        here.head, here.answer = command, NO_ANSWER
        here.argument[: len(data)] = list(data)
        ring.desc[1]["len"] = len(data)
        posted = int(ring.avail_idx) + 1 & 0xFFFF
        ring.avail_idx = posted  # slot after slot holds 0, the first descriptor
        self._notifier.notify()
        deadline = time.monotonic() + TIMEOUT_S
        while int(ring.used_idx) != posted:
            if time.monotonic() >= deadline:
                raise IxyError(f"{self._name}: no answer to control command {command} within {TIMEOUT_S:g} s")
            time.sleep(0.0002)
        if here.answer != OK:
            raise IxyError(f"{self._name}: the device refuses control command {command}")
