"""Retention: how many bytes of pages the free blocks of an arena may keep, and who sees to it.

**What.** `Retention` keeps what free blocks have, once the last received array is gone and nothing
is on its way, to the larger of 64 MiB and an eighth of the memory that there is: the lowest limit
of a memory cgroup above this process or, if that is less, what the machine has available.

**How it works.** When an array dies, nobody of ours need ever come by. So it is seen to when it is
received: what would be too much if all that is held were dropped is *going*, which means that the
death of its anchor gives its pages back to the system, in a call of C. The block is this process's
until it collects that, so nobody else can be using it. ::

    free + held, but not going <= the limit                    (prepared memory does not count)

The array that came last is going, and an earlier one stays instead: in a stream that holds a few
at a time, each has become one that stays by the time it is dropped, and its pages are kept. Before
that goes what is old: it has lived for longer than arrays did of late, so it is likely to outlive
what comes. What comes back in another way
(copied out, given up) is given back by whoever releases it, once next to nothing is on its way.

**Lifetime.** Nothing is kept but the limit, for a second. A forked child's copies of anchors give
nothing back that is the parent's: see `Holdings.reset_in_child`.

**When it cannot.** While the lock cannot be had, more is going than need be. Locked memory
(mlock(2)) goes back when the process next collects what has died."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from oobpickle._errors import ArenaFullError
from oobpickle._foreign import ignoring
from oobpickle._memory import headroom
from oobpickle._memory.holdings import Holdings
from oobpickle._memory.layout import H_RESIDENT, H_SETTLED
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.membership import Membership
from oobpickle._memory.room import Room
from oobpickle._memory.watch import Watch

_LEAST_NBYTES: Final = 64 << 20
_SHARE: Final = 8
_LOOK_EVERY_S: Final = 1.0
_AGES: Final = 2
_LEAST_AGE: Final = 8
_LITTLE: Final = 8  # so much less than what is too much is next to nothing

Block = tuple[int, int]  # index and generation


class Retention:
    """What free blocks may keep, as this process sees to it."""

    def __init__(
        self, ledger: Ledger, holdings: Holdings, membership: Membership, room: Room
    ) -> None:
        self._ledger = ledger
        self._holdings = holdings
        self._membership = membership
        self._room = room
        self._limit_nbytes = _LEAST_NBYTES
        self._look_again_at = 0.0
        self._exchangeable: deque[Watch] = deque()

    def limit_nbytes(self) -> int:
        """Return the limit, bytes; looked up if that is a second ago."""
        now = time.monotonic()
        if now >= self._look_again_at:
            least = min(headroom.limit_nbytes(), headroom.available_on_machine_nbytes())
            self._limit_nbytes = max(_LEAST_NBYTES, least // _SHARE)
            self._look_again_at = now + _LOOK_EVERY_S
        return self._limit_nbytes

    def received(self, watches: Sequence[Watch]) -> None:
        """See to it that what is held does not leave too much behind when it is dropped.

        Parameters
        ----------
        watches : sequence of Watch
            Of the anchors that this process has just got.
        """
        settled = self._ledger.words[H_SETTLED]
        if settled <= _LEAST_NBYTES and not self._exchangeable:
            return
        excess = settled - self.limit_nbytes()
        if excess > 0:
            chosen = self._to_go(excess, watches)
            self._mark(self._let_go(chosen), [])
        else:
            self._exchange(-excess, watches)

    def _is_old(self, watch: Watch) -> bool:
        """Tell whether an anchor has lived for longer than they usually do."""
        holdings = self._holdings
        return holdings.n_watches - watch.number > _AGES * holdings.usual_age + _LEAST_AGE

    def _to_go(self, excess: int, new: Sequence[Watch]) -> list[Watch]:
        """Choose what is going: what is old, then the newest."""
        anchors = list(self._holdings.anchors())
        old = itertools.takewhile(self._is_old, anchors)
        chosen: dict[int, Watch] = {}  # by identity: weak references compare what they refer to
        for watch in itertools.chain(old, reversed(new), reversed(anchors)):
            if excess <= 0:
                break
            if watch.anchored and not watch.going and id(watch) not in chosen:
                chosen[id(watch)] = watch
                excess -= self._nbytes(watch)
        return list(chosen.values())

    def _exchange(self, slack: int, new: Sequence[Watch]) -> None:
        """Let something stay that was going: there is slack for it, or a newer one goes."""
        earlier = self._first_exchangeable()
        if earlier is None or any(watch is earlier for watch in new):
            return
        nbytes, going = self._nbytes(earlier), []
        for watch in new:
            if slack < nbytes and watch.anchored:
                slack += self._nbytes(watch)
                going.append(watch)
        if slack >= nbytes:
            self._exchangeable.popleft()
            if self._mark(self._let_go(going), [earlier.blocks[0]]):
                self._holdings.keep_at_death(earlier)

    def _first_exchangeable(self) -> Watch | None:
        """Return the first of those that became going when they were new, and are young."""
        while self._exchangeable:
            first = self._exchangeable[0]
            is_own = first.epoch == self._holdings.epoch
            if is_own and first.going and first() is not None and not self._is_old(first):
                return first
            self._exchangeable.popleft()
        return None

    def _let_go(self, watches: Sequence[Watch]) -> list[Block]:
        self._first_exchangeable()  # so that they do not pile up
        going = [watch for watch in watches if self._holdings.free_at_death(watch)]
        self._exchangeable.extend(watch for watch in going if not self._is_old(watch))
        return [watch.blocks[0] for watch in going]

    def _nbytes(self, watch: Watch) -> int:
        return self._ledger.resident_nbytes(watch.blocks[0][0])

    def _mark(self, going: list[Block], staying: list[Block]) -> bool:
        if not going and not staying:
            return True
        with ignoring(ArenaFullError, OSError):
            slot = self._membership.slot
            self._membership.run(self._ledger.mark_going, going, staying, slot)
            return True
        return False

    def released(self) -> None:
        """Give back what free blocks have too much, if next to nothing is on its way."""
        words = self._ledger.words
        if words[H_SETTLED] <= _LEAST_NBYTES:
            return
        limit = self.limit_nbytes()
        excess = words[H_SETTLED] - limit
        if excess <= 0:
            return
        nbytes = self._ledger.census().nbytes
        on_its_way = nbytes["leased"] + nbytes["in_flight"]
        if nbytes["free"] and on_its_way * _LITTLE <= excess:
            # What is free is used next; so rather what is held than that.
            self._mark(self._let_go(self._to_go(excess, [])), [])
            if words[H_SETTLED] > limit:
                self._room.punch_idle(words[H_RESIDENT], above=limit)
