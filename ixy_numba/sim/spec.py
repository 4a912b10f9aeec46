"""The keys of a `sim:KEY=VALUE,…` device spec."""

import re
from dataclasses import dataclass

from ..core.errors import UsageError
from .wire import MAX_SIZE, MIN_SIZE

OPTIONS = {
    "gen": "receive generated frames: RATE a second (1000000, 1e6, 2.5M), or `line` for 10 Gbit/s",
    "frames": "stop the generator after N frames; without gen= as fast as the driver takes them",
    "size": f"bytes of a generated frame without CRC, {MIN_SIZE} to {MAX_SIZE} (60)",
    "flows": "number of UDP source ports that the generator uses, 1 to 60000 (1024)",
    "in": "receive the frames of a pcap FILE, each as soon as a descriptor is free",
    "rate": "with in=: frames a second; what finds no descriptor is lost",
    "loop": "with in=: play the file N times (1)",
    "out": "write what is sent to a pcap FILE",
    "tap": "connect to the TAP interface NAME, made if need be (needs root or CAP_NET_ADMIN)",
    "link": "connect to the other device of this process that has the same NAME here",
    "loss": "lose received frames with this probability, 0 to 1",
    "corrupt": "flip a bit of received frames with this probability, 0 to 1: their CRC is wrong then",
    "delay": "receive every frame this many microseconds late",
    "seed": "seed of loss and corruption (1)",
    "mac": "the device's address, aa:bb:cc:dd:ee:ff",
    "device": "PCI device id in hexadecimal (10fb)",
    # DEVIATION(sim-runts): short frames are legal by default, so that captures of them pass byte for byte.
    "min_frame": "shortest legal frame in bytes without CRC, 14 to 60 (14; hardware has 60)",
}
LINE_RATE, WIRE_OVERHEAD = 10e9, 24  # bit/s; CRC, preamble and gap in bytes
_SUFFIX = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass
class Spec:
    """A parsed device spec; None where nothing was said."""

    rate: float | None = None  # frames a second; None: as fast as the driver takes them
    generate: bool = False
    frames: int | None = None
    size: int = 60
    flows: int = 1024
    capture_in: str | None = None
    loop: int = 1
    capture_out: str | None = None
    tap: str | None = None
    link: str | None = None
    loss: float = 0.0
    corrupt: float = 0.0
    delay_us: float = 0.0
    seed: int = 1
    mac: bytes | None = None
    device: int = 0x10FB
    min_frame: int = 14

    @property
    def finite(self):
        """Whether what the device receives comes to an end."""
        return self.capture_in is not None or self.generate and self.frames is not None

    @property
    def endless(self):
        return self.tap is not None or self.link is not None or self.generate and self.frames is None


def parse(spec, options):
    """The `options` of a device as a Spec; `spec` is what was typed. UsageError names the key and what it takes."""
    for key in options:
        if key not in OPTIONS:
            raise UsageError(f"{spec}: unknown key {key!r}: expected one of {', '.join(OPTIONS)}")
    _refuse_combinations(spec, options)
    known = {key: _value(spec, key, text) for key, text in options.items()}
    result = Spec()
    names = {"in": "capture_in", "out": "capture_out", "delay": "delay_us"}
    for key, value in known.items():
        if key != "gen":
            setattr(result, names.get(key, key), value)
    if "gen" in known or "frames" in known:
        result.generate = True
        gen = known.get("gen")
        result.rate = LINE_RATE / (8 * (result.size + WIRE_OVERHEAD)) if gen == "line" else gen
    return result


def _refuse_combinations(spec, options):
    """What cannot go together."""
    given = set(options)
    generator = {"gen", "frames"} & given
    sources = [*sorted(generator)[:1], *sorted({"in", "tap", "link"} & given)]
    sinks = sorted({"out", "tap", "link"} & given)
    for several, what in ((sources, "what it receives"), (sinks, "where it sends to")):
        if len(several) > 1:
            raise UsageError(f"{spec}: {' and '.join(f'{key}=' for key in several)} cannot be combined: "
                             f"each says {what}; keep one")
    for keys, needed, any_of in ((("size", "flows"), "gen= or frames=", generator),
                                 (("rate", "loop"), "in=", {"in"} & given),
                                 (("loss", "corrupt", "delay"), "a source (gen=, frames=, in=, tap=, link=)", sources)):
        for key in keys:
            if key in given and not any_of:
                raise UsageError(f"{spec}: {key}= needs {needed}")


def _value(spec, key, text):
    """The value of one key."""
    try:
        return _PARSERS[key](text)
    except ValueError as error:
        raise UsageError(f"{spec}: {key}={text}: expected {error}; {key}: {OPTIONS[key]}") from None


def _scaled(text):
    """`1000000`, `1e6`, `1M`: the number, or None for anything else."""
    match = re.fullmatch(r"(\d{1,40}(?:\.\d*)?(?:[eE]\d{1,2})?)([kKmMgG]?)", text, re.ASCII)  # always finite
    return float(match[1]) * _SUFFIX[match[2].lower()] if match else None


def _rate(text):
    value = _scaled(text)
    if value is None or not 0 < value <= 1e9:
        raise ValueError("a number of frames a second, above 0 and at most 1e9")
    return value


def _whole(low, high):
    def parse(text):
        value = int(text) if re.fullmatch(r"\d{1,40}", text, re.ASCII) else _scaled(text)
        if value is None or value != int(value) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return parse


def _number(high):
    def parse(text):
        value = float(text) if re.fullmatch(r"\d*\.?\d+(?:[eE][-+]?\d+)?|\d+\.", text, re.ASCII) else -1.0
        if not 0 <= value <= high:
            raise ValueError(f"a number from 0 to {high:g}")
        return value

    return parse


def _mac(text):
    if not re.fullmatch(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", text):
        raise ValueError("six bytes, aa:bb:cc:dd:ee:ff")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise ValueError("an address of one station: the lowest bit of the first byte is 0, and not all bytes are")
    return mac


def _device_id(text):
    if not re.fullmatch(r"(0[xX])?[0-9a-fA-F]{1,4}", text):
        raise ValueError("a hexadecimal number of at most four digits")
    return int(text, 16)


def _name(text):
    if not re.fullmatch(r"[^\s/:%]{1,15}", text) or text in (".", "..") or not text.isascii():
        raise ValueError("an interface name: 1 to 15 ASCII characters without blanks, '%', ':' and '/'")
    return text


_PARSERS = {
    "gen": lambda text: "line" if text == "line" else _rate(text),
    "frames": _whole(1, 1 << 48), "size": _whole(MIN_SIZE, MAX_SIZE), "flows": _whole(1, 60000),
    "in": str, "rate": _rate, "loop": _whole(1, 1 << 20), "out": str, "tap": _name, "link": str,
    "loss": _number(1), "corrupt": _number(1), "delay": _number(1e9), "seed": _whole(1, (1 << 63) - 1),
    "mac": _mac, "device": _device_id, "min_frame": _whole(14, 60),
}
