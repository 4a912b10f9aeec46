"""Hold every packet for a millisecond before it goes out: `python delay_line.py DEV1 DEV2`. A loop of one's own."""

import sys
import threading
import time

import numpy as np

from ixy_numba import MAX_BATCH, IxyError, free_batch, kernel, open_devices, rx_batch, tx_batch
from ixy_numba.core.clock import Clock, now_ns
from ixy_numba.core.memory import new_record
from ixy_numba.core.mmio import load_acquire, pause

U = np.uint64
SLOTS = 2048  # packets in the line; more than that at once are dropped
LINE = np.dtype([("stop", "u8"), ("delay_ns", "u8"), ("head", "u8"), ("tail", "u8"), ("dropped", "u8"), ("sent", "u8"),
                 ("packet", "u8", (SLOTS,)), ("due", "u8", (SLOTS,))])


@kernel
def delay(rxq, txq, line, clock, batch):
    """Receive into the line's tail, send from its head what is due. The line owns the packets in between."""
    while load_acquire(line, "stop") == U(0):
        now = now_ns(clock)
        n = rx_batch(rxq, batch, U(32))
        room = U(SLOTS) - (line.tail - line.head)
        kept = min(n, room)
        for k in range(kept):
            slot = (line.tail + k) & U(SLOTS - 1)
            line.packet[slot], line.due[slot] = batch.packet[k], now + line.delay_ns
        line.tail += kept
        line.dropped += free_batch(rxq.pool, batch, kept, n)
        ready = U(0)
        while ready < U(MAX_BATCH) and line.head + ready < line.tail:
            slot = (line.head + ready) & U(SLOTS - 1)
            if line.due[slot] > now:
                break
            batch.packet[ready] = line.packet[slot]
            ready += U(1)
        sent = tx_batch(txq, batch, U(0), ready)  # what the ring has no room for stays in the line
        line.head += sent
        line.sent += sent
        if n + sent == U(0):
            pause()


def main(specs):
    first, second = devices = open_devices(specs)
    line, clock = new_record(LINE), Clock()
    line.delay_ns = 1_000_000
    thread = threading.Thread(target=delay, daemon=True,
                              args=(first.rx[0], second.tx[0], line, clock.record, first.pools[0].batch()))
    thread.start()
    try:
        while thread.is_alive() and not (first.bus.finite and first.bus.finished and line.head == line.tail):
            clock.update()
            first.check()
            time.sleep(0.05)
    except KeyboardInterrupt:
        pass
    line.stop = 1
    thread.join()
    print(f"delayed {line.sent} packets by {line.delay_ns / 1e6} ms, dropped {line.dropped}")
    for device in devices:
        device.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except IxyError as error:
        sys.exit(f"error: {error}")
