"""The drivers, one folder each: VENDOR, IDS and REFUSED (PCI device ids) and a Device class in its `__init__`.

One that can forward in place has another Device class, in its module `in_place`.
"""

import importlib.util
import pkgutil

from ..core.errors import UsageError


def find(bus, in_place=False):
    """The Device class for what is on `bus`; UsageError that names the device if there is none."""
    known = []
    for info in pkgutil.iter_modules(__path__):
        driver = importlib.import_module(f"{__name__}.{info.name}")
        if bus.vendor == driver.VENDOR and bus.device in driver.IDS:
            if in_place and not importlib.util.find_spec(f"{driver.__name__}.in_place"):
                raise UsageError(f"{bus.name}: {info.name} devices cannot forward in place; do without it")
            module = importlib.import_module(f"{driver.__name__}.in_place") if in_place else driver
            return next(c for c in vars(module).values()
                        if getattr(c, "driver", None) == info.name and c.__module__ == module.__name__)
        if bus.vendor == driver.VENDOR and bus.device in driver.REFUSED:
            raise UsageError(f"{bus.name}: {bus.vendor:04x}:{bus.device:04x} is a {driver.REFUSED[bus.device]}, which "
                             f"the {info.name} driver does not drive; it drives {', '.join(driver.IDS.values())}")
        known += [f"{driver.VENDOR:04x}:{device:04x} ({name})" for device, name in driver.IDS.items()]
    raise UsageError(f"{bus.name}: no driver for {bus.vendor:04x}:{bus.device:04x}; known are {', '.join(known)}")
