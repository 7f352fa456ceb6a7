"""What this process may have taken out of a channel unseen by us, and may load later.

**What.** `Unloaded` lists the channels that this process may read by itself. Messages in flight in
them are not reclaimed while it lives.

**How it works.** Whoever asks a connection for its descriptor can read the bytes there himself, as
asyncio does: from then on its channel is in the row. A forked child has its parent's list, and its
parent too, if that had messages which it had read and not loaded.

**Lifetime.** That of the row: what a process has read is worth nothing when it has ended.

**When it cannot.** If there is no place left, the row says so: nothing that was sent into any
channel is taken for lost as long as this process lives."""

from __future__ import annotations

import threading

from oobpickle._foreign import pass_on_foreign
from oobpickle._memory.pipes import open_channels
from oobpickle._native import core


class Unloaded:
    """The list of one process.

    Parameters
    ----------
    blocks : Blocks
        Has the row.
    """

    def __init__(self, blocks: core.Blocks) -> None:
        self._blocks = blocks
        self._n_asked: dict[int, int] = {}
        # Re-entrant: a signal handler may ask for a descriptor while this thread notes one.
        self._lock = threading.RLock()

    def __bool__(self) -> bool:
        return bool(self._n_asked)

    def note(self, channel: int) -> None:
        """Somebody in this process can read there himself, without a connection."""
        if self._note(channel):
            return
        try:
            needed = [*open_channels(), *self._blocks.sources()]
        except OSError as error:
            pass_on_foreign(error)
        else:
            with self._lock:
                self._blocks.retain(needed)
                self._n_asked = {key: n for key, n in self._n_asked.items() if key in {*needed}}
        if not self._note(channel):
            self._blocks.keep_all()

    def _note(self, channel: int) -> bool:
        with self._lock:
            # In the row first: what comes in between finds too much there, never too little.
            if not self._blocks.keep(channel):
                return False
            self._n_asked[channel] = self._n_asked.get(channel, 0) + 1
            return True

    def passed_on(self, channel: int) -> None:
        """Somebody else was given the descriptor: it was not asked for to read there."""
        with self._lock:
            n_asked = self._n_asked.get(channel, 0)
            if n_asked > 1:
                self._n_asked[channel] = n_asked - 1
            elif n_asked:
                self._blocks.forget(channel)
                self._n_asked.pop(channel, None)
