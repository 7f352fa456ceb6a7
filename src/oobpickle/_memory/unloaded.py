"""What this process may have taken out of a channel unseen by us, and may load later.

**What.** `Unloaded` is the list in a participant's row of messages in flight that are not to be
reclaimed: all that were sent into one of these channels, or were read by one of these participants.

**How it works.** Whoever asks a connection for its descriptor can read the bytes there himself, as
asyncio does: from then on its channel is in the list. A forked child has its parent's list, and its
parent too, if that had messages which it had read and not loaded. Each entry is one aligned store,
in a place of its own; only this process writes there.

**Lifetime.** That of the row: what a process has read is worth nothing when it has ended.

**When it cannot.** If there is no place left, the row says so: nothing that was sent into any
channel is taken for lost as long as this process lives."""

from __future__ import annotations

import threading
from collections.abc import Collection

from oobpickle._memory.layout import N_KEPT, P_KEEPS_ALL, P_KEEPS_SOME, P_KEPT


class Unloaded:
    """The list of one process; not in the ledger before `show`.

    Parameters
    ----------
    sources : iterable of int
        Channels, and `adopted_by` of participants: inherited by fork.
    is_any : bool
        There were more.
    """

    def __init__(self, sources: Collection[int] = (), *, is_any: bool = False) -> None:
        self._n_asked = dict.fromkeys(sources, 1)
        self._places: dict[int, int] = {}
        self._free = list(range(N_KEPT))
        self._words: memoryview | None = None
        self._row = 0
        self.is_any = is_any
        # Re-entrant: a signal handler may ask for a descriptor while this thread notes one.
        self._lock = threading.RLock()

    def __bool__(self) -> bool:
        return self.is_any or bool(self._n_asked)

    @property
    def sources(self) -> list[int]:
        """What is in the list."""
        return list(self._n_asked)

    def show(self, words: memoryview, row: int) -> None:
        """Write all of it into a new row of this process."""
        with self._lock:
            self._places.clear()
            self._free[:] = range(N_KEPT)
            self._words, self._row = words, row
            if self.is_any:
                self.keep_any()
            for source in self._n_asked:
                if not self._publish(source):
                    self.keep_any()

    def note(self, source: int) -> bool:
        """Add to the list; ``False`` if there is no place left."""
        with self._lock:
            if source not in self._n_asked:
                # In the row first: what comes in between finds too much there, never too little.
                if not self._publish(source):
                    return False
                self._n_asked[source] = 0
            self._n_asked[source] += 1
            return True

    def _publish(self, source: int) -> bool:
        if self._words is None or source in self._places:
            return True
        try:
            place = self._free.pop()
        except IndexError:
            return False
        self._words[self._row + P_KEPT + place] = source
        self._words[self._row + P_KEEPS_SOME] = 1
        self._places[source] = place
        return True

    def keep_any(self) -> None:
        """There is more than can be listed."""
        self.is_any = True
        if self._words is not None:
            self._words[self._row + P_KEEPS_ALL] = 1
            self._words[self._row + P_KEEPS_SOME] = 1

    def passed_on(self, source: int) -> None:
        """Somebody else was given the descriptor: it was not asked for to read there."""
        with self._lock:
            n_asked = self._n_asked.get(source, 0)
            if n_asked > 1:
                self._n_asked[source] = n_asked - 1
            elif n_asked:
                self._remove(source)

    def retain(self, sources: Collection[int]) -> None:
        """Remove all others."""
        with self._lock:
            for source in self._n_asked.keys() - set(sources):
                self._remove(source)

    def _remove(self, source: int) -> None:
        self._n_asked.pop(source, None)
        place = self._places.pop(source, None)
        if place is not None and self._words is not None:
            self._words[self._row + P_KEPT + place] = 0
            self._free.append(place)
