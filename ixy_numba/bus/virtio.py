"""How a virtio driver reaches its device: what all virtio transports offer, over a socket or over PCI."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

VENDOR, NETWORK = 0x1AF4, 0x1041  # the PCI ids of a virtio 1.x network device, on whatever transport


@dataclass(frozen=True)
class Notifier:
    """How kernels tell the device about a queue: 8 bytes written to an eventfd."""

    eventfd: int


@dataclass(frozen=True)
class RingAddresses:
    """Where the parts of one split virtqueue lie for the device."""

    size: int  # descriptors
    desc: int
    avail: int
    used: int


class VirtioTransport(ABC):
    """Features, configuration, queues and status of one virtio device.

    A driver calls `offered_features`, `accept_features`, `set_queue` for every queue, then `Bus.start`; `stop` at the
    end. Queues are numbered as in the specification (5.1.2): 2k receives and 2k + 1 transmits for pair k.
    """

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

    @abstractmethod
    def set_queue(self, number, addresses):
        """Tell where queue `number` lies (RingAddresses, inside of mapped memory); returns its Notifier."""

    @abstractmethod
    def stop(self):
        """Queues off: the device touches no memory any more. Returns the errors met."""
