"""How many instructions a packet may cost: counted exactly, so that a change which costs more does not go unseen."""

import json

import numba

from ixy_numba.core.errors import IxyError

from .common import HERE, MODES, say, tell
from .counting import callgrind

FILE = HERE / "budget.json"
BATCH_SIZES = (8, 32)
TOLERANCE = 0.03


def count():
    """{variant: {batch size: instructions a packet}} for every form of ours in both modes."""
    found = {}
    for mode in MODES:
        say(f"budget: {mode} mode …")
        for name, by_batch in callgrind(mode, BATCH_SIZES, against=()).items():
            found[name] = {str(batch): round(events["instructions"], 2) for batch, events in by_batch.items()}
    return found


def run(update):
    """Print the counts beside the budget; IxyError where one is exceeded. `update` makes them the budget."""
    if not (update or FILE.exists()):
        raise IxyError(f"{FILE.name} is missing; make it: python -m bench budget --update")
    counted = count()
    if update:
        FILE.write_text(json.dumps({"numba": numba.__version__, "instructions": counted}, indent=1) + "\n")
        tell(f"{FILE.relative_to(HERE.parent)} holds the counts of now")
        return
    budget = json.loads(FILE.read_text())
    if budget["numba"] != numba.__version__:
        tell(f"note: the budget was counted with numba {budget['numba']}, this is {numba.__version__}")
    exceeded = compare(counted, budget["instructions"])
    for name, by_batch in counted.items():
        for batch, found in by_batch.items():
            tell(f"{name:<14} batch {batch:>3}: {found:7.2f} instructions a packet, budget "
                 f"{budget['instructions'].get(name, {}).get(batch, 'none')}")
    if exceeded:
        raise IxyError("; ".join(exceeded) + f" (over {100 * TOLERANCE:.0f} % more than the budget); find out why, or "
                       "accept it: python -m bench budget --update")


def compare(counted, budget):
    """What is over budget, and what has none."""
    faults = []
    for name, by_batch in counted.items():
        for batch, found in by_batch.items():
            allowed = budget.get(name, {}).get(batch)
            if allowed is None:
                faults.append(f"{name} at batch {batch} has no budget")
            elif found > allowed * (1 + TOLERANCE):
                faults.append(f"{name} at batch {batch}: {found} instructions a packet, budget {allowed}")
    return faults
