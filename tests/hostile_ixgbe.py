"""An 82599 that is an attacker with DMA, against its driver: `python tests/hostile_ixgbe.py --descriptors 100000000`.

In step with the driver it completes descriptors in every way that a device could, right and wrong, twice or never,
overwrites addresses in the rings, and puts offsets into packets that an application should not believe. It knows what
it did, so that everything the driver and the application counted is compared exactly. Prints one line of JSON a path;
the process ends with 1 if anything differs.
"""

import argparse
import json
import sys
from typing import NamedTuple

import numpy as np
from hostile import audit, draw, guarded_memory
from tinynic import TinyNic

from ixy_numba import device as device_module
from ixy_numba import free_batch, handler, kernel, packet, rx_batch, tx_batch
from ixy_numba.core.jit import MODE, PROTECTED
from ixy_numba.core.memory import new_record
from ixy_numba.core.pool import BUFFER_SIZE, BUFFER_STRIDE, HEADROOM, Pool, U
from ixy_numba.datapath import Lane, forward_round, new_control, verb
from ixy_numba.drivers import ixgbe
from ixy_numba.drivers.ixgbe import in_place as ixgbe_in_place
from ixy_numba.in_place import in_place_round

RING, BUFFERS = 64, 512
PATHS = ("batch", "fused", "in_place")
ZERO, ONE = U(0), U(1)
# What becomes of a descriptor, by what was written into it
KINDS = ("sound", "undone", "no_eop", "error", "empty", "long")
SOUND, UNDONE, NO_EOP, ERROR, EMPTY, LONG = (U(k) for k in range(len(KINDS)))
OUTSIDE = U(1 << 63)  # in an address that the attacker put into a ring
MASK, LOW32, ONES = U(RING - 1), U(0xFFFFFFFF), U((1 << 64) - 1)
NOISE = ~U(3 | 1 << 29 | 0xFFFF << 32)  # bits of an advanced write-back that say nothing about the frame
LEGACY_NOISE = ~U(0xFFFF | 3 << 32 | 1 << 40)

FOE = np.dtype([
    ("random", "u8"), ("next", "u8"), ("tail", "u8"),  # the next descriptor that the driver looks at; its transmit tail
    ("first", "u8"), ("end", "u8"),  # the device addresses of the buffers
    ("kind", "u8", (RING,)), ("inside", "u8", (RING,)), ("buffer", "u8", (RING,)),  # of the write-backs in the ring
    ("seen", "u8", (len(KINDS),)),  # write-backs that the driver dealt with, by kind
    ("believed", "u8"), ("lies", "u8"),  # sound ones whose packet names an offset inside of it, or outside
    ("written", "u8"), ("wild", "u8"),  # write-backs; descriptors to send that are no buffer of the pool's
    ("stop", "u8"),
])
TALLY = np.dtype([("received", "u8"), ("failed", "u8"), ("sent", "u8"), ("not_sent", "u8")])


# ---- what it attacks: an application that believes what is in its packets


@kernel
def believe(packet):
    packet[packet.be16(0)] = 0x5A


@handler
def believing(packet):
    """Writes to the offset that the packet names; then out of the other port."""
    believe(packet)
    return 1 - packet.port


@kernel
def careless(rxq, txq, batch, tally):
    """On the verbs: besides, what was sent is freed as well."""
    n = rx_batch(rxq, batch, 48)
    for k in range(n):
        try:
            believe(packet(rxq.pool, batch.packet[k]))
        except Exception:
            tally.failed += ONE
    sent = tx_batch(txq, batch, 0, n)
    free_batch(rxq.pool, batch, 0, n)
    tally.received += n
    tally.sent += sent
    tally.not_sent += n - sent


class Batch(NamedTuple):
    rxqs: tuple
    txqs: tuple
    batch: np.record
    tally: np.record


class Fused(NamedTuple):
    rxqs: tuple
    txqs: tuple
    lane: Lane


class InPlace(NamedTuple):
    rxqs: tuple
    txqs: tuple
    lane: Lane


@verb
def turn(driver):
    """Let the driver and its application do one pass each way."""


@turn.implement(Batch)
@kernel
def _batch(driver):
    careless(driver.rxqs[0], driver.txqs[1], driver.batch, driver.tally)
    careless(driver.rxqs[1], driver.txqs[0], driver.batch, driver.tally)


@turn.implement(Fused)
@kernel
def _fused(driver):
    forward_round(driver.rxqs, driver.txqs, driver.lane, 0)


@turn.implement(InPlace)
@kernel
def _in_place(driver):
    in_place_round(driver.rxqs, driver.txqs, driver.lane)


# ---- the attacker


class Port(NamedTuple):
    """One attacked device: its advanced rings, its doorbells, and the packets' bytes."""

    rx: np.record
    tx: np.record
    rdt: np.record
    tdt: np.record
    memory: np.record
    foe: np.record


class Line(NamedTuple):
    """One attacked direction in place: the ring of legacy descriptors, and the doorbell that hands it over."""

    line: np.record
    tdt: np.record
    foe: np.record


@kernel
def choose(foe):
    """(status, length) of a write-back: status bit 0 done, 1 end of packet, 2 error. Often sound; else anything."""
    dice, length = draw(foe), draw(foe)
    kind, status = dice % U(16), U(3)
    if kind <= U(8):
        length = ONE + length % U(2048)
    elif kind == U(9):
        status = (dice >> U(8)) & U(6)  # not done
    elif kind == U(10):
        status, length = ONE, ONE + length % U(2048)  # not the end
    elif kind == U(11):
        status, length = U(7), ONE + length % U(2048)
    elif kind == U(12):
        length = ZERO
    elif kind == U(13):
        length = U(2049) + length % U(3)
    elif kind == U(14):
        status, length = U(7), U(0xFFFF)
    else:
        status = (dice >> U(8)) & U(7)
    return status, length & U(0xFFFF)


@kernel
def kind_of(status, length):
    """What a driver must take it for."""
    if status & ONE == ZERO:
        return UNDONE
    if status & U(2) == ZERO:
        return NO_EOP
    if status & U(4) != ZERO:
        return ERROR
    if length == ZERO:
        return EMPTY
    return LONG if length > U(2048) else SOUND


@kernel
def lie(foe, buffer, length):
    """Put an offset into the packet's first two bytes; returns 1 if an access there is inside of the packet."""
    dice = draw(foe)
    kind, dice = dice % U(8), dice >> U(8)
    offset = dice % length
    if kind == U(0):
        offset = length
    elif kind == U(1):
        offset = length + ONE
    elif kind == U(2):
        offset = U(2047) + (dice & ONE)
    elif kind == U(3):
        offset = dice & U(0xFFFF)
    buffer.octets[0], buffer.octets[1] = offset >> U(8), offset & U(0xFF)
    return ONE if offset < length and length > ONE else ZERO


@kernel
def plant(foe, i, buffer):
    """What descriptor `i` is going to say: (status, length)."""
    status, length = choose(foe)
    foe.kind[i], foe.inside[i] = kind_of(status, length), ZERO
    if foe.kind[i] == SOUND:
        foe.inside[i] = lie(foe, buffer, length)
    foe.written += ONE
    return status, length


@kernel
def settle(foe, end):
    """Count the write-backs that the driver has dealt with: those before `end`, as its doorbell says."""
    while foe.next != end:
        i = foe.next
        foe.seen[foe.kind[i]] += ONE
        if foe.kind[i] == SOUND:
            foe.believed += foe.inside[i]
            foe.lies += ONE - foe.inside[i]
        foe.kind[i] = UNDONE
        foe.next = (i + ONE) & MASK


@kernel
def inspect(port):
    """Look at what the driver gave the device to send, before that is overwritten."""
    foe, desc = port.foe, port.tx.desc
    while foe.tail != U(port.tdt.TDT) & MASK:
        address, length = desc[foe.tail].addr, desc[foe.tail].command & U(0xFFFF)
        if not foe.first <= address < foe.end or (address - foe.first) % U(BUFFER_STRIDE) != ZERO:
            foe.wild += ONE
        elif not ZERO < length <= U(2048):
            foe.wild += ONE
        foe.tail = (foe.tail + ONE) & MASK


@verb
def attack(port):
    """Complete everything that is not waiting for the driver already, and overwrite what the driver might believe."""


@attack.implement(Port)
@kernel
def _attack_port(port):
    foe, rx, tx = port.foe, port.rx.desc, port.tx.desc
    settle(foe, (U(port.rdt.RDT) + ONE) & MASK)
    inspect(port)
    for i in range(RING):
        if foe.first <= rx[i].addr < foe.end:
            foe.buffer[i] = (rx[i].addr - foe.first) // U(BUFFER_STRIDE)
        if foe.kind[i] == UNDONE:
            status, length = plant(foe, i, port.memory.buffer[foe.buffer[i]])
            noise = ONES if length == U(0xFFFF) else draw(foe)
            rx[i].done = (status & U(3)) | (status >> U(2)) << U(29) | length << U(32) | (noise & NOISE)
        rx[i].addr = draw(foe) | OUTSIDE
        if draw(foe) & ONE != ZERO:
            tx[i].addr, tx[i].command = draw(foe), draw(foe)  # sent or not, early, late or never


@attack.implement(Line)
@kernel
def _attack_line(port):
    foe, line = port.foe, port.line
    settle(foe, U(port.tdt.TDT) & MASK)
    for i in range(RING):
        if foe.kind[i] == UNDONE:
            status, length = plant(foe, i, line.buffer[i])
            noise = ONES if length == U(0xFFFF) else draw(foe)
            line.desc[i].word = length | (status & U(3)) << U(32) | (status >> U(2)) << U(40) | (noise & LEGACY_NOISE)
        line.desc[i].addr = draw(foe)
    line.head = draw(foe) & LOW32


@kernel
def campaign(driver, ports, goal):
    """Attack both ports and let the driver do its passes, until `goal` write-backs were made."""
    while ports[0].foe.written + ports[1].foe.written < goal:
        attack(ports[0])
        attack(ports[1])
        turn(driver)


@kernel
def storm(ports, goal):
    """The same without any order, while the driver runs in another thread. Nobody knows what it will see."""
    for port in ports:
        port.foe.stop = ZERO
    while ports[0].foe.stop == ZERO and ports[0].foe.written < goal:
        for port in ports:
            foe = port.foe
            i, k = draw(foe) & MASK, draw(foe) & MASK
            status, length = plant(foe, i, port.memory.buffer[draw(foe) % U(BUFFERS)])
            port.rx.desc[i].done = (status & U(3)) | (status >> U(2)) << U(29) | length << U(32) | (draw(foe) & NOISE)
            port.rx.desc[k].addr, port.tx.desc[k].addr, port.tx.desc[k].command = draw(foe), draw(foe), draw(foe)


# ---- the fight


class Fight:
    """Two attacked devices and what the driver runs on them, on one of PATHS. Use it inside of `guarded_memory`."""

    def __init__(self, path, canaries, seed=1):
        self.path, self.canaries = path, canaries
        nics = [TinyNic(f"hostile {k}") for k in range(2)]
        if path == "in_place":
            kind = ixgbe_in_place.InPlaceIxgbe
            pools = kind.new_pools(1, RING, nics)
            self.devices = [kind(nic, 1, RING, pools, True, None) for nic in nics]
        else:
            self.pool = Pool(BUFFERS)
            self.devices = [device_module._attach(nic, 1, RING, [self.pool]) for nic in nics]
            canaries.add(self.pool.view.memory.buffer["headroom"])  # what lies between the buffers
        self.rxqs = tuple(device.rx[0] for device in self.devices)
        self.txqs = tuple(device.tx[0] for device in self.devices)
        self.ports = tuple(self._port(k, seed) for k in range(2))
        self.tally, self.control = new_record(TALLY), new_control(2, 48)
        if path == "batch":
            self.driver = Batch(self.rxqs, self.txqs, self.pool.batch(), self.tally)
        else:
            kind = Fused if path == "fused" else InPlace
            self.driver = kind(self.rxqs, self.txqs, Lane(believing, None, self.control))

    def _port(self, k, seed):
        foe = new_record(FOE)
        foe.random, foe.kind = seed * 0x9E3779B97F4A7C15 + k + 1 & (1 << 64) - 1, UNDONE
        if self.path == "in_place":
            self.canaries.add(self.rxqs[k].line.buffer["octets"][:, BUFFER_SIZE:])
            return Line(self.rxqs[k].line, self.txqs[1 - k].regs, foe)
        foe.first = self.pool.memory.iova + HEADROOM
        foe.end = int(foe.first) + BUFFERS * BUFFER_STRIDE
        return Port(self.rxqs[k].ring, self.txqs[k].ring, self.rxqs[k].regs, self.txqs[k].regs,
                    self.pool.view.memory, foe)

    def run(self, descriptors, slices=20):
        """Attack with so many write-backs; returns {name: value} of what was done, and the faults found."""
        for k in range(slices):
            campaign(self.driver, self.ports, U(descriptors * (k + 1) // slices))
            faults = self.faults()
            if faults:
                break
        attack(self.ports[0])
        attack(self.ports[1])
        seen = sum(np.asarray(port.foe.seen) for port in self.ports)
        return {"path": self.path, "mode": MODE, "protections": sorted(PROTECTED),
                "descriptors": sum(int(port.foe.written) for port in self.ports),
                **dict(zip(KINDS, map(int, seen), strict=True)),
                "lies": self._foes("lies"), "faults": faults or self.faults() + self.compare(seen)}

    def faults(self):
        """What must never be, whatever the device does."""
        found = []
        if self.canaries.damaged():
            found.append(f"{self.canaries.damaged()} canary bytes overwritten")
        if self._foes("wild"):
            found.append(f"{self._foes('wild')} descriptors to send that are no buffer")
        if self.path != "in_place" and audit(self.pool, self.devices) != self.pool.usable:
            found.append(f"{audit(self.pool, self.devices)} of {self.pool.usable} buffers accounted for")
        return found

    def compare(self, seen):
        """Where the driver counted other than the attacker."""
        broken = int(seen[int(NO_EOP) :].sum())
        errors = sum(int(rxq.state.errors) for rxq in self.rxqs)
        pairs = [("errors", errors, broken), ("undone ones dealt with", int(seen[int(UNDONE)]), 0)]
        if self.path == "batch":
            sent, counted = int(self.tally.sent), int(self.pool.view.table.bad_handles)
            pairs += [("received", int(self.tally.received), int(seen[int(SOUND)])),
                      ("failed", int(self.tally.failed), self._foes("lies")), ("freed twice", counted, sent)]
        else:
            control = self.control
            pairs += [("forwarded", int(control.forwarded), self._foes("believed")),
                      ("failed", int(control.failed), self._foes("lies")),
                      ("dropped", int(control.dropped), self._foes("lies") + broken)]
        return [f"{name}: {counted} counted, {done} done" for name, counted, done in pairs if counted != done]

    def close(self):
        """Close the devices; returns what is wrong then."""
        for device in self.devices:
            device.close()
        if self.path != "in_place" and (self.pool.available, len(self.pool.outstanding())) != (self.pool.usable, 0):
            return [f"{self.pool.available} of {self.pool.usable} buffers came back"]
        return []

    def _foes(self, name):
        return sum(int(port.foe[name]) for port in self.ports)


def guarded():
    """`guarded_memory` for this driver."""
    return guarded_memory(ixgbe, ixgbe_in_place)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Attack the 82599 driver from the device's side.")
    parser.add_argument("--descriptors", type=int, default=1_000_000, help="write-backs a path (default 1000000)")
    parser.add_argument("--path", choices=PATHS, action="append", help="batch, fused or in_place (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    code = 0
    for path in args.path or PATHS:
        with guarded() as canaries:
            fight = Fight(path, canaries, args.seed)
            result = fight.run(args.descriptors)
            result["faults"] += fight.close() if not result["faults"] else []
        print(json.dumps(result), flush=True)
        code |= bool(result["faults"])
    return code


if __name__ == "__main__":
    sys.exit(main())
