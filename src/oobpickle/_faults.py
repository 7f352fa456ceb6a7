"""Named fault points: places where a test can make a process kill itself.

**What.** ``reach("name")`` stands at each step whose interruption must be survivable. In normal
operation it looks its name up in an empty set.

**How it works.** The extension module has points of its own, in its steps; they are armed with the
others. The environment variable ``OOBPICKLE_FAULT`` names a point and, after colons, at
which hit the process dies and of which signal, for instance ``lease.committed:3:SEGV``. If
neither is said, it dies at the first hit, by SIGKILL, at once: no handler, no ``finally``, no
``atexit`` runs. `arm` does the same from inside a process, so that one child of many can be chosen.

**Lifetime.** A forked child inherits the armed point and its count; a spawned one reads the
variable again. The kernel frees everything that the killed process had.

**When it cannot.** It never fires by itself; nothing in the library arms a point. Of a signal that
the process ignores or handles it does not die.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

from oobpickle._native import core

VARIABLE: Final = "OOBPICKLE_FAULT"

_armed: str | None = None
_hits_left = 0
_signal = signal.SIGKILL
#: Looks the name up in an empty set, in C: it stands in the way of every message.
_nothing: Final[Callable[[str], object]] = frozenset[str]().__contains__
reach: Callable[[str], object] = _nothing


def arm(point: str | None) -> None:
    """Kill this process at the given point; ``None`` disarms.

    Parameters
    ----------
    point : str or None
        ``"name"``, ``"name:hit"`` or ``"name:hit:signal"``; the signal without its ``SIG``.
    """
    global _armed, _hits_left, _signal, reach
    name, hit, number = [*(point or "").split(":"), "", ""][:3]
    _armed = name or None
    _hits_left = int(hit or 1)
    _signal = signal.Signals[f"SIG{number or 'KILL'}"]
    reach = _reach if _armed else _nothing
    if core is not None:
        core.arm(_armed, _hits_left, _signal)


def _reach(point: str) -> None:
    """Die here if this point is armed and its hit count is reached."""
    global _hits_left
    if _armed != point:
        return
    _hits_left -= 1
    if _hits_left == 0:
        os.kill(os.getpid(), _signal)


arm(os.environ.get(VARIABLE))
