"""The number of a descriptor: whoever has it can read what comes there without a connection.

**What.** The replacement for ``Connection.fileno``.

**How it works.** asyncio's streams, ``os.read`` and ``os.fdopen`` take the bytes of a message from
the pipe themselves, and nothing of ours sees when. All of them ask a connection for its descriptor
first. So the channel is noted then, if that end can be read; but not for multiprocessing, which
reads through the connection. Where the number is then given to a program, that is undone.

**Lifetime.** See `_memory.unloaded`. It asks at call time whether the hook is in.

**When it cannot.** Who takes the number from elsewhere (``_handle``) is not seen.
"""

from __future__ import annotations

import multiprocessing.connection as mp_connection
import selectors
import sys
from types import FrameType
from typing import Any, Final

from oobpickle._foreign import ignoring
from oobpickle._hook import installed
from oobpickle._hook.installed import running
from oobpickle._memory.pipes import channel_id

_PACKAGES: Final = (
    *("multiprocessing", "concurrent", "oobpickle", "joblib", "loky"),
    "multiprocess",
)
_FRAMES_OF_A_SELECTOR: Final = 6  # from `_is_poll` on, with its own and that of `fileno`
_SELECTORS: Final = vars(selectors)
_CONNECTION: Final = vars(mp_connection)


def hooked_fileno(original: Any) -> Any:
    def fileno(self: Any) -> Any:
        fd = original(self)
        if installed.current is not None and self._readable:
            frame = sys._getframe(1)
            if frame.f_globals is _SELECTORS and _is_poll():
                return fd  # each poll of a connection comes here
            if _is_asked_to_read(frame):
                _note(fd)
        return fd

    return fileno


def _is_poll() -> bool:
    """Tell whether it is multiprocessing that waits, if the selector is what it is as a rule."""
    try:
        return sys._getframe(_FRAMES_OF_A_SELECTOR).f_globals is _CONNECTION
    except ValueError:
        return False


def _is_asked_to_read(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_globals is _SELECTORS:  # with it everybody waits
        frame = frame.f_back
    if frame is None:
        return True
    name = frame.f_globals.get("__name__")
    return not isinstance(name, str) or name.partition(".")[0] not in _PACKAGES


def _note(fd: int) -> None:
    hook = running()
    if hook is not None:
        with ignoring(OSError):  # it is not open any more
            hook.arena.unloaded.note(channel_id(fd))
