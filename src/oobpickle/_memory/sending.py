"""Sending: memory for a message, from the request to the envelope that has left.

**What.** `Sending.lease` gets blocks with pages, `Lease` is what a sender has of one message.

**How it works.** A message that is taken apart leases its blocks one by one (``_core/message.c``),
and takes only what is there at once. Here is what comes before and after: the limits of memory
that it looks at, what has to be freed, and waiting, for a message that found no room. For that the
blocks are leased all at once or not at all. What has no pages yet gets them in steps, each after a
look at the headroom of the machine and of every cgroup: past a limit the kernel kills, it does not
refuse. ::

    lease -> Lease -> write -> seal -> depart -> [envelope is written to the pipe] -> settle
              \\------ dropped: blocks are free again --------/

If there is no room, what nobody needs is freed (`reclaim`), then it is waited for: by default as
long as a pipe would take for as many bytes, and once, not by every message. With a file on disk
nobody waits who was not told to: the blocks are leased there.

**Lifetime.** A block that nobody refers to is released, whatever exception was on its way
(`oobpickle._core.Block`). If the process dies before `seal`, the blocks come back at once; after it
they come back when the envelope turns out to be unreadable.

**When it cannot.** `ArenaFullError` with a reason of `_fallback.REASONS`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from oobpickle import _faults
from oobpickle._errors import ArenaFullError, OobPickleError, format_nbytes
from oobpickle._foreign import pass_on_foreign
from oobpickle._memory import headroom
from oobpickle._memory.options import Options
from oobpickle._memory.reclaim import Reclaim
from oobpickle._native import core
from oobpickle._statistics import STATES

_PLAIN_NBYTES_PER_S: Final = 0.3e9  # what a pipe takes, for the default wait_timeout
_FIRST_PAUSE_S: Final = 0.2e-3
_LAST_PAUSE_S: Final = 5e-3
_EVERYTHING: Final = 1 << 62
_COUNT_EVERY_S: Final = 0.1
_PAUSE_COUNTS: Final = 4  # what messages find full one after the other is not counted each time
_TELL_LIMITS_EVERY_S: Final = 1.0
_STEP_NBYTES: Final = 64 << 20
_MARGIN_NBYTES: Final = 256 << 20
#: Want of memory: what has room on disk goes there.
_SPILLED_FOR: Final = frozenset(("full", "memory", "space"))

Blocks = list["core.Block"]


class Lease:
    """The blocks of one message.

    Attributes
    ----------
    blocks : list of Block
        In the order in which they were asked for.
    """

    __slots__ = ("_all", "blocks")

    def __init__(self, all_blocks: core.Blocks, blocks: Blocks) -> None:
        self._all = all_blocks
        self.blocks = blocks

    @property
    def destinations(self) -> list[memoryview]:
        """The memory of each block; until `seal`. What is on disk has none: see `Block.write`."""
        return [memoryview(block) for block in self.blocks]

    @property
    def pairs(self) -> bytes:
        """Index and generation of each block, 64-bit words: with the sizes, where all lies."""
        pairs: bytes = self._all.pairs(self.blocks)
        return pairs

    def seal(self, channel: int) -> None:
        """Finish writing: from here on a receiver may claim the blocks.

        Parameters
        ----------
        channel : int
            `pipes.channel_id` of where the envelope goes, recorded so that the blocks come back
            if nobody can read it any more; 0 if unknown.

        Raises
        ------
        ArenaFullError
            In a child that was forked meanwhile: the blocks are its parent's.
        """
        if not self._all.seal(self.blocks, channel):
            raise ArenaFullError("this process was forked while it sent a message", "detached")
        _faults.reach("lease.sealed")

    def depart(self) -> None:
        """The envelope is about to be written: from now on nothing but `release` frees the blocks.

        Before the write, since an interrupt can come right after it.
        """
        self._all.depart(self.blocks)

    def settle(self) -> None:
        """The envelope has left, or may have: the blocks are no longer this process's to free."""
        self._all.settle(self.blocks)

    def release(self) -> None:
        """Give the blocks back: the envelope has not left."""
        self._all.release(self.blocks)


def disk_full(nbytes: int, why: str | None) -> ArenaFullError:
    """Say that memory has no room, and the disk refuses."""
    return ArenaFullError(
        f"memory is full, and the disk of spill_dir refuses {format_nbytes(nbytes)}: {why}. Make "
        "room there, name another folder, or drop results earlier.",
        "disk",
    )


@contextlib.contextmanager
def writing(nbytes: int) -> Iterator[None]:
    """Within it, blocks on disk get room or bytes; a refusal is an `ArenaFullError`."""
    try:
        yield
    except OSError as error:
        pass_on_foreign(error)
        if isinstance(error, OobPickleError):
            raise
        raise disk_full(nbytes, error.strerror) from error


class _Patience(NamedTuple):
    """Until when a sender waits for room; 0: not at all, since an earlier wait found none.

    `nbytes` of its message, if it waits by default; else `None`: that says nothing about others.
    """

    deadline: float
    nbytes: int | None = None


class Sending:
    """The sending side of an arena."""

    def __init__(
        self, blocks: core.Blocks, options: Options, reclaim: Reclaim, join: Callable[[], bool]
    ) -> None:
        self._blocks = blocks
        self._options = options
        self._capacity = options.capacity or 0
        self._reclaim = reclaim
        self._join = join
        self.vain_nbytes = _EVERYTHING  # so large a message has waited for room in vain
        self._usage = ""  # what an error told last
        self._count_again_at = 0.0
        self._allowance = 0
        self._tell_limits_at = 0.0
        self._tell_limits()
        self._has_disk = blocks.has_disk
        blocks.spills = self._has_disk and not options.wait_timeout

    def lease(
        self, needs: Sequence[int], wait_timeout: float | None = None, *, may_spill: bool = True
    ) -> Lease:
        """Lease blocks of the given nbytes; see `Arena.acquire`."""
        _faults.reach("sending.leasing")
        return Lease(self._blocks, self.blocks_for(list(needs), wait_timeout, may_spill=may_spill))

    def note(self, nbytes: int, fresh_nbytes: int) -> None:
        """Note that a message of `nbytes` found room, and how much of that was fresh pages.

        Only of one with fresh pages, or not smaller than `vain_nbytes`, is there anything to note.
        """
        if nbytes >= self.vain_nbytes:
            self.vain_nbytes = _EVERYTHING
        if fresh_nbytes:
            if time.monotonic() >= self._tell_limits_at:
                self._tell_limits()
            idle_nbytes = self._blocks.idle
            if self._reclaim.look_for_lost(fresh_nbytes):
                # As long as free blocks have pages nobody looks: what is lost would pile up.
                self._reclaim.punch_idle(self._blocks.idle - idle_nbytes)

    def _tell_limits(self) -> None:
        """Say in which cgroups this process is: it may be moved at any time."""
        self._tell_limits_at = time.monotonic() + _TELL_LIMITS_EVERY_S
        core.headroom(headroom.limit_nbytes(), headroom.limits())

    def blocks_for(
        self, needs: list[int], wait_timeout: float | None, *, may_spill: bool = True
    ) -> Blocks:
        """Return leased blocks with pages, all in memory or all on disk.

        Raises
        ------
        ArenaFullError
            If there is no room, memory or lock; nothing stays leased.
        """
        try:
            return self._in_memory(needs, wait_timeout)
        except ArenaFullError as error:
            if not may_spill or not self._has_disk or error.reason not in _SPILLED_FOR:
                raise
        try:
            return self._on_disk(needs)
        except ArenaFullError as error:
            # Perhaps somebody who has died had the room.
            if error.reason != "disk" or not self._reclaim.make_room("disk", 0, again=True):
                raise
        return self._on_disk(needs)

    def _in_memory(self, needs: list[int], wait_timeout: float | None) -> Blocks:
        found = self._blocks.lease(needs)
        if isinstance(found, tuple):
            found = self._wait_for(needs, found, wait_timeout)
        elif self.vain_nbytes < _EVERYTHING and sum(needs) >= self.vain_nbytes:
            self.vain_nbytes = _EVERYTHING  # there is room again
        fresh_nbytes = sum([block.nbytes_fresh for block in found])
        if not fresh_nbytes:
            return found
        try:
            if self._reclaim.look_for_lost(fresh_nbytes):  # there are pages that were lost
                self._blocks.release(found)
                found, again = [], self._blocks.lease(needs)
                found = (
                    self._wait_for(needs, again, wait_timeout)
                    if isinstance(again, tuple)
                    else again
                )
            self._reserve(found)
        except BaseException:
            self._blocks.release(found)  # else a stored traceback would keep them
            raise
        return found

    def _on_disk(self, needs: list[int]) -> Blocks:
        found = self._blocks.lease(needs, True)
        if isinstance(found, tuple):
            reason = core.SHORTAGES[found[0]]
            if reason == "detached":
                raise self._detached()
            if reason != "space":
                raise self._full(reason, *found[1:])
            raise disk_full(found[1], "its file is as long as it can be")
        try:
            with writing(sum(needs)):
                for block in found:
                    while step := min(block.nbytes_fresh, _STEP_NBYTES):
                        if self._blocks.disk_is_memory:
                            self._check_headroom(step, sum(needs))
                        block.reserve(step)
        except BaseException:
            self._blocks.release(found)  # else a stored traceback would keep them
            raise
        return found

    # --- waiting for room

    def _wait_for(
        self, needs: list[int], shortage: tuple[int, int, int], wait_timeout: float | None
    ) -> Blocks:
        patience = self._patience(needs, wait_timeout)
        pause_s, again = _FIRST_PAUSE_S, not patience.deadline
        is_joined = self._blocks.joined
        while True:
            reason, need, room = core.SHORTAGES[shortage[0]], *shortage[1:]
            if not is_joined and reason == "detached" and self._join():
                is_joined = True
            elif reason == "detached":
                raise self._detached()
            elif need > self._capacity or reason in ("table", "damaged", "space", "busy"):
                raise self._full(reason, need, room)
            elif not self._reclaim.make_room(reason, need, again=again):
                if time.monotonic() >= patience.deadline:
                    if patience.nbytes is not None:
                        self.vain_nbytes = min(self.vain_nbytes, patience.nbytes)
                    raise self._full(reason, need, room, again=not patience.deadline)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
                again = True
            found = self._blocks.lease(needs)
            if not isinstance(found, tuple):
                return found
            shortage = found

    def _patience(self, needs: list[int], wait_timeout: float | None) -> _Patience:
        if wait_timeout is None:
            wait_timeout = self._options.wait_timeout
        if wait_timeout is not None:
            return _Patience(time.monotonic() + wait_timeout)
        if self._has_disk:
            return _Patience(0.0)
        nbytes = sum(needs)
        # What others hold for long is waited for once, not by every message.
        if nbytes >= self.vain_nbytes:
            return _Patience(0.0, nbytes)
        return _Patience(time.monotonic() + nbytes / _PLAIN_NBYTES_PER_S, nbytes)

    def _detached(self) -> ArenaFullError:
        if self._blocks.joined:
            return ArenaFullError(
                "the arena cannot be mapped: its descriptors were closed in this process "
                "(os.closerange), or there is no address space; see ulimit -v",
                "detached",
            )
        return ArenaFullError(
            "this process could not attach to the arena: no descriptor or slot is left, or the "
            "lock is busy. See ulimit -n.",
            "detached",
        )

    def _full(self, reason: str, need: int, room: int, *, again: bool = False) -> ArenaFullError:
        if reason == "busy":
            return ArenaFullError("the arena's lock is held by a process that is stopped", reason)
        now = time.monotonic()
        if not again or not self._usage or now >= self._count_again_at:
            _, nbytes, _ = self._blocks.census()
            uses = zip((*STATES, "published", "references"), nbytes, strict=True)
            used = ", ".join(f"{format_nbytes(n)} {state}" for state, n in uses if n)
            self._usage = used or "nothing in use"
            took_s = time.monotonic() - now
            self._count_again_at = now + max(_COUNT_EVERY_S, _PAUSE_COUNTS * took_s)
        return ArenaFullError(
            f"arena full: need {format_nbytes(need)}, {format_nbytes(room)} left of "
            f"{format_nbytes(self._capacity)} ({self._usage}). Pass enabled(capacity=...) or drop "
            "results earlier.",
            reason,
        )

    # --- pages

    def _reserve(self, blocks: Blocks) -> None:
        """Make the pages that blocks do not have yet."""
        total = sum(block.nbytes_fresh for block in blocks)
        if total > _STEP_NBYTES:
            self._check_headroom(total, total)  # rather than make what would have to go back
        for block in blocks:
            while step := min(block.nbytes_fresh, _STEP_NBYTES):
                self._check_headroom(step, total)
                try:
                    block.reserve(step)
                except OSError as error:
                    pass_on_foreign(error)
                    raise ArenaFullError(
                        f"the system refused {format_nbytes(step)} of pages: {error}. "
                        "See the limits of the mount, or pass a smaller capacity.",
                        "space",
                    ) from error

    def _check_headroom(self, nbytes: int, total: int) -> None:
        if nbytes <= self._allowance:
            self._allowance -= nbytes
            return
        # If the next message has to travel in-band, that takes six times its size in ordinary
        # memory, in both processes together; and those who use it take some too.
        limit = headroom.limit_nbytes()
        in_band = min(10 * total, 2 * _MARGIN_NBYTES, limit // 2)
        margin = max(min(_MARGIN_NBYTES, limit // 4), in_band)
        room = headroom.available_nbytes() - margin
        if nbytes > room and self._reclaim.punch_idle():  # free blocks of other sizes had pages
            room = headroom.available_nbytes() - margin
        if nbytes > room:
            raise ArenaFullError(
                f"too little memory: need {format_nbytes(total)} of fresh pages, "
                f"{format_nbytes(max(0, room))} left on the machine or in its memory cgroup. "
                "Run fewer workers, or drop received objects earlier.",
                "memory",
            )
        # Small requests need not look each time; the margin covers what others take meanwhile.
        self._allowance = min(_STEP_NBYTES, (room - nbytes) // 8)
