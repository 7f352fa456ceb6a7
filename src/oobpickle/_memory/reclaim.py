"""Reclaiming: memory of an arena that nobody needs any more.

**What.** `Reclaim` frees what dead participants had and messages that nobody can read, gives pages
of free blocks back to the system, and says which participants live.

**How it works.** The table tells whose a message in flight is (`oobpickle._core`); whether it can
still be read in its channel, the system is asked (`pipes`). Who has read a message through a
connection owns it: it is lost if he is dead. Else it is lost if its sender is dead or done, nothing
is unread in its channel, no participant is in the middle of reading, and none that lives may have
read there without our seeing it.

**Lifetime.** When a look was in vain is remembered.

**When it cannot.** Without the lock nothing is freed; memory is kept, and never freed wrongly."""

from __future__ import annotations

import os
import time
from typing import Final

from oobpickle._foreign import pass_on_foreign
from oobpickle._memory.pipes import unreadable
from oobpickle._native import core

FOLLOWS: Final = 1 << 62
ADOPTED: Final = 1 << 61
#: Beside a channel that was not made by `multiprocessing.Pipe`: its readers may be no connections.
UNPROVEN: Final = 1 << 60
_LOOK_EVERY_S: Final = 0.1
_PAUSE_LOOKS: Final = 4  # a look in vain is not repeated for so many times what it took
_FRESH_NBYTES_PER_S: Final = 1e9  # how fast the system makes fresh pages, at best
_AT_ONCE_NBYTES: Final = 256 << 20
_EVERYTHING: Final = 1 << 62


class Reclaim:
    """What nobody needs of one arena.

    Parameters
    ----------
    blocks : Blocks
        The arena, as this process has it.
    """

    def __init__(self, blocks: core.Blocks) -> None:
        self._blocks = blocks
        self._look_again_at = 0.0
        self._look_s = 0.0
        self._fresh_nbytes = 0

    def make_room(self, reason: str, need: int, *, again: bool) -> bool:
        """Free what nobody needs; tell whether it is worth trying again.

        Parameters
        ----------
        reason : str
            Of the shortage.
        need : int
            What was wanted, bytes.
        again : bool
            Whether the caller has been waiting already: then nobody looks at /proc each time.
        """
        n_freed = self.look_for_lost() if again else self.look()
        return n_freed > 0 or (reason == "full" and self.punch_idle(need))

    def look(self) -> int:
        """Free what the dead have left; return how many there were."""
        n_freed = self.reap() + self.reclaim()
        if self._blocks.has_disk:
            self.punch_idle(0)  # what the dead had there
        return n_freed

    def reap(self) -> int:
        """Recover what dead participants had; return how many there were."""
        return max(0, int(self._blocks.reap()))

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
        n_freed = self.look()
        now = time.monotonic()
        self._look_s = now - start
        # With many messages in flight a look takes longer than the time between two.
        again_at = max(self._look_again_at, now + _PAUSE_LOOKS * self._look_s)
        self._look_again_at = now if n_freed else again_at
        return n_freed

    def reclaim(self) -> int:
        """Free messages in flight that nobody can ever load; return how many blocks."""
        blocks = self._blocks
        sent = blocks.unowned()
        channels = {channel for _, _, channel in sent if not channel & (FOLLOWS | ADOPTED)}
        if channels and not self.sees_all():
            channels.clear()  # others may have them open
        lost = self._unreadable(channels) if channels else set()
        heads = [
            (index, word, channel)
            for index, word, channel in sent
            if channel & (FOLLOWS | ADOPTED) == ADOPTED or channel & ~UNPROVEN in lost
        ]
        if not heads and not blocks.has_abandoned():
            return 0
        return max(0, int(blocks.free_lost(heads)))

    def _unreadable(self, channels: set[int]) -> set[int]:
        # When it is closed, what was read is not noted any more: an empty channel means nothing.
        return unreadable(
            {channel & ~UNPROVEN for channel in channels},
            [pid for _, pid, _ in self._blocks.participants()],
            even_if_empty=not self._blocks.closed,
            unproven={channel & ~UNPROVEN for channel in channels if channel & UNPROVEN},
        )

    # --- pages

    def punch_idle(self, nbytes: int = _EVERYTHING) -> bool:
        """Give pages of free blocks back to the system; tell whether there were any.

        So many bytes of those in memory, and all that are on disk.
        """
        n_taken = 0
        while nbytes >= 0:
            taken = self._blocks.take_idle(min(nbytes, _AT_ONCE_NBYTES))
            if not taken:
                break
            n_taken += len(taken)
            try:
                for block in taken:
                    nbytes -= 0 if block.is_on_disk else block.nbytes_resident
                    block.empty()
            finally:
                self._blocks.release(taken)  # else a stored traceback would keep them
        return n_taken > 0

    def punch_uncounted(self) -> None:
        """Give back pages that no block has counted, if nothing is in use and none is counted."""
        self._blocks.punch_uncounted()

    # --- the others

    def living(self) -> set[int]:
        """Return the pids of all participants, this process among them, by the proof of life.

        Those of other pid namespaces are left out.
        """
        blocks, namespace = self._blocks, pid_namespace()
        if namespace == 0 or not blocks.joined:
            return set()
        own = blocks.slot
        return {os.getpid()} | {
            pid
            for slot, pid, its in blocks.participants()
            if its == namespace and slot != own and blocks.is_alive(slot)
        }

    def sees_all(self) -> bool:
        """Tell whether /proc shows this process all that have joined.

        Not if it is in another pid namespace than one of them, or /proc is hidden from it.
        """
        blocks, namespace = self._blocks, pid_namespace()
        if not blocks.joined:
            return False
        for slot, pid, its in blocks.participants():
            is_ours = namespace != 0 and its == namespace
            if not (is_ours and os.path.exists(f"/proc/{pid}")) and (
                slot == blocks.slot or blocks.is_alive(slot)
            ):
                return False
        return True


def pid_namespace() -> int:
    """Return what tells this process's pid namespace from others; 0 if /proc is not of it."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return 0
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        pass_on_foreign(error)
        return 0
