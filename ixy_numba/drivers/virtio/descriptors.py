"""The split virtqueue (virtio 1.1: 2.6) and the header in front of every frame (5.1.6)."""

import numpy as np

U = np.uint64

DESC = np.dtype([("addr", "u8"), ("len", "u4"), ("flags", "u2"), ("next", "u2")])  # 2.6.5
NEXT, DEVICE_WRITES = 1, 2  # a descriptor's flags
NO_INTERRUPT = U(1)  # the driver's flags, 2.6.7
NO_NOTIFY = U(1)  # the device's flags, 2.6.8
DOORBELL = np.dtype([("queue", "u2")])  # on PCI, where queues are notified (4.1.4.4)

# struct virtio_net_hdr, 5.1.6. Without offloads all of it is 0, but for num_buffers of what is received.
HEADER_SIZE, LEGACY_HEADER_SIZE = 12, 10  # the shorter one has no num_buffers: legacy devices without MRG_RXBUF
NUM_BUFFERS_SHIFT = U(48)  # in the 8 bytes in front of the frame


def ring(size):
    """A virtqueue of `size` descriptors as one dtype, laid out as legacy devices want it (2.6.2)."""
    avail = 16 * size
    used = -(-(avail + 6 + 2 * size) // 4096) * 4096
    entry = np.dtype([("id", "u4"), ("len", "u4")])
    return np.dtype({
        "names": ["desc", "avail_flags", "avail_idx", "avail", "used_event", "used_flags", "used_idx", "used",
                  "avail_event"],
        "formats": [(DESC, (size,)), "u2", "u2", ("u2", (size,)), "u2", "u2", "u2", (entry, (size,)), "u2"],
        "offsets": [0, avail, avail + 2, avail + 4, avail + 4 + 2 * size, used, used + 2, used + 4,
                    used + 4 + 8 * size],
        "itemsize": -(-(used + 6 + 8 * size) // 4096) * 4096})
