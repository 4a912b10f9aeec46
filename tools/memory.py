"""What was there before a tool changed it, for its `undo`: a JSON object in a file that is gone with the next boot."""

import json

from . import Refused


def remembered(memory):
    """All that is kept in the file `memory`, as a dict."""
    try:
        return json.loads(memory.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Refused(f"{memory} cannot be read ({error}); remove it, then nothing can be undone") from None


def remember(memory, key, value):
    """Call this before the change. The first value is the one to go back to: later ones are not kept."""
    before = remembered(memory)
    if key in before:
        return
    new = memory.with_suffix(".new")  # a full disk must not cost what is kept already
    try:
        new.write_text(json.dumps({**before, key: value}))
        new.replace(memory)
    except PermissionError:
        raise Refused("changes are made by root only; use sudo, or look first with --dry-run") from None
    except OSError as error:
        raise Refused(f"{new}: {error.strerror}; without it nothing could be undone, so nothing is changed") from None
