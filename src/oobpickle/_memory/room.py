"""Room for a message: pages under its blocks, and what to do when there are none left.

**What.** `Room` gives leased blocks their pages within the system's limits, and frees memory that
nobody needs: blocks of the dead, messages that nobody can read, idle blocks of other sizes.

**How it works.** Pages that exist but are not in this process's page tables are entered at once
(``MADV_POPULATE_READ``), which is twice as fast as by faults. Fresh ones are reserved in steps,
each after a look at the headroom of the machine and of every cgroup: past a limit the kernel
kills, it does not refuse. Work on pages is done on leased blocks, without the ledger's lock.

What is in its page tables counts as the resident size of a process, and there are pools that
replace a worker that has grown. So a worker keeps there what it has, and in all 96 MiB or twice the
message at hand: of what it has not, what it used last.

**Lifetime.** ``touched`` remembers what is in this process's page tables; a forked child begins
anew. The process that made the arena, which nobody replaces, keeps everything.

**When it cannot.** `ArenaFullError` with the reason ``memory`` (headroom) or ``space`` (refused
by the system)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from oobpickle import _faults
from oobpickle._errors import ArenaError, ArenaFullError, format_nbytes
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._memory import headroom
from oobpickle._memory.holdings import Holdings
from oobpickle._memory.huge_pages import BY_FAULT, HUGE_NBYTES
from oobpickle._memory.layout import ADOPTED, FOLLOWS, H_CLOSED, UNPROVEN
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.membership import Membership
from oobpickle._memory.pipes import unreadable
from oobpickle._memory.rows import Shortage
from oobpickle._memory.segment import STEP_NBYTES, Segment
from oobpickle._memory.watch import Keeper
from oobpickle._statistics import N_RECLAIMED

_MARGIN_NBYTES: Final = 256 << 20
_FAULTS_SUFFICE_NBYTES: Final = 16 << 10
_TOUCHED_NBYTES: Final = 96 << 20
_MANY_BLOCKS: Final = 256
_SELDOM: Final = 16
_LOOK_EVERY_S: Final = 0.1
_PAUSE_LOOKS: Final = 4  # a look in vain is not repeated for so many times what it took
_FRESH_NBYTES_PER_S: Final = 1e9  # how fast the system makes fresh pages, at best


class Room:
    """The pages of one process's leased and claimed blocks."""

    def __init__(
        self, ledger: Ledger, data: Segment, holdings: Holdings, membership: Membership
    ) -> None:
        self._ledger = ledger
        self._data = data
        self._holdings = holdings
        self._membership = membership
        self._touched: dict[int, tuple[int, int]] = {}  # the last one used at the end
        self._touched_nbytes = 0
        self._n_excesses = 0
        self.keeps_everything = False
        self._inherited: dict[int, tuple[int, int]] = {}
        self._allowance = 0
        self._look_again_at = 0.0
        self._look_s = 0.0
        self._fresh_nbytes = 0

    def furnish(self, index: int, nbytes: int, present_nbytes: int) -> None:
        """Make the first `nbytes` bytes of a leased block fast to write.

        Parameters
        ----------
        index : int
            The block.
        nbytes : int
            What will be written, bytes.
        present_nbytes : int
            How much of it has pages already.

        Raises
        ------
        ArenaFullError
            If there is too little memory left, or the system refuses.
        """
        offset = self._ledger.rows.offset(index)
        self._enter(index, offset, min(nbytes, present_nbytes))
        fresh = self._ledger.pages_nbytes(nbytes) - present_nbytes
        if fresh <= 0:
            return
        for start in range(offset + present_nbytes, offset + present_nbytes + fresh, STEP_NBYTES):
            step = min(STEP_NBYTES, offset + present_nbytes + fresh - start)
            self._check_headroom(step, fresh)
            try:
                self._reserve(start, step)
            except ArenaError as error:  # somebody closed the descriptor
                raise ArenaFullError(str(error), "detached") from error
            except OSError as error:
                pass_on_foreign(error)
                raise ArenaFullError(
                    f"the system refused {format_nbytes(step)} of pages: {error}. "
                    "See the limits of the mount, or pass a smaller capacity.",
                    "space",
                ) from error
            _faults.reach("room.reserved")
            self._data.populate(start, step, write=True)
        self._touch(index, self._ledger.punches[index], nbytes)

    def _reserve(self, start: int, nbytes: int) -> None:
        if nbytes >= HUGE_NBYTES and self._ledger.huge == BY_FAULT:
            # What exists already is not reserved again: its pages stay huge.
            self._data.populate(start, nbytes, write=True)
        self._data.reserve(start, nbytes)

    def enter(self, index: int, nbytes: int) -> None:
        """Make the first `nbytes` bytes of a claimed block fast to read and write."""
        self._enter(index, self._ledger.rows.offset(index), nbytes)

    def _enter(self, index: int, offset: int, nbytes: int) -> None:
        punches = self._ledger.punches[index]
        seen_punches, entered = self._touched.get(index, (punches, 0))
        if seen_punches != punches:
            entered = 0
        if nbytes <= entered:
            self._touched[index] = self._touched.pop(index, (punches, entered))
            return
        if nbytes - entered > _FAULTS_SUFFICE_NBYTES:
            self._data.populate(offset + entered, nbytes - entered, write=False)
        self._touch(index, punches, nbytes)

    def _touch(self, index: int, punches: int, nbytes: int) -> None:
        _, before = self._touched.pop(index, (0, 0))
        self._touched[index] = (punches, nbytes)
        self._touched_nbytes += nbytes - before

    def leave_others(self, nbytes: int) -> None:
        """Take out of the page tables what was used longest ago, if it is much.

        Parameters
        ----------
        nbytes : int
            Of the message at hand, whose blocks this process has.
        """
        most = max(_TOUCHED_NBYTES, 2 * nbytes)
        if self._touched_nbytes <= most or self.keeps_everything:
            return
        self._n_excesses += 1
        touched = list(self._touched.items())  # another thread may be adding to it
        if len(touched) > _MANY_BLOCKS and self._n_excesses % _SELDOM:
            return  # it takes a while, and may be all in use
        total = sum(n for _, (_, n) in touched)
        for index, (_, n) in touched:
            if total <= most:
                break
            if not self._holdings.uses(index):
                self._touched.pop(index, None)
                self._holdings.leave(index, n)
                total -= n
        self._touched_nbytes = total

    def forget(self) -> None:
        """In a forked child: page tables of shared mappings are not inherited."""
        # Kept, not cleared: to drop what it refers to would copy the pages that it lies in.
        self._inherited, self._touched = self._touched, {}
        self._touched_nbytes = 0
        self.keeps_everything = False
        self._allowance = 0

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
        if nbytes > room:
            raise ArenaFullError(
                f"too little memory: need {format_nbytes(total)} of fresh pages, "
                f"{format_nbytes(max(0, room))} left on the machine or in its memory cgroup. "
                "Run fewer workers, or drop received objects earlier.",
                "memory",
            )
        # Small requests need not look each time; the margin covers what others take meanwhile.
        self._allowance = min(STEP_NBYTES, (room - nbytes) // 8)

    # --- making room

    def make(self, shortage: Shortage, *, again: bool) -> bool:
        """Free what nobody needs; tell whether it is worth trying again.

        Parameters
        ----------
        shortage : Shortage
            What was wanted.
        again : bool
            Whether the caller has been waiting already: then nobody looks at /proc each time.
        """
        self._holdings.collect()
        if self._holdings.has_returns:
            return True
        if self.look_for_lost() if again else self._membership.reap() + self.reclaim():
            return True
        return shortage.reason == "full" and self.punch_idle(shortage.need_nbytes)

    def look_for_lost(self, fresh_nbytes: int = 0) -> int:
        """Free what the dead have left; return how many there were.

        After a look in vain not each time: only if that is 0.1 s ago, and four times as long as it
        took; or if it took no longer than the system takes to make the fresh pages that were asked
        for since.

        Parameters
        ----------
        fresh_nbytes : int
            Bytes of fresh pages about to be taken: what was left unread must not pile up.
        """
        self._fresh_nbytes += fresh_nbytes
        start = time.monotonic()
        if start < self._look_again_at and (
            self._fresh_nbytes < self._look_s * _FRESH_NBYTES_PER_S or not fresh_nbytes
        ):
            return 0
        self._look_again_at = start + _LOOK_EVERY_S
        self._fresh_nbytes = 0
        n_freed = self._membership.reap() + self.reclaim()
        now = time.monotonic()
        self._look_s = now - start
        # With many messages in flight a look takes longer than the time between two.
        again_at = max(self._look_again_at, now + _PAUSE_LOOKS * self._look_s)
        self._look_again_at = now if n_freed else again_at
        return n_freed

    def punch_idle(self, nbytes: int, *, above: int | None = None) -> bool:
        """Give pages of free blocks back to the system, `nbytes` of them or all.

        With `above` only what they have more than that, and none that were prepared. Tell whether
        there were any.
        """
        keeper = Keeper()
        watch = self._holdings.watch(keeper, [])
        blocks = watch.blocks
        try:
            self._membership.run(self._take_idle, nbytes, blocks, above)
            for index, _ in blocks:
                try:
                    self._punch(index)
                except BaseException:
                    self._punch(index)  # an interrupt may have come before it, or after
                    raise
                finally:
                    self._holdings.note_punched(index)
        finally:
            self._holdings.give_back(blocks)
            self._holdings.unwatch(watch)
            if blocks:
                self._membership.run(self._holdings.release_pending, self._membership.slot)
        return bool(blocks)

    def punch_uncounted(self) -> None:
        """Give back pages that no block has counted, if nothing is in use and none is counted.

        After a process was killed in the middle of a punch, a block's count says more than there
        is. Whoever writes there has pages made by a fault; and where huge pages are asked for, such
        a page reaches into blocks before and behind. ``mlockall`` makes pages of every hole that it
        can touch.
        """
        with ignoring(ArenaFullError, OSError):
            self._membership.run(self._punch_uncounted)

    def _punch_uncounted(self) -> None:
        census = self._ledger.census()
        in_use = sum(n for state, n in census.n_blocks.items() if state != "free")
        # Somebody may hold what was in a damaged one.
        if in_use or census.n_quarantined or census.nbytes["free"]:
            return
        if self._data.resident_nbytes():
            self._data.punch(0, self._data.nbytes)

    def _take_idle(self, nbytes: int, blocks: list[tuple[int, int]], above: int | None) -> None:
        taken: list[int] = []
        self._ledger.take_idle(nbytes, self._membership.slot, taken, above=above)
        for index in taken:
            generation = self._ledger.generation[index]
            # First what gives it back: an interrupt can come in between.
            blocks.append((index, generation))
            self._holdings.leased[index] = generation

    def _punch(self, index: int) -> None:
        # Where the mount cannot punch, the pages stay, and the account is wrong by them.
        with ignoring(OSError):
            self._data.punch(*self._ledger.pages_of(index))
        if not self._holdings.unclaimed_readers:
            row = self._ledger.rows.known[index]
            self._data.close_range(row.offset, row.end - row.offset)

    def punch_unreserved(self, indices: Sequence[int]) -> None:
        """Take leased blocks off the account whose pages were counted but not all reserved."""
        # Without the lock the account stays too high until the blocks are punched again.
        with ignoring(ArenaFullError, OSError):
            for index in indices:
                self._data.punch(*self._ledger.pages_of(index))
            self._membership.run(self._ledger.mark_punched, indices)

    def reclaim(self) -> int:
        """Free blocks in flight that nobody can ever load; return how many.

        Who has read a message through a connection owns it: it is lost if he is dead. Else it is
        lost if its sender is dead or done, nothing is unread in its channel, no participant is in
        the middle of reading, and none that lives may have read there without our seeing it.
        """
        sent = self._in_flight()
        channels = {channel for _, _, channel in sent if not channel & (FOLLOWS | ADOPTED)}
        if channels and not self._membership.sees_all():
            channels.clear()  # others may have them open: memory is kept, and never freed wrongly
        lost = self._unreadable(channels) if channels else set()
        heads = [
            (index, word)
            for index, word, channel in sent
            if channel & (FOLLOWS | ADOPTED) == ADOPTED or channel & ~UNPROVEN in lost
        ]
        if not heads and not self._ledger.abandoned():
            return 0
        n_freed = int(self._membership.run(self._free_lost, heads))
        if n_freed:
            self._membership.count((N_RECLAIMED, n_freed))
        return n_freed

    def _unreadable(self, channels: set[int]) -> set[int]:
        # When it is closed, what was read is not noted any more: an empty channel means nothing.
        closed = self._ledger.words[H_CLOSED] != 0
        return unreadable(
            {channel & ~UNPROVEN for channel in channels},
            self._membership.pids(),
            even_if_empty=not closed,
            unproven={channel & ~UNPROVEN for channel in channels if channel & UNPROVEN},
        )

    def _in_flight(self) -> list[tuple[int, int, int]]:
        """Return index, word and channel of blocks in flight whose owner is dead, or is done."""
        kept, keeps_all = self._membership.kept()
        others, leased = self._membership.others(), self._holdings.leased
        found = self._ledger.in_flight(others, kept, keeps_all=keeps_all)
        return [sent for sent in found if sent[0] not in leased]

    def _free_lost(self, heads: list[tuple[int, int]]) -> int:
        """Step: free first blocks that are still what was seen, and what follows those gone."""
        if self._membership.anyone_reads():
            return 0
        if self._ledger.words[H_CLOSED] and self._membership.n_others():
            return 0  # processes that saw that no longer say when they read
        own = {index for index, _, _ in self._in_flight()}
        n_freed = self._ledger.free_unread([head for head in heads if head[0] in own])
        return n_freed + self._ledger.free_unread(self._ledger.abandoned())
