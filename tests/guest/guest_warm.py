"""Compiles here, on the host, what the guest will run: an emulated processor takes minutes for that.

A driver's kernels have the same types on every transport: for virtio an idle device of no transport will do, for ixgbe
the simulated one. Run as a program with one of SPECS, in the environment of `tools.guest.portable_kernels`.
"""

import sys
import tempfile

import numpy as np
from guest_inside import send_one

from ixy_numba import cli, device, fwd, pcap, pktgen
from ixy_numba.bus import Bus
from ixy_numba.bus.virtio import Notifier, VirtioTransport
from ixy_numba.core.memory import ANY

RING_SIZE = 256  # of QEMU's virtio NICs
SPECS = VIRTIO, IXGBE = "idle", "sim"


class IdleBus(Bus, VirtioTransport):
    """A modern virtio device that never does anything."""

    vendor, device, memory_needs = 0x1AF4, 0x1041, ANY
    connected, max_queue_pairs = True, 1

    def __init__(self, spec, options):
        self.name = spec

    def map_dma(self, memory):
        return np.arange(memory.iova, memory.iova + memory.size, memory.page_size, dtype=np.uint64)

    def offered_features(self):
        return 1 << 32  # VERSION_1

    def queue_size(self, number, wanted):
        return RING_SIZE

    def set_queue(self, number, addresses, vector=None):
        return Notifier()

    def read32(self, offset): ...

    def write32(self, offset, value): ...

    def unmap_dma(self, memory): ...

    def accept_features(self, features): ...

    def read_config(self, offset, size): ...

    def start(self): ...

    def check(self): ...

    def stop(self):
        return []

    def close(self): ...


open_bus = IdleBus


def warm(spec):
    """The exit code of the first app that fails, or 0."""
    forward = ["--no-touch", "--packets", "0", spec, spec]
    with tempfile.NamedTemporaryFile() as file:
        runs = [(fwd, forward), (pktgen, ["--packets", "0", spec]), (pcap, [spec, file.name, "0"])]
        if spec == IXGBE:
            runs += [(fwd, ["--interrupts", *forward])]
        for app, words in runs:
            if code := cli.main(app.run, words):
                return code
    with device.open_device(spec) as opened:
        send_one(opened)
    return 0


if __name__ == "__main__":
    device.SCHEMES["idle"] = "guest_warm"
    sys.exit(warm(*sys.argv[1:]))
