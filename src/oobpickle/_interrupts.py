"""Ctrl-C in a place where Python swallows exceptions: deliver it again a moment later.

**What.** `repost` makes the main thread see a KeyboardInterrupt that arrived inside a weakref
callback or a fork hook, where the interpreter prints and drops every exception.

**How it works.** A thread sleeps for a few milliseconds, calls ``_thread.interrupt_main`` and ends.

**Lifetime.** The thread exists only in this rare case, for 10 ms.

**When it cannot.** At interpreter shutdown no thread starts; then nothing is left to interrupt.
"""

from __future__ import annotations

import _thread
import contextlib
import time
from typing import Final

_DELAY_S: Final = 0.01


def repost() -> None:
    """Raise KeyboardInterrupt in the main thread, after the caller has returned."""
    with contextlib.suppress(RuntimeError):
        _thread.start_new_thread(_deliver, ())


def _deliver() -> None:
    time.sleep(_DELAY_S)
    _thread.interrupt_main()
