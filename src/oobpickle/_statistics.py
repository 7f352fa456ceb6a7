"""What an arena has done so far: counters, and the frozen dataclass that shows them.

**What.** The order of the counters in a participant's row, and `Statistics`, which
`Arena.statistics()` returns. Those of fallbacks come behind: `_fallback`.

**How it works.** Each participant counts in its own row without a lock; reading sums over all
rows, and over the totals of those that are gone.

**Lifetime.** Counters live as long as the arena, longer than the processes that counted.

**When it cannot.** A process killed between sending and counting leaves a message uncounted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from oobpickle._fallback import COUNTERS_END, Fallback, fallbacks_of

(
    N_MESSAGES,
    N_BUFFERS,
    NBYTES,
    N_LOADED,
    N_COPIED_ON_RECEIVE,
    NBYTES_COPIED_ON_RECEIVE,
    N_COPIED_AT_FORK,
    NBYTES_COPIED_AT_FORK,
    N_RECLAIMED,
    N_SHARED_AFTER_FORK,
) = range(10)

#: Of blocks, in the order in which the core counts them.
STATES: Final = ("free", "leased", "in_flight", "held")


@dataclass(frozen=True, slots=True)
class Statistics:
    """The sums over all participants of an arena, living and dead.

    Attributes
    ----------
    n_messages_out_of_band, n_buffers_out_of_band, nbytes_out_of_band : int
        Messages sent through the arena, their buffers (a large stream counts as one), their bytes.
    n_messages_loaded : int
        Messages received through the arena.
    n_copied_on_receive, nbytes_copied_on_receive : int
        Blocks that receivers copied into ordinary memory and gave back at once.
    n_copied_at_fork, nbytes_copied_at_fork : int
        Blocks turned into ordinary memory because their holder forked.
    n_reclaimed : int
        Blocks taken back because nobody can read their message any more.
    n_shared_after_fork : int
        Blocks that a fork left shared between parent and child, because the system allowed no
        further mapping (``vm.max_map_count``). Anything but 0 is a reason to worry.
    n_quarantined : int
        Blocks whose entry in the table is damaged, and which are not used any more. Anything but
        0 says that some process writes where it should not.
    n_participants : int
        Processes that have joined; a dead one counts until somebody has needed what it left.
    fallbacks : mapping of str to Fallback
        Messages at or above the threshold that travelled in-band, by reason.
    n_blocks, nbytes : mapping of str to int
        Blocks, and bytes in use in them, by state: ``"free"`` (bytes that are kept for the next
        message), ``"leased"``, ``"in_flight"``, ``"held"``.
    n_published, nbytes_published : int
        Blocks in which `broadcast` has stored something, and the bytes in them.
    n_references : int
        What stands for one of those in a handle, on its way, or where it has arrived. Each is one
        of the blocks in `n_blocks`, without bytes of its own.
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
    n_copied_on_receive: int
    nbytes_copied_on_receive: int
    n_copied_at_fork: int
    nbytes_copied_at_fork: int
    n_reclaimed: int
    n_shared_after_fork: int
    n_quarantined: int
    n_participants: int
    fallbacks: Mapping[str, Fallback]
    n_blocks: Mapping[str, int]
    nbytes: Mapping[str, int]
    n_published: int
    nbytes_published: int
    n_references: int
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
    n_published: int = 0,
    nbytes_published: int = 0,
    n_references: int = 0,
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
        n_copied_on_receive=counters[N_COPIED_ON_RECEIVE],
        nbytes_copied_on_receive=counters[NBYTES_COPIED_ON_RECEIVE],
        n_copied_at_fork=counters[N_COPIED_AT_FORK],
        nbytes_copied_at_fork=counters[NBYTES_COPIED_AT_FORK],
        n_reclaimed=counters[N_RECLAIMED],
        n_shared_after_fork=counters[N_SHARED_AFTER_FORK],
        n_quarantined=n_quarantined,
        n_participants=n_participants,
        fallbacks=fallbacks_of(counters),
        n_blocks=n_blocks,
        nbytes=nbytes,
        n_published=n_published,
        nbytes_published=nbytes_published,
        n_references=n_references,
        nbytes_resident=nbytes_resident,
        nbytes_huge=nbytes_huge,
        capacity=capacity,
    )


def nothing() -> Statistics:
    """Return the statistics of an arena that does not exist: zeros."""
    return summed(
        [0] * COUNTERS_END,
        n_participants=0,
        n_quarantined=0,
        n_blocks=dict.fromkeys(STATES, 0),
        nbytes=dict.fromkeys(STATES, 0),
        nbytes_resident=0,
        nbytes_huge=0,
        capacity=0,
    )
