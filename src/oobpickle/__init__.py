"""Sends the big buffers of multiprocessing objects through shared memory, by value.

**What.** ``with oobpickle.enabled():`` around working ``multiprocessing`` code. The parts are
usable alone: `dumps` and `loads` (a pickle serializer with out-of-band buffers), `register`
(reducers for your own classes), `install` and `uninstall` (the hook without a block), `statistics`.

**How it works.** This module is the public API and nothing else; each name's own module says how.

**Lifetime.** Importing it changes nothing and loads neither NumPy nor cloudpickle.

**When it cannot.** On anything but 64-bit Linux with ``/proc``, `enabled` warns and changes
nothing.
"""

from oobpickle._api import enabled, install, statistics, uninstall
from oobpickle._arena import Arena
from oobpickle._broadcast import broadcast
from oobpickle._errors import (
    ArenaError,
    ArenaFullError,
    EnvelopeError,
    FallbackWarning,
    NotServedWarning,
    OobPickleError,
    PayloadError,
    RepeatedWarning,
    StaleEnvelopeError,
    StructureError,
)
from oobpickle._fallback import Fallback
from oobpickle._pickling.payload import Payload
from oobpickle._pickling.reducers import register, unregister
from oobpickle._pickling.serializer import dumps, loads
from oobpickle._published import Broadcast
from oobpickle._statistics import Statistics

__all__ = [
    "Arena",
    "ArenaError",
    "ArenaFullError",
    "Broadcast",
    "EnvelopeError",
    "Fallback",
    "FallbackWarning",
    "NotServedWarning",
    "OobPickleError",
    "Payload",
    "PayloadError",
    "RepeatedWarning",
    "StaleEnvelopeError",
    "Statistics",
    "StructureError",
    "broadcast",
    "dumps",
    "enabled",
    "install",
    "loads",
    "register",
    "statistics",
    "uninstall",
    "unregister",
]

__version__ = "0.1.0"
