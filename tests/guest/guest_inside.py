"""What runs in the guest for a test, in a process of its own: `machine.start("guest_inside:NAME", ARGS…)`."""

import os
import select
import time

import numpy as np

from ixy_numba import alloc_batch, open_device, tx_batch
from ixy_numba.bus.pci import open_bus
from ixy_numba.core.memory import DmaMemory
from ixy_numba.core.packet import resize
from ixy_numba.core.pool import ADDRESS_SHIFT

# Registers of the 82576, which QEMU's igb emulates (its datasheet, 8.8)
STATUS, CTRL_EXT, EICS, EIMS, GPIE, EICR = 0x0008, 0x0018, 0x1520, 0x1524, 0x1514, 0x1580


def igb_interrupts(address, vectors):
    """Make the card raise each of its MSI-X vectors in turn, and see each on its own eventfd and on no other."""
    bus = open_bus(address)
    events = bus.enable_interrupts(int(vectors))
    bus.write32(GPIE, 0x10)  # several vectors
    for k in range(len(events)):
        bus.write32(EIMS, 1 << k)
        bus.write32(EICS, 1 << k)
        ready, _, _ = select.select(events, [], [], 10)
        print(f"vector {k}: {[events.index(one) for one in ready]}", flush=True)
        for one in ready:
            os.read(one, 8)
    bus.close()


def igb_dma(address):
    """Map memory, let go of it, map again; the registers answer in between."""
    bus = open_bus(address)
    memory = DmaMemory(4 << 20, bus.memory_needs)
    for _ in range(2):
        pages = bus.map_dma(memory)
        print(f"mapped {len(pages)} pages from {int(pages[0]):#x}, STATUS {bus.read32(STATUS):#x}")
        bus.unmap_dma(memory)
    memory.close()
    bus.close()


def send_one(device):
    batch = device.pools[0].batch()
    alloc_batch(device.pool, batch, 1)
    batch.packet[0] = resize(batch.packet[0], 60)
    tx_batch(device.tx[0], batch, 0, 1)


def send_from(address, bus_addr):
    """Send a packet that the card is told to find at `bus_addr`, where nothing is mapped, and live on."""
    with open_device(address) as device:
        words = device.pool.table.word
        words[:] = words % (np.uint64(1) << ADDRESS_SHIFT) + (np.uint64(int(bus_addr, 16)) << ADDRESS_SHIFT)
        send_one(device)
        time.sleep(1)  # the card may take its time; QEMU's reads nothing, and says nothing of it
        device.check()
    with open_device(address) as device:  # it was no harm to this process, nor to the card
        print(f"alive, MAC {device.mac.hex(':')}")
