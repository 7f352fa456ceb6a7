"""Libraries with pools of their own that are not served: whether large messages went through them.

**What.** `replacements` lists what is put under their connections to see the size of a message, and
`names` tells, when a block is left, which of them were used in vain. joblib and loky use
connections of multiprocessing: where a release of theirs is not served, `connections` notes it.

**How it works.** They have connections of their own, in a copy of multiprocessing. What is put
there counts, and does what it replaced. Of a library that was imported inside the block only the
number of processes that it has started is known.

**Lifetime.** What was seen belongs to the hook.

**When it cannot.** A library that is not listed here is not noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from oobpickle._hook import installed
from oobpickle._hook.installed import Hook, Replacement

_SERVED: Final = "multiprocess"  # by its module here, if it is imported before the block
_LIBRARIES: Final = (_SERVED, "billiard")
_STARTED_NONE: Final = "count(1)"
_BY_ITSELF: Final = "pickles by itself and is not served"
_CHANGED: Final = (
    "pickles in another way than the releases that are served, or with a pickler of your own "
    "(set_loky_pickler)"
)
_REASONS: Final = {
    _SERVED: "was imported inside it, and is served if it is imported before",
    "joblib": _CHANGED,
    "loky": _CHANGED,
}


def replacements() -> list[Replacement]:
    """Return what is to be replaced in those of them that are imported by now."""
    wanted: list[tuple[Any, str, Callable[[Any], Any]]] = []
    for library in _LIBRARIES:
        connection = getattr(sys.modules.get(f"{library}.connection"), "Connection", None)
        wanted += [
            (connection, "_send_bytes", hooked_send_bytes),
            (connection, "_recv", hooked_recv),
        ]
    return [one for one in wanted if one[1] in vars(one[0] or object)]


def _note(function: Any, nbytes: int) -> None:
    hook = installed.current
    if hook is not None and nbytes >= hook.threshold:
        hook.not_served.add(str(function.__module__).partition(".")[0])


def hooked_send_bytes(original: Any) -> Any:
    def _send_bytes(self: Any, buf: Any, *args: Any) -> Any:
        _note(original, len(buf))
        return original(self, buf, *args)

    return _send_bytes


def hooked_recv(original: Any) -> Any:
    def _recv(self: Any, size: int, *args: Any) -> Any:
        _note(original, size)
        return original(self, size, *args)

    return _recv


def names(hook: Hook) -> list[str]:
    """Return the libraries that have sent large messages inside the block, or may have."""
    found = {library for library in _LIBRARIES if _may_have_sent(hook, library)}
    return sorted(found | hook.not_served)


def _may_have_sent(hook: Hook, library: str) -> bool:
    """Tell whether it was imported inside the block, and has started a process."""
    connection = getattr(sys.modules.get(f"{library}.connection"), "Connection", None)
    counter = getattr(sys.modules.get(f"{library}.process"), "_process_counter", None)
    is_seen = connection is None or hook.has_replaced(connection, "_recv")
    return not is_seen and counter is not None and repr(counter) != _STARTED_NONE


def describe(libraries: list[str]) -> str:
    """Say that nothing went out of band, and why."""
    reasons = [f"{library} {_REASONS.get(library, _BY_ITSELF)}" for library in libraries]
    return (
        f"nothing went out of band in this block: {' and '.join(reasons)}. "
        "Its messages travel as without oobpickle; see docs/reference/libraries.md"
    )
