"""Frames for the tests in the guest, and comparing them one by one."""

import random
import threading

import pytest
from guest_wire import carry

OURS = b"\x88\xb5"  # an EtherType for experiments: whatever else comes is the guest's kernel


def mixed_frames(count, seed):
    """Numbered frames of random bytes: every size from 60 to 1514, in no order, again and again."""
    rng = random.Random(seed)
    sizes = list(range(60, 1515))
    frames = []
    for k in range(count):
        if k % len(sizes) == 0:
            rng.shuffle(sizes)
        size = sizes[k % len(sizes)]
        frames.append(b"\x02\0\0\0\0\x0b\x02\0\0\0\0\x0a" + OURS + k.to_bytes(4, "big") + rng.randbytes(size - 18))
    return frames


def ours(frames):
    return [frame for frame in frames if frame[12:14] == OURS]


def assert_same(frames, expected):
    """Frame by frame, so that a failure says which and where and not all of both."""
    for k, (frame, wanted) in enumerate(zip(frames, expected, strict=False)):
        if frame != wanted:
            where = next((j for j, (x, y) in enumerate(zip(frame, wanted, strict=False)) if x != y), "the end")
            pytest.fail(f"frame {k}: {len(frame)} bytes, expected {len(wanted)}; they differ at {where}")
    assert len(frames) == len(expected)


def carry_both_ways(a, b, frames_of_a, frames_of_b, window):
    """`carry` from a to b and from b to a at once: (what came out of b, what came out of a)."""
    results = [None, None]

    def one(k, *args):
        results[k] = carry(*args, window)

    threads = [threading.Thread(target=one, args=(0, a, b, frames_of_a)),
               threading.Thread(target=one, args=(1, b, a, frames_of_b))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
