"""A billion packets in one run: nothing lost, nothing out of order, every buffer accounted for at the end."""

import resource
import time

import numpy as np

from ixy_numba import Forwarder, Pool, open_device
from ixy_numba.core.errors import IxyError
from ixy_numba.fwd import touch_and_forward

from .common import say

TABLE = "soak"
PACKETS, QUICK_PACKETS = 1_000_000_000, 20_000_000


def measure(quick):
    packets = QUICK_PACKETS if quick else PACKETS
    say(f"soak: {packets} packets …")
    pool = Pool()  # our own: one that closes with its devices could not be counted afterwards
    devices = [open_device("sim:gen=line", pools=[pool]) for _ in range(2)]
    with Forwarder(devices, touch_and_forward, packets=packets) as forwarder:
        while not forwarder.finished:
            forwarder.check()
            time.sleep(0.05)
    wires = [device.bus.summary() for device in devices]
    for device in devices:
        device.close()
    free = pool.view.table.free[: pool.available]
    row = {"table": TABLE, "variant": "fused", "packets": forwarder.count("forwarded"),
           "mpps": round(packets / (forwarder.ended - forwarder.began) / 1e6, 3),
           "sequence_errors": sum(wire["sequence_errors"] for wire in wires),
           "dma_faults": sum(wire["dma_faults"] for wire in wires),
           "buffers": pool.usable, "buffers_back": len(np.unique(free)),
           "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}
    if row["sequence_errors"] or row["dma_faults"] or row["buffers_back"] != row["buffers"]:
        raise IxyError(f"soak: something went wrong: {row}")
    return [row]


def show(found):
    row, = found
    return [f"{row['packets']} packets forwarded between two simulated NICs, {row['mpps']} Mpps (simulated)",
            f"{row['sequence_errors']} sequence errors, {row['dma_faults']} DMA faults, {row['buffers_back']} of "
            f"{row['buffers']} buffers back, peak memory {row['peak_mib']} MiB"]
