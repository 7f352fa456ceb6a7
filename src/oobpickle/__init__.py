"""Sends the big buffers of multiprocessing objects through shared memory, by value.

**What.** ``with oobpickle.enabled():`` around working ``multiprocessing`` code. The parts are
usable alone: `dumps` and `loads` (a pickle serializer with out-of-band buffers), `dump`, `load` and
`verify` (an object in a file), `register` (reducers for your own classes), `install` and
`uninstall` (the hook without a block), `statistics`.

**How it works.** This module is the public API and nothing else; each name's own module says how.

**Lifetime.** Importing it changes nothing and loads neither NumPy nor cloudpickle.

**When it cannot.** On anything but 64-bit Linux with ``/proc``, `enabled` warns and changes
nothing.
"""

import sys as _sys
import typing as _typing

if getattr(_sys, "argv", [])[1:2] == ["doctor"] and _sys.argv[0].endswith(("-m", "oobpickle")):
    from oobpickle._cli import rescue as _rescue  # noqa: F401  it has to work if the rest does not

from oobpickle._api import enabled, install, statistics, uninstall
from oobpickle._arena import Arena
from oobpickle._broadcast import broadcast
from oobpickle._errors import (
    ArenaError,
    ArenaFullError,
    EnvelopeError,
    FallbackWarning,
    FileFormatError,
    LockOwnerDiedWarning,
    NotServedWarning,
    OobPickleError,
    PayloadError,
    RepeatedWarning,
    SharedStructureError,
    StaleEnvelopeError,
    StructureError,
)
from oobpickle._fallback import Fallback
from oobpickle._files.layout import FileLayout
from oobpickle._files.storing import dump, load, verify
from oobpickle._merge.merging import merge
from oobpickle._merge.writing import writable
from oobpickle._pickling.payload import Payload
from oobpickle._pickling.reducers import register, unregister
from oobpickle._pickling.serializer import dumps, loads
from oobpickle._published import Broadcast
from oobpickle._share import share
from oobpickle._shared import Shared
from oobpickle._statistics import Statistics

__all__ = [
    "Arena",
    "ArenaError",
    "ArenaFullError",
    "Broadcast",
    "EnvelopeError",
    "Explanation",
    "Fallback",
    "FallbackWarning",
    "FileFormatError",
    "FileLayout",
    "LockOwnerDiedWarning",
    "NotServedWarning",
    "OobPickleError",
    "Payload",
    "PayloadError",
    "RepeatedWarning",
    "Shared",
    "SharedStructureError",
    "StaleEnvelopeError",
    "Statistics",
    "StructureError",
    "broadcast",
    "dump",
    "dumps",
    "enabled",
    "explain",
    "install",
    "load",
    "loads",
    "merge",
    "register",
    "share",
    "statistics",
    "uninstall",
    "unregister",
    "verify",
    "writable",
]

__version__ = "0.1.0"


if _typing.TYPE_CHECKING:
    from oobpickle._explain.explaining import explain
    from oobpickle._explain.explanation import Explanation


def __getattr__(name: str) -> object:
    """Import what most programs do not need, so that it costs them no time."""
    if name == "testing":
        import oobpickle.testing as testing  # `from` would ask here again

        return testing
    if name in ("explain", "Explanation"):
        from oobpickle._explain.explaining import explain
        from oobpickle._explain.explanation import Explanation

        globals().update(explain=explain, Explanation=Explanation)
        return globals()[name]
    raise AttributeError(f"module 'oobpickle' has no attribute {name!r}")
