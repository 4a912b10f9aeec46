"""How a virtio driver reaches its device: what all virtio transports offer, over a socket or over PCI."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Notifier:
    """How the device is told about a queue: `word`, written to a file or stored to `register`, uint8 over 2 bytes.

    To the file go `width` bytes, at `offset`; -1 stands for an eventfd, which has no places.
    """

    descriptor: int = -1
    word: int = 1
    width: int = 8
    offset: int = -1
    register: np.ndarray | None = None

    def notify(self):
        """The same from Python."""
        data = self.word.to_bytes(self.width, "little")
        if self.register is not None:
            self.register.view("<u2")[0] = self.word
        elif self.offset < 0:
            os.write(self.descriptor, data)
        else:
            os.pwrite(self.descriptor, data, self.offset)


@dataclass(frozen=True)
class RingAddresses:
    """Where the parts of one split virtqueue lie for the device."""

    size: int  # descriptors
    desc: int
    avail: int
    used: int


class VirtioTransport(ABC):
    """Features, configuration, queues and status of one virtio device.

    A driver calls `offered_features`, `accept_features`, `set_queue` for every queue, then `start`; `stop` at the
    end. Queues are numbered as in the specification (5.1.2): 2k receives and 2k + 1 transmits for pair k.
    """

    has_control_queue = False  # whether the device can have one, besides these

    @abstractmethod
    def offered_features(self):
        """The feature bits that the device offers, an int."""

    @abstractmethod
    def accept_features(self, features):
        """Settle on these feature bits. IxyError if the device refuses them."""

    @abstractmethod
    def read_config(self, offset, size):
        """`size` bytes of the device's configuration from `offset` on, or None where the transport has none."""

    @property
    @abstractmethod
    def connected(self):
        """Whether the device is there."""

    @property
    @abstractmethod
    def max_queue_pairs(self):
        """How many pairs of queues the device has."""

    def queue_size(self, number, wanted):
        """How many descriptors queue `number` gets, if possible `wanted`. IxyError if there is no such queue."""
        return wanted

    @abstractmethod
    def set_queue(self, number, addresses, vector=None):
        """Tell where queue `number` lies (RingAddresses, inside of mapped memory); returns its Notifier.

        `vector`: the one of `Bus.enable_interrupts` that the device is to raise for it.
        """

    @abstractmethod
    def start(self):
        """Let the device work on the queues."""

    @abstractmethod
    def check(self):
        """Raise IxyError if the device failed since."""

    @abstractmethod
    def stop(self):
        """Queues off: the device touches no memory any more. Returns the errors met."""
