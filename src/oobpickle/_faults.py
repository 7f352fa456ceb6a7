"""Named fault points: places where a test can make a process kill itself.

**What.** ``reach("name")`` stands at each step whose interruption must be survivable. In normal
operation it compares one global with ``None``.

**How it works.** The environment variable ``OOBPICKLE_FAULT`` names a point and, after a colon, at
which hit the process dies, for instance ``ledger.lease.committed:3``. It dies by SIGKILL, at once:
no handler, no ``finally``, no ``atexit`` runs. `arm` does the same from inside a process, so that
one child of many can be chosen.

**Lifetime.** A forked child inherits the armed point and its count; a spawned one reads the
variable again. The kernel frees everything that the killed process had.

**When it cannot.** It never fires by itself; nothing in the library arms a point.
"""

from __future__ import annotations

import os
import signal
from typing import Final

VARIABLE: Final = "OOBPICKLE_FAULT"

_armed: str | None = None
_hits_left = 0


def arm(point: str | None) -> None:
    """Kill this process at the given ``"name"`` or ``"name:hit"``; ``None`` disarms."""
    global _armed, _hits_left
    name, _, hit = (point or "").partition(":")
    _armed = name or None
    _hits_left = int(hit or 1)


def reach(point: str) -> None:
    """Die here if this point is armed and its hit count is reached."""
    if _armed is not None and _armed == point:
        _hit()


def _hit() -> None:
    global _hits_left
    _hits_left -= 1
    if _hits_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get(VARIABLE))
