"""Channels: which of them may carry envelopes.

**What.** `Channels` knows the pipes and socket pairs that were made inside an enabled block, and
where older processes may be asked to join.

**How it works.** An envelope is of use only to a participant, and a load that fails can hang a
pool for ever, so the sender decides. Whoever has an end of a channel made while the arena was
there was started while it was there, and inherited it. Of any other channel (an older one, the
connection of a manager) the kernel says which processes can read there. They must all have joined,
and so must each descendant of a participant whose open files cannot be seen. What they start joins
too, so one look is enough, until somebody passes an end on: to a process that runs already, or to a
program that it starts.

**Lifetime.** Follows the arena; a spawned child gets the list with its process object.

**When it cannot.** A channel that is not known stays in-band (reason ``channel``).
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Final

from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._hook.backlog import Backlog
from oobpickle._hook.passing import Mark, marked
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.pipes import channel_id, is_related, readers, reading_end
from oobpickle._memory.reclaim import UNPROVEN
from oobpickle._native import core

_MOST_CHANNELS: Final = 1 << 14
_MOST_PAUSES: Final = 10  # a look in vain is soon not repeated for ten times as long as it took
_ASKED_EACH: Final = 16  # how often for each of the readers, since any of them takes the message


class Channels:
    """The channels of one arena, as this process knows them."""

    def __init__(self, arena: SharedArena, known: bytes = b"") -> None:
        self._arena = arena
        numbers = array("Q", known)
        self._n_passed = numbers.pop(0) if numbers else arena.blocks.n_passed
        # From the end that writes to the end that reads.
        self._made = OrderedDict(zip(numbers[::2], numbers[1::2], strict=True))
        self._found: OrderedDict[int, int] = OrderedDict()  # like `_made`: all readers have joined
        self._handed: OrderedDict[int, None] = OrderedDict()  # ends of which that cannot be known
        # By token of the thread: since which fork, and the ends that a program is inheriting.
        self._passing: dict[object, tuple[object, set[int]]] = {}
        self._vain: dict[int, tuple[int, float]] = {}  # ends: looks in vain, when to look again
        #: Ends of which the other one is in a child that cannot import the main module; 0: all are.
        self.spawned: set[int] = set()
        # Ends: how many can read there, and how many of them have not joined, but could.
        self._older: dict[int, tuple[int, int]] = {}
        # Ends: the same when they were last asked, how often since, and what was uncounted by then.
        self._asked: dict[int, tuple[tuple[int, int] | None, int, int]] = {}
        self._n_uncounted = 0
        self._of_old = _standard_streams()
        self.backlog = Backlog(arena)

    def to_bytes(self) -> bytes:
        """Return what a spawned child needs to know."""
        n_passed = self._n_passed  # first: what is out of date there is only looked up again
        pairs = list(self._made.items())
        return array("Q", [n_passed, *(number for pair in pairs for number in pair)]).tobytes()

    def note(self, one_fd: int, other_fd: int) -> None:
        """Remember both ends of a pipe that was made while the arena was there."""
        one, other = channel_id(one_fd), channel_id(other_fd)
        self._made[one] = other
        self._made[other] = one
        for end in (one, other):  # of one that is gone, by the same number
            self._found.pop(end, None)
            self._handed.pop(end, None)
            self.spawned.discard(end)
        _bound(self._made)

    def note_spawned(self, fd: int) -> None:
        """A child gets an end that cannot import the main module of this process."""
        if len(self.spawned) < _MOST_CHANNELS:
            self.spawned.update({*self._ends(fd)} - {0})

    def is_spawned(self, fd: int | None) -> bool:
        """Tell whether what is written there may be read by such a child."""
        return fd is not None and (0 in self.spawned or channel_id(fd) in self.spawned)

    def forget(self, fd: int) -> None:
        """An end is handed to a process that may not have joined: messages stay in-band."""
        ends = {*self._ends(fd)} - {0}
        if not ends:  # a file, such as the memory of a tensor
            return
        self._doubt(ends)
        for end in ends:
            self._handed[end] = None
        _bound(self._handed)
        self._arena.blocks.pass_on([*ends])

    def _doubt(self, ends: Iterable[int]) -> None:
        """From now on the system is asked who can read there."""
        for end in ends:
            self._made.pop(end, None)
            self._found.pop(end, None)

    def is_of_old(self, fd: int) -> bool:
        """Tell whether it was a standard stream before the block, and nobody has sent there."""
        own = channel_id(fd)
        return not own or (own in self._of_old and own not in self._made and own not in self._found)

    @contextlib.contextmanager
    def passing_on(self, fds: Iterable[int], *, by_fork: bool = False) -> Iterator[None]:
        """Let a program that is started inherit descriptors.

        Meanwhile messages stay in-band, and then who can read there has to be looked up. With
        `by_fork`, also for as long as a child that is forked meanwhile has not become the program.
        """
        ends: set[int] = set()
        with ignoring(OSError):
            for fd in fds:
                # Not open, or no descriptor at all.
                with ignoring(OSError), contextlib.suppress(OverflowError):
                    ends.update(self._ends(fd))
        ends.discard(0)
        if not ends:
            yield
            return
        token, mark = object(), Mark(self._arena.blocks, of_children=by_fork)
        try:
            self._passing[token] = core.epoch(), ends
            mark.set()  # before the others look
            self._arena.blocks.pass_on([*ends])
            yield
        finally:
            mark.clear()
            self._arena.blocks.pass_on([*ends])
            self._passing.pop(token, None)
            for end in ends:
                self._vain.pop(end, None)

    def _is_passed_on(self, end: int) -> bool:
        epoch = core.epoch()
        return any(since == epoch and end in ends for since, ends in tuple(self._passing.values()))

    def _ends(self, fd: int) -> tuple[int, int]:
        own = channel_id(fd)
        return own, self._made.get(own) or reading_end(fd)

    def known(self, fd: int) -> int:
        """Return the channel where what is written to `fd` is read, if all readers have joined.

        Else 0.
        """
        if self._arena.blocks.n_passed != self._n_passed:
            self._catch_up()
        n_passed, own = self._n_passed, channel_id(fd)
        channel = self._made.get(own) or self._found.get(own)
        if channel is None:
            channel = self._look(fd, own)
            self._catch_up()
            if n_passed != self._n_passed:
                return 0  # somebody has passed something on during the look
        return channel

    def _catch_up(self) -> None:
        """Doubt what other participants have passed on."""
        n_passed = self._arena.blocks.n_passed
        if n_passed == self._n_passed:
            return
        ends = self._arena.blocks.passed_since(self._n_passed)
        self._doubt([*self._made, *self._found] if ends is None else ends)
        self._n_passed = n_passed

    def _look(self, fd: int, own: int) -> int:
        start = time.monotonic()
        n_vain, look_again_at = self._vain.get(own, (0, 0.0))
        is_handed = own in self._handed or self._is_passed_on(own)
        if own == 0 or is_handed or start < look_again_at:
            return 0
        channel = reading_end(fd)
        able, hidden, living, settled = set[int](), set[int](), set[int](), set[int]()
        try:
            if channel and self._arena.can_be_inherited():
                able, hidden = readers(channel)
                passing = marked(self._arena)
                living = self._arena.reclaim.living()
                settled = living - passing
        except OSError as error:  # no /proc, or no descriptor to look into it
            pass_on_foreign(error)
            able = set()
        self._older.pop(own, None)
        if able and able <= settled and not any(is_related(p, living) for p in hidden - living):
            self._vain.pop(own, None)
            self._found[own] = channel
            _bound(self._found)
            return channel
        if able and all(is_related(pid, living) for pid in able):
            self._older[own] = len(able), len(able - living)
        now = time.monotonic()
        self._vain[own] = n_vain + 1, now + min(n_vain, _MOST_PAUSES) * (now - start)
        if len(self._vain) > _MOST_CHANNELS:
            self._vain.clear()
            self._older.clear()
            self._asked.clear()
        return 0

    def is_older(self, fd: int) -> bool:
        """Tell whether all who can read what is written to `fd` were started by participants.

        Only of a channel that is not known. Those who have not joined may be asked to.
        """
        return channel_id(fd) in self._older

    def marked(self, channel: int) -> int:
        """Return what the table is to hold for a known channel."""
        # Who reads there may never have had a connection: that it is empty proves nothing.
        return channel if channel in self._made or not channel else channel | UNPROVEN

    # --- asking older processes to join

    def ask_again(self) -> None:
        """A process that has not joined has sent a large message."""
        self._n_uncounted += 1

    def asks(self, fd: int) -> bool:
        """Tell whether whoever reads what is written to `fd` is to be asked to join.

        Not for ever, if nobody there follows.
        """
        if self.known(fd) or not self.is_older(fd):
            return False
        own = channel_id(fd)
        readers = self._older[own]
        known, n_asked, since = self._asked.get(own, (None, 0, 0))
        if known != readers:
            n_asked, since = 0, self._n_uncounted
        n_able, _ = readers
        if n_asked >= _ASKED_EACH * (n_able + 1) + (self._n_uncounted - since) // _ASKED_EACH:
            return False
        self._asked[own] = readers, n_asked + 1, since
        return True


def _standard_streams() -> set[int]:
    found = set[int]()
    for fd in range(3):
        with ignoring(OSError):  # not open
            found.add(channel_id(fd))
    return found


def _bound(ends: OrderedDict[int, Any]) -> None:
    """Forget the oldest of too many."""
    while len(ends) > _MOST_CHANNELS:
        ends.popitem(last=False)
