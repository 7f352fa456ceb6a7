"""The backlog: how much of what this process has sent is still unread in each channel.

**What.** `Backlog` notes each message that leaves through the arena, and makes a sender over its
budget wait.

**How it works.** A tiny envelope takes away the back-pressure of a full pipe. So a sender over its
budget waits as long as too much of its own is unread, where a plain pipe would have made it wait
for the same. A message counts while it is in flight and nobody is known to have read it; and only
if it can still be in the channel: what is unread there, by the kernel's count of bytes, was sent
last, so what was sent before it has been taken out, by whomever. That bounds the list by what a
pipe holds, and each message costs the same, whatever becomes of those before it.

**Lifetime.** A forked child begins anew.

**When it cannot.** If the channel cannot be asked, nobody waits: the write itself will say so."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from oobpickle._foreign import pass_on_foreign
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.pipes import is_broken, n_unread
from oobpickle._native import core

_FEW_CHANNELS: Final = 64
_FEW_MESSAGES: Final = 16
_LEAST_BUDGET_NBYTES: Final = 1 << 20  # what a pipe or socket can be made to hold by itself
_FIRST_PAUSE_S: Final = 0.1e-3
_LAST_PAUSE_S: Final = 5e-3


class Sent(NamedTuple):
    """A message: its first block, its nbytes in all, and those of its envelope in the channel."""

    block: tuple[int, int]
    nbytes: int
    n_in_channel: int


class Backlog:
    """What this process has in flight, by channel."""

    def __init__(self, arena: SharedArena) -> None:
        self._arena = arena
        self._epoch = core.epoch()
        # Other threads send through the same channel at the same time: what is a list here is
        # replaced, or changed by one call. At worst an entry is lost, and not waited for.
        self._sent: dict[int, list[Sent]] = {}
        self._prune_at: dict[int, int] = {}
        self._most_channels = _FEW_CHANNELS

    def __len__(self) -> int:
        return len(self._sent)

    def note(self, channel: int, block: tuple[int, int], nbytes: int, n_in_channel: int) -> None:
        """Note a message that is on its way."""
        messages = self._sent.setdefault(channel, [])
        messages.append(Sent(block, nbytes, n_in_channel))
        if len(self._sent) > self._most_channels:
            for other in list(self._sent):
                if not any(self._is_unread(sent) for sent in self._sent.get(other, ())):
                    self._sent.pop(other, None)
                    self._prune_at.pop(other, None)
            self._most_channels = max(_FEW_CHANNELS, 2 * len(self._sent))

    def wait(self, fd: int, channel: int, nbytes: int) -> None:
        """Wait while too much is unread in the channel for a message of so many bytes more."""
        if self._epoch != core.epoch():  # inherited by fork: the parent's messages
            self._epoch = core.epoch()
            self._sent, self._prune_at = {}, {}
        budget = max(2 * nbytes, (self._arena.options.capacity or 0) // 8, _LEAST_BUDGET_NBYTES)
        pause_s = _FIRST_PAUSE_S
        try:
            if self._at_most(fd, channel) + nbytes <= budget:
                return
            while self._unread_nbytes(fd, channel) + nbytes > budget and not self._arena.closed:
                if is_broken(fd, channel):
                    return
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        except OSError as error:
            pass_on_foreign(error)  # closed meanwhile

    def _is_unread(self, sent: Sent) -> bool:
        return self._arena.blocks.is_unread(*sent.block)

    def _at_most(self, fd: int, channel: int) -> int:
        """Return a number of bytes that is not less than what is unread."""
        messages = self._sent.get(channel)
        if not messages:
            return 0
        n_done = 0
        is_unread = self._arena.blocks.is_unread
        while n_done < len(messages) and not is_unread(*messages[n_done].block):
            n_done += 1
        if n_done:
            del messages[:n_done]
        if len(messages) > self._prune_at.get(channel, _FEW_MESSAGES):
            return self._unread_nbytes(fd, channel)
        return sum([sent.nbytes for sent in messages])

    def _unread_nbytes(self, fd: int, channel: int) -> int:
        """Look at all messages, and forget those that have left the channel."""
        left = n_unread(fd, channel)
        unread: list[Sent] = []
        for sent in reversed(self._sent.get(channel, ())):
            if left <= 0:
                break
            left -= sent.n_in_channel
            unread.append(sent)
        unread = [sent for sent in reversed(unread) if self._is_unread(sent)]
        self._sent[channel] = unread
        self._prune_at[channel] = _FEW_MESSAGES + 2 * len(unread)
        return sum(sent.nbytes for sent in unread)
