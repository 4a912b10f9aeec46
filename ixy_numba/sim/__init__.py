"""The 82599 as a software device: registers, descriptors and DMA as the datasheet has them, and a wire to plug in.

`sim:KEY=VALUE,…` names a device; `OPTIONS` says what each key does. Without any it receives nothing and only counts
what is sent.
"""

from .bus import SimBus, open_bus
from .model import Model
from .spec import OPTIONS

__all__ = ["OPTIONS", "Model", "SimBus", "open_bus"]
