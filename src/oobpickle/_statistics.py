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

from oobpickle._errors import format_nbytes, format_seconds
from oobpickle._fallback import (
    COUNTERS_END,
    REASONS,
    Fallback,
    describe_repeated,
    fallbacks_of,
)

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
    NBYTES_STREAM,
    NS_PICKLING,
    NS_WAITING,
    NS_LOADING,
    N_SPILLED,
    NBYTES_SPILLED,
    NS_SPILLING,
    NBYTES_IN_FILES,
) = range(18)
_MOSTLY: Final = 0.5

#: Of blocks, in the order in which the core counts them.
STATES: Final = ("free", "leased", "in_flight", "held")


@dataclass(frozen=True, slots=True)
class Statistics:
    """The sums over all participants of an arena, living and dead.

    ``str()`` is a short report, without what is zero; ``repr()`` has every field.

    Attributes
    ----------
    n_messages_out_of_band, n_buffers_out_of_band, nbytes_out_of_band : int
        Messages sent through the arena, their buffers (a large stream counts as one), their bytes.
    nbytes_stream : int
        Of these bytes, those of pickle streams: what is not in a buffer.
    nbytes_in_files : int
        Bytes of buffers that were not sent, but their place in a file that `load` has mapped.
    n_messages_loaded : int
        Messages received through the arena.
    n_copied_on_receive, nbytes_copied_on_receive : int
        Blocks that receivers copied into ordinary memory and gave back at once.
    n_copied_at_fork, nbytes_copied_at_fork : int
        Blocks turned into ordinary memory because their holder forked.
    n_spilled, nbytes_spilled : int
        Messages of which something went to ``spill_dir``, as memory was full, and the bytes of it.
    n_reclaimed : int
        Blocks taken back because nobody can read their message any more.
    n_shared_after_fork : int
        Blocks that a fork left shared between parent and child, because the system allowed no
        further mapping (``vm.max_map_count``). Anything but 0 is a reason to worry.
    n_quarantined : int
        Blocks whose entry in the table is damaged, and which are not used any more. Anything but
        0 says that some process writes where it should not.
    seconds_pickling : float
        Pickling large messages, including the copy of each buffer, seconds; like the next two, the
        sum over all processes.
    seconds_waiting : float
        From then until the message could be written: waiting for a slow receiver and for room, and
        copying what had found none at first.
    seconds_loading : float
        Loading messages that came through the arena.
    seconds_spilling : float
        Writing to ``spill_dir``, a part of those two: it is long if the disk is slow.
    n_participants : int
        Processes that have joined; a dead one counts until another one needs what it left.
    fallbacks : mapping of str to Fallback
        Messages at or above the threshold that travelled in-band, by reason.
    n_blocks, nbytes : mapping of str to int
        Blocks, in memory or on disk, and bytes in use in those in memory, by state: ``"free"``
        (bytes that are kept for the next message), ``"leased"``, ``"in_flight"``, ``"held"``.
    n_published, nbytes_published : int
        Blocks in which `broadcast` has stored something, and the bytes in them.
    n_references : int
        References to those blocks: of handles, messages on their way, and received objects. Each is
        one of the blocks in ``n_blocks``, without bytes of its own.
    repeated : tuple of int, or None
        How often the calling process has sent the same array (or other buffer) unchanged, ten
        times or more, and its bytes; that with the most bytes. `broadcast` stores it once.
    nbytes_resident : int
        Bytes of the arena that have pages in memory now.
    nbytes_on_disk : int
        Bytes of blocks in ``spill_dir`` now, also if they are in the page cache, too.
    nbytes_huge : int
        Bytes of the arena that the calling process has mapped as huge pages; 0 where the system
        gives none for shared memory.
    capacity : int
        The most bytes that the arena may occupy.
    """

    n_messages_out_of_band: int
    n_buffers_out_of_band: int
    nbytes_out_of_band: int
    nbytes_stream: int
    nbytes_in_files: int
    n_messages_loaded: int
    n_copied_on_receive: int
    nbytes_copied_on_receive: int
    n_copied_at_fork: int
    nbytes_copied_at_fork: int
    n_spilled: int
    nbytes_spilled: int
    n_reclaimed: int
    n_shared_after_fork: int
    seconds_pickling: float
    seconds_waiting: float
    seconds_loading: float
    seconds_spilling: float
    n_quarantined: int
    n_participants: int
    fallbacks: Mapping[str, Fallback]
    n_blocks: Mapping[str, int]
    nbytes: Mapping[str, int]
    n_published: int
    nbytes_published: int
    n_references: int
    repeated: tuple[int, int] | None
    nbytes_resident: int
    nbytes_on_disk: int
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

    @property
    def nbytes_buffers(self) -> int:
        """Of the bytes out of band, those of buffers."""
        return self.nbytes_out_of_band - self.nbytes_stream

    def __str__(self) -> str:
        return "\n".join([self._verdict(), *self._lines()])

    def _verdict(self) -> str:
        out, fallen = self.n_messages_out_of_band, self.n_fallbacks
        if out + fallen == 0:
            return "no message was large enough to go out of band, or none was seen"
        if fallen == 0:
            return f"all {out:,} large messages out of band" if out > 1 else "1 message out of band"
        share = _percent(out, out + fallen)
        return f"{out:,} of {out + fallen:,} large messages out of band ({share})"

    def _lines(self) -> list[str]:
        lines = []
        if self.n_messages_out_of_band + self.n_fallbacks == 0:
            lines.append('  why      see docs/reference/troubleshooting.md, "It is not faster"')
        if self.n_messages_out_of_band:
            lines.append(
                f"  sent     {format_nbytes(self.nbytes_out_of_band)}: "
                f"{format_nbytes(self.nbytes_buffers)} in {self.n_buffers_out_of_band:,} buffers, "
                f"{format_nbytes(self.nbytes_stream)} of pickle stream"
            )
        if self.nbytes_in_files:
            lines.append(f"  in files {format_nbytes(self.nbytes_in_files)}, sent as their place")
        if self.nbytes_stream > _MOSTLY * (self.nbytes_out_of_band + self.nbytes_in_files):
            share = _percent(self.nbytes_stream, self.nbytes_out_of_band)
            lines.append(f"           {share} is stream: see oobpickle.explain(obj)")
        if self.n_messages_loaded:
            lines.append(f"  loaded   {self.n_messages_loaded:,} messages")
        if hint := describe_repeated(self.repeated, self.nbytes_out_of_band):
            lines.append(f"  {hint}")
        if self.n_published:
            by = "broadcast, share or a fork" if self.n_spilled else "broadcast or share"
            lines.append(
                f"  stored   {format_nbytes(self.nbytes_published)} by {by}, "
                f"with {self.n_references:,} references"
            )
        lines += [
            f"  in-band  {one.n_messages:,} ({format_nbytes(one.nbytes)}): {REASONS[reason]}"
            for reason, one in self.fallbacks.items()
        ]
        spent = {
            "pickling and copying": self.seconds_pickling,
            "waiting": self.seconds_waiting,
            "loading": self.seconds_loading,
            "of these writing to disk": self.seconds_spilling,
        }
        shown = [f"{format_seconds(seconds)} {what}" for what, seconds in spent.items() if seconds]
        lines += [f"  spent    {', '.join(shown)}"] if shown else []
        return lines + self._lines_of_memory()

    def _lines_of_memory(self) -> list[str]:
        states = [
            f"{format_nbytes(self.nbytes[state])} {state.replace('_', ' ')}"
            for state in self.nbytes
            if self.nbytes[state]
        ]
        lines = [f"  memory   {', '.join(states)}"] if states else []
        if self.nbytes_resident:
            lines.append(
                f"           {format_nbytes(self.nbytes_resident)} with pages, of at most "
                f"{format_nbytes(self.capacity)}"
            )
        if self.n_spilled:
            lines.append(
                f"  disk     {format_nbytes(self.nbytes_on_disk)} now; {self.n_spilled:,} messages "
                f"({format_nbytes(self.nbytes_spilled)}) went there, as memory was full"
            )
        counted = {
            "copied by receivers": self.n_copied_on_receive,
            "copied at forks": self.n_copied_at_fork,
            "taken back unread": self.n_reclaimed,
            "shared after a fork: see vm.max_map_count": self.n_shared_after_fork,
            "damaged: see docs/explanation/trust.md": self.n_quarantined,
        }
        blocks = [f"{n:,} {what}" for what, n in counted.items() if n]
        return [*lines, f"  blocks   {', '.join(blocks)}"] if blocks else lines


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole} %"


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
    repeated: tuple[int, int] | None = None,
    nbytes_resident: int,
    nbytes_on_disk: int = 0,
    nbytes_huge: int,
    capacity: int,
) -> Statistics:
    """Make the dataclass from the counters of all participants and what the arena knows."""
    return Statistics(
        n_messages_out_of_band=counters[N_MESSAGES],
        n_buffers_out_of_band=counters[N_BUFFERS],
        nbytes_out_of_band=counters[NBYTES],
        nbytes_stream=counters[NBYTES_STREAM],
        nbytes_in_files=counters[NBYTES_IN_FILES],
        n_messages_loaded=counters[N_LOADED],
        n_copied_on_receive=counters[N_COPIED_ON_RECEIVE],
        nbytes_copied_on_receive=counters[NBYTES_COPIED_ON_RECEIVE],
        n_copied_at_fork=counters[N_COPIED_AT_FORK],
        nbytes_copied_at_fork=counters[NBYTES_COPIED_AT_FORK],
        n_spilled=counters[N_SPILLED],
        nbytes_spilled=counters[NBYTES_SPILLED],
        n_reclaimed=counters[N_RECLAIMED],
        n_shared_after_fork=counters[N_SHARED_AFTER_FORK],
        seconds_pickling=counters[NS_PICKLING] / 1e9,
        seconds_waiting=counters[NS_WAITING] / 1e9,
        seconds_loading=counters[NS_LOADING] / 1e9,
        seconds_spilling=counters[NS_SPILLING] / 1e9,
        n_quarantined=n_quarantined,
        n_participants=n_participants,
        fallbacks=fallbacks_of(counters),
        n_blocks=n_blocks,
        nbytes=nbytes,
        n_published=n_published,
        nbytes_published=nbytes_published,
        n_references=n_references,
        repeated=repeated,
        nbytes_resident=nbytes_resident,
        nbytes_on_disk=nbytes_on_disk,
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
