"""The arena: shared memory for the messages of one tree of processes, and what its users call.

**What.** `SharedArena` gives blocks to senders (`acquire`), takes messages in (`receiving`), keeps
memory ready, says what it did, and ends.

**How it works.** Over three nameless files (`files`), and the blocks in them (`oobpickle._core`).
With `spill_dir` there is a fourth, on disk, for blocks for which memory has no room.
Memory that was used is kept for the next message: fresh pages cost ten times more than a copy. A
receiver's block comes back when the last array over it is dropped.

**Lifetime.** Created by `create` (the owner), inherited by `attach` and by fork. `close` ends it:
free blocks go back to the system at once, blocks under living arrays when those die. However
processes die, the kernel frees the files with the last of them; what a dead participant had is
recovered by whoever next needs room.

**When it cannot.** `acquire` raises `ArenaFullError` with a reason of `_fallback.REASONS`; the
caller then sends in-band."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import SupportsIndex

from oobpickle import _faults, _statistics, _system
from oobpickle._errors import ArenaError, ArenaFullError
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._memory import fork_hooks
from oobpickle._memory.files import Files, name_of, open_by_name
from oobpickle._memory.options import Options
from oobpickle._memory.receiving import Receiving
from oobpickle._memory.reclaim import Reclaim, pid_namespace
from oobpickle._memory.sending import Lease, Sending
from oobpickle._memory.unloaded import Unloaded
from oobpickle._native import core
from oobpickle._statistics import Statistics


class SharedArena:
    """Shared memory for the messages between the processes that have joined.

    What a program sees of it is `oobpickle.Arena`.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self.blocks = core.Blocks(*files.descriptors)
        self.identity = files.identity
        self.options = files.options
        self.has_lost_files = False  # what was found when somebody last asked
        self._name, self._named_in = b"", 0  # there is a process id in it
        self._final: Statistics | None = None  # once it has ended here
        self.reclaim = Reclaim(self.blocks)
        self.sending = Sending(self.blocks, self.options, self.reclaim, self.try_join)
        self.receiving = Receiving(self.blocks, self.options, self.try_join)
        self.unloaded = Unloaded(self.blocks)
        self.needs_of: Callable[[object], list[int]] = _cannot_pickle
        fork_hooks.start()

    @classmethod
    def create(cls, options: Options) -> SharedArena:
        """Create an arena, with this process as its first participant.

        Raises
        ------
        ArenaError
            If the system cannot provide it; the text says why.
        OSError
            If nothing can be spilled to the folder that was named.
        """
        if lacking := _system.lacking():
            raise ArenaError(lacking)
        files = arena = None
        try:
            files = Files.create(options.resolve())
            arena = cls(files)
            arena.blocks.entered_limit = None  # nobody replaces the process that made it
            if not arena.try_join():
                raise ArenaError("no descriptor or slot is left; see ulimit -n")
        except BaseException as error:  # one that is kept refers to this frame
            if arena is not None:
                arena.blocks.end()
            if files is not None:
                files.close()
            pass_on_foreign(error)
            if not isinstance(error, OSError) or isinstance(error, ArenaError):
                raise
            if options.spill_dir is not None and error.filename == options.spill_dir:
                raise  # what was said cannot be done
            raise ArenaError(f"the arena cannot be created: {error}") from error
        return arena

    def keep(self) -> None:
        """From now on it ends by `try_destroy`, not when it is dropped."""
        self._files.kept = True

    @classmethod
    def attach(cls, *descriptors: int) -> SharedArena:
        """Join the arena behind inherited descriptors.

        Raises
        ------
        ArenaError
            If they are no files of an arena, or of another version.
        OSError
            If there is no address space for its table.
        """
        arena = cls(Files.inherited(*descriptors))
        _faults.reach("arena.mapped")
        arena.try_join()
        return arena

    @classmethod
    def find(cls, name: bytes) -> SharedArena:
        """Join the arena with the given `name`, through the process that sent it.

        Raises
        ------
        OSError, ArenaError
            If that process is gone, is another user's, or has not got this arena.
        """
        fds = open_by_name(name)
        try:
            return cls.attach(*fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def try_join(self) -> bool:
        """Become a participant, if possible; in a forked child one of its own."""
        if self.blocks.join(pid_namespace()) == 0:
            return True
        if self.unloaded:
            self.blocks.say_that_it_reads()  # it cannot say so in a row
        return False

    @property
    def name(self) -> bytes:
        """`NAME_NBYTES` bytes: the identity, and where this process has the files."""
        epoch = core.epoch()
        if self._named_in != epoch or not epoch:  # 0: forks here are known to nobody
            self._name = name_of(self.identity, self._files.descriptors)
            self._named_in = epoch
        return self._name

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a child must inherit to attach: data, table, locks, and the data on disk."""
        return self._files.descriptors

    def can_be_inherited(self) -> bool:
        """Tell whether the `descriptors` are still those of the arena.

        If somebody has closed one, this process sends nothing through the arena any more: what it
        starts from now on cannot join.
        """
        self.has_lost_files = self.has_lost_files or not self._files.are_ours()
        return not self.has_lost_files

    @property
    def closed(self) -> bool:
        """Whether the owner has closed it: nothing new is sent through it."""
        closed: bool = self.blocks.closed
        return closed

    # --- sending

    def acquire(self, needs: Sequence[int], wait_timeout: float | None = None) -> Lease:
        """Lease blocks with pages, all or none.

        Parameters
        ----------
        needs : sequence of int
            Bytes of each block, >= 0.
        wait_timeout : float, optional
            How long to wait for room that others hold, seconds. Default: the arena's option, else
            as long as a pipe would take for as many bytes; not at all while a message that was
            not larger has waited in vain, and none as large has found room since.

        Raises
        ------
        ArenaFullError
            If there is no room, memory or lock; nothing stays leased. Its ``reason`` says which.
        """
        self.check_open()
        return self.sending.lease(needs, wait_timeout)

    def check_open(self) -> None:
        """Raise `ArenaFullError` if nothing is sent through it any more."""
        if self.blocks.closed:
            raise ArenaFullError("the arena is closed", "detached")
        if self.has_lost_files:
            raise ArenaFullError(
                f"descriptors of the arena were closed in process {os.getpid()}. Do not close "
                "descriptors that you did not open (os.closerange).",
                "detached",
            )

    # --- counting

    def statistics(self) -> Statistics:
        """Return the sums over all participants, living and dead."""
        blocks = self.blocks
        try:
            counters, census = blocks.counters(), blocks.census()
            n_participants = len(blocks.participants())
            resident, on_disk = blocks.resident, blocks.on_disk
        except ValueError:  # it has ended in this process, perhaps a moment ago
            if self._final is None:
                raise
            return self._final
        n_blocks, nbytes, n_quarantined = census
        in_file = self._files.resident_nbytes()
        return _statistics.summed(
            counters,
            n_participants=n_participants,
            n_blocks=dict(zip(_statistics.STATES, n_blocks, strict=False)),
            nbytes=dict(zip(_statistics.STATES, nbytes, strict=False)),
            n_published=n_blocks[4],
            nbytes_published=nbytes[4],
            n_references=n_blocks[5],
            repeated=blocks.repeated(),
            nbytes_resident=resident if in_file is None else in_file,
            nbytes_on_disk=on_disk,
            nbytes_huge=self._files.huge_nbytes(),
            capacity=self.options.capacity or 0,
            n_quarantined=n_quarantined,
        )

    # --- before the first message, and after the last

    def preallocate(
        self, like: object = None, *, nbytes: int | None = None, count: int = 1
    ) -> None:
        """Have memory ready for messages before the first of them comes; see `oobpickle.Arena`."""
        check_preparation(like, nbytes, count)
        needs = self.needs_of(like) if nbytes is None else [operator.index(nbytes)]
        leases = []  # all at the same time, so that each has memory of its own
        for _ in range(count):
            self.check_open()
            leases.append(self.sending.lease(needs, 0, may_spill=False))
            self.blocks.prepare(leases[-1].blocks)
            _faults.reach("arena.preallocated")

    # --- ending

    def trim(self) -> None:
        """Give the pages of all free blocks back to the system."""
        if self.blocks.ended:
            return
        self.reclaim.look()
        self.reclaim.punch_idle()
        self.reclaim.punch_uncounted()
        self.blocks.unmap()

    def close(self) -> None:
        """End the arena: nothing new is sent; free memory is back with the system on return.

        Received arrays stay valid, and messages on their way can still be loaded. `detach` comes
        next, then `try_destroy`.
        """
        with ignoring(OSError):
            self.reclaim.look()  # before it is closed: after that nobody says when he reads
        self.blocks.close()
        self.reclaim.punch_idle()
        self.reclaim.punch_uncounted()

    def detach(self) -> None:
        """Count all messages of this process as sent: nobody will say so any more."""
        self.blocks.depart_all()

    def try_destroy(self, *, most_nbytes: int = 0) -> bool:
        """Unmap and close everything if this process needs it no more; the statistics stay.

        That is when it is closed, this process has no array of it, and no message is on its way:
        nothing new is sent, since a lease is refused from then on, under the lock. Up to
        `most_nbytes` of arrays become ordinary private memory first, at the same address.
        """
        blocks = self.blocks
        if not blocks.ended:
            if not blocks.closed:
                return False
            with ignoring(OSError):
                self.reclaim.look()
                self.reclaim.punch_idle()
            # With the lock once since it was closed: who leased before that is seen.
            is_certain = blocks.reap() >= 0
            (_, n_leased, n_in_flight, *_), _, _ = blocks.census()
            is_needed = n_leased or n_in_flight or not blocks.part(most_nbytes)
            if not is_certain or is_needed:
                blocks.unmap()
                return False
            self._final = self.statistics()
            if not blocks.end():
                return False
        self._files.close()
        return True


def _cannot_pickle(_obj: object) -> list[int]:
    raise ArenaError("this arena is not in use by any channel")  # `_envelope` knows how to


def check_preparation(like: object, nbytes: int | None, count: int) -> None:
    """Raise `TypeError` or `ValueError` for what `Arena.preallocate` cannot take."""
    if (like is None) == (nbytes is None):
        raise TypeError(
            "preallocate() takes a message like those to come, or nbytes=, and not both"
        )
    for name, value, least in (("nbytes", nbytes, 1), ("count", count, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
