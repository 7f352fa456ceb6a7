"""What an arena has done so far: counters, fallback reasons, and the frozen dataclass that shows
them.

**What.** The order of the counters in a participant's row, the reasons for which a message
travels in-band, and `Statistics`, which `Arena.statistics()` returns.

**How it works.** Each participant counts in its own row without a lock; reading sums over all
rows, and over the totals of those that are gone.

**Lifetime.** Counters live as long as the arena, longer than the processes that counted.

**When it cannot.** A process killed between sending and counting leaves a message uncounted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

#: Why a message travels in-band, and what its user can do about it.
REASONS: Final[dict[str, str]] = {
    "full": "the arena was full; pass enabled(capacity=...) or drop received objects earlier",
    "memory": "the machine or the memory cgroup had too little memory left; run fewer workers",
    "space": "the system refused to reserve pages; see the limits of the mount",
    "table": "the table of blocks was full; send fewer, larger arrays",
    "busy": "the ledger's lock could not be had in time; is a worker stopped?",
    "channel": "a process that can read there does not take part: it is older than enabled(), or "
    "another program; make pools, queues and managers inside the block",
    "detached": "this process could not attach to the arena; see ulimit -n and ulimit -v",
    "damaged": "a process of the arena has written over its ledger; look for a faulty extension",
}

(
    N_MESSAGES,
    N_BUFFERS,
    NBYTES,
    N_LOADED,
    N_COPIED_OUT,
    NBYTES_COPIED_OUT,
    N_PRIVATIZED,
    NBYTES_PRIVATIZED,
    N_RECLAIMED,
    N_LEFT_SHARED,
) = range(10)
_FALLBACKS_AT: Final = 16


def fallback_counters(reason: str) -> tuple[int, int]:
    """Return the two counters of a reason: messages, and their nbytes."""
    at = _FALLBACKS_AT + 2 * list(REASONS).index(reason)
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


@dataclass(frozen=True, slots=True)
class Statistics:
    """The sums over all participants of an arena, living and dead.

    Attributes
    ----------
    n_messages_out_of_band, n_buffers_out_of_band, nbytes_out_of_band : int
        Messages sent through the arena, their buffers (a large stream counts as one), their bytes.
    n_messages_loaded : int
        Messages received through the arena.
    n_copied_out, nbytes_copied_out : int
        Blocks that receivers copied into ordinary memory and gave back at once.
    n_privatized, nbytes_privatized : int
        Blocks turned into ordinary memory because their holder forked.
    n_reclaimed : int
        Blocks taken back because nobody can read their message any more.
    n_left_shared : int
        Blocks that a fork left shared between parent and child, because the system allowed no
        further mapping (``vm.max_map_count``). Anything but 0 is a reason to worry.
    n_quarantined : int
        Blocks whose entry in the ledger is damaged, and which are not used any more. Anything but
        0 says that some process writes where it should not.
    n_participants : int
        Processes that take part; a dead one counts until somebody has needed what it left.
    fallbacks : mapping of str to Fallback
        Messages at or above the threshold that travelled in-band, by reason.
    n_blocks, nbytes : mapping of str to int
        Blocks, and bytes in use in them, by state: ``"free"`` (bytes that are kept for the next
        message), ``"leased"``, ``"in_flight"``, ``"held"``.
    nbytes_resident : int
        Bytes of the arena that have pages now.
    nbytes_huge : int
        Bytes of it that the process that asks has mapped in huge pages; 0 where the system gives
        none for shared memory.
    capacity : int
        The most bytes that the arena may occupy.
    """

    n_messages_out_of_band: int
    n_buffers_out_of_band: int
    nbytes_out_of_band: int
    n_messages_loaded: int
    n_copied_out: int
    nbytes_copied_out: int
    n_privatized: int
    nbytes_privatized: int
    n_reclaimed: int
    n_left_shared: int
    n_quarantined: int
    n_participants: int
    fallbacks: Mapping[str, Fallback]
    n_blocks: Mapping[str, int]
    nbytes: Mapping[str, int]
    nbytes_resident: int
    nbytes_huge: int
    capacity: int

    @property
    def n_fallbacks(self) -> int:
        """Messages that travelled in-band although they were large enough."""
        return sum(fallback.n_messages for fallback in self.fallbacks.values())

    @property
    def nbytes_fallbacks(self) -> int:
        """Their total size, bytes."""
        return sum(fallback.nbytes for fallback in self.fallbacks.values())


def summed(
    counters: Sequence[int],
    *,
    n_participants: int,
    n_quarantined: int,
    n_blocks: Mapping[str, int],
    nbytes: Mapping[str, int],
    nbytes_resident: int,
    nbytes_huge: int,
    capacity: int,
) -> Statistics:
    """Make the dataclass from the counters of all participants and what the arena knows."""
    return Statistics(
        n_messages_out_of_band=counters[N_MESSAGES],
        n_buffers_out_of_band=counters[N_BUFFERS],
        nbytes_out_of_band=counters[NBYTES],
        n_messages_loaded=counters[N_LOADED],
        n_copied_out=counters[N_COPIED_OUT],
        nbytes_copied_out=counters[NBYTES_COPIED_OUT],
        n_privatized=counters[N_PRIVATIZED],
        nbytes_privatized=counters[NBYTES_PRIVATIZED],
        n_reclaimed=counters[N_RECLAIMED],
        n_left_shared=counters[N_LEFT_SHARED],
        n_quarantined=n_quarantined,
        n_participants=n_participants,
        fallbacks=fallbacks_of(counters),
        n_blocks=n_blocks,
        nbytes=nbytes,
        nbytes_resident=nbytes_resident,
        nbytes_huge=nbytes_huge,
        capacity=capacity,
    )


def nothing() -> Statistics:
    """Return the statistics of an arena that does not exist: zeros."""
    states = dict.fromkeys(("free", "leased", "in_flight", "held"), 0)
    return summed(
        [0] * (_FALLBACKS_AT + 2 * len(REASONS)),
        n_participants=0,
        n_quarantined=0,
        n_blocks=states,
        nbytes=states,
        nbytes_resident=0,
        nbytes_huge=0,
        capacity=0,
    )


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


def format_nbytes(nbytes: int) -> str:
    """Return bytes in the largest binary unit that keeps the number at or above 1."""
    value = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 10 or unit == "bytes" else f"{value:.1f} {unit}"
