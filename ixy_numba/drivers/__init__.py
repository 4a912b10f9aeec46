"""The drivers, one folder each: VENDOR, IDS and REFUSED (PCI device ids) and a Device class in its `__init__`."""

import importlib
import pkgutil

from ..core.errors import UsageError


def find(bus):
    """The Device class for what is on `bus`; UsageError that names the device if there is none."""
    known = []
    for info in pkgutil.iter_modules(__path__):
        driver = importlib.import_module(f"{__name__}.{info.name}")
        if bus.vendor == driver.VENDOR and bus.device in driver.IDS:
            return next(c for c in vars(driver).values() if getattr(c, "driver", None) == info.name)
        if bus.vendor == driver.VENDOR and bus.device in driver.REFUSED:
            raise UsageError(f"{bus.name}: {bus.vendor:04x}:{bus.device:04x} is a {driver.REFUSED[bus.device]}, which "
                             f"the {info.name} driver does not drive; it drives {', '.join(driver.IDS.values())}")
        known += [f"{driver.VENDOR:04x}:{device:04x} ({name})" for device, name in driver.IDS.items()]
    raise UsageError(f"{bus.name}: no driver for {bus.vendor:04x}:{bus.device:04x}; known are {', '.join(known)}")
