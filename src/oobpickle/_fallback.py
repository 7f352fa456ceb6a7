"""Why a message travels in-band: every reason, and its text.

**What.** `REASONS`, and the counters of each in a participant's row; `Fallback`, which shows them,
and `describe_fallbacks`, the text of the warning that ``_api.enabled.__exit__`` gives at the end of
the block.

**How it works.** Where memory cannot be had an `ArenaFullError` carries the reason: of ``enum
shortage`` in ``_core/core.h``, or from `_memory.sending`. Where a channel must not be used
`_hook.connections` and `_hook.multiprocess` name it. ``_hook.installed.Hook.count_fallback`` counts
both.

**Lifetime.** See `_statistics`.

**When it cannot.** A reason that is not in `REASONS` is a `ValueError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from oobpickle._errors import format_nbytes

#: Why a message travels in-band, and what its user can do about it.
REASONS: Final[dict[str, str]] = {
    "full": "the arena was full; pass enabled(capacity=...) or drop received objects earlier",
    "memory": "the machine or the memory cgroup had too little memory left; run fewer workers",
    "disk": "memory was full, and the disk of spill_dir was full too, or refused a write; make "
    "room there, or drop received objects earlier",
    "space": "the system refused to reserve pages; see the limits of the mount",
    "table": "the table of blocks was full; send fewer, larger arrays",
    "busy": "the lock of the arena could not be had in time; is a worker stopped?",
    "channel": "a process that can read that channel has not joined: it is older than enabled(), "
    "or another program; make pools, queues and managers inside the block",
    "detached": "a process could not attach to the arena, or its descriptors were closed there, as "
    "code does that makes a daemon of a process (os.closerange); see ulimit -n and ulimit -v, and "
    "close only descriptors that you have opened, or before the block",
    "damaged": "a process of the arena has written over its table; look for a faulty extension",
}

_FIRST_COUNTER: Final = 20  # before it are those of `_statistics`
COUNTERS_END: Final = _FIRST_COUNTER + 2 * len(REASONS)


def fallback_counters(reason: str) -> tuple[int, int]:
    """Return the two counters of a reason: messages, and their nbytes."""
    at = _FIRST_COUNTER + 2 * list(REASONS).index(reason)
    return at, at + 1


@dataclass(frozen=True, slots=True)
class Fallback:
    """Messages that travelled in-band for one reason.

    Attributes
    ----------
    n_messages : int
        How many.
    nbytes : int
        Their total size, bytes: streams and buffers.
    """

    n_messages: int
    nbytes: int


def fallbacks_of(counters: Sequence[int]) -> dict[str, Fallback]:
    """Return the fallbacks in a list of counters, without the reasons that never occurred."""
    found = {}
    for reason in REASONS:
        at, at_nbytes = fallback_counters(reason)
        if counters[at]:
            found[reason] = Fallback(counters[at], counters[at_nbytes])
    return found


def describe_fallbacks(fallbacks: Mapping[str, Fallback]) -> str:
    """Say in one sentence each how many, how large, why, and what to change."""
    parts = [
        f"{fallback.n_messages} ({format_nbytes(fallback.nbytes)}) because {REASONS[reason]}"
        for reason, fallback in fallbacks.items()
    ]
    n_messages = sum(fallback.n_messages for fallback in fallbacks.values())
    plural = "message" if n_messages == 1 else "messages"
    return f"{n_messages} {plural} travelled in-band, none was lost: {'; '.join(parts)}"


_LEAST_REPEATED_NBYTES: Final = 32 << 20


def describe_repeated(repeated: tuple[int, int] | None, nbytes: int) -> str:
    """Say that the same memory was sent again and again, if it was most of `nbytes` in all."""
    if repeated is None:
        return ""
    n_times, nbytes_each = repeated
    total = n_times * nbytes_each
    if total < _LEAST_REPEATED_NBYTES or 2 * total < nbytes:
        return ""
    return (
        f"the same array (or other buffer) of {format_nbytes(nbytes_each)} was sent {n_times} "
        f"times, unchanged: {format_nbytes(total)} of {format_nbytes(max(nbytes, total))} in all. "
        "oobpickle.broadcast(obj) stores an object once for all who are to have it; send what it "
        "returns in its place."
    )
