"""Receiving: how messages come into a process, out of their channels and out of the arena.

**What.** `Receiving.receive` takes a message out of its channel, `claim` takes over its blocks, and
`send_on` notes that it is sent on unloaded.

**How it works.** A block that was claimed is an object that exports its memory: what is built on it
keeps it, and when that is dropped it is released (`oobpickle._core.Block`). A block that is not to
stay, or cannot be mapped, is copied to ordinary memory and given back at once. While a message has
left its channel and nobody owns it, this process says that it reads (`Blocks.reading`); then it
notes who has read it (`Blocks.adopt`).

Which part of a block is which buffer says ``_core/plan.c``, for `_envelope`; arrays are built on
them by ``pickle.loads``.

**Lifetime.** One for each `Arena` of this process.

**When it cannot.** `StaleEnvelopeError` for a message that was loaded already. A process that has
not joined copies a message out of the arena. No load waits for the lock."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable
from typing import Any, Final

from oobpickle import _faults, _statistics
from oobpickle._copying import copy_bytes
from oobpickle._errors import EnvelopeError, StaleEnvelopeError
from oobpickle._foreign import pass_on_foreign
from oobpickle._memory import headroom
from oobpickle._memory.options import Options
from oobpickle._native import core

_LEAST_KEPT_NBYTES: Final = 64 << 20
_KEPT_OF_AVAILABLE: Final = 4
_KEPT_OF_LIMIT: Final = 8  # a cgroup at its limit kills, and does not ask others to make room
_LOOK_EVERY_S: Final = 1.0

Block = tuple[int, int]  # index and generation


class Receiving:
    """The receiving side of an arena."""

    def __init__(self, blocks: core.Blocks, options: Options, join: Callable[[], bool]) -> None:
        self._blocks = blocks
        self._options = options
        self._capacity = options.capacity or 0
        self._join = join
        self._most_held = _max_map_count() // 4
        self._look_again_at = 0.0

    def claim(
        self, pairs: bytes, needs: list[int], sizes: bytes = b"", *, is_index: bool = False
    ) -> list[memoryview]:
        """Take over the blocks of one message.

        Parameters
        ----------
        pairs : bytes
            Index and generation of each block, from the envelope; 64-bit words.
        needs : list of int
            Bytes used of each.
        sizes : bytes
            Those of the buffers, with the parts of published blocks that references are for.
        is_index : bool
            Whether this block only tells where the others are, which are claimed next.

        Returns
        -------
        list of memoryview
            Writable bytes of each block: the block itself, released when the last view of it is
            collected, or a private copy; of what a reference names, a copy of its part.

        Raises
        ------
        StaleEnvelopeError
            If a block is not in flight with that generation: loaded already, or taken back.
        EnvelopeError
            If the table's entry of a block is damaged, or this process cannot read it.
        """
        blocks = self._blocks
        if not blocks.joined:
            self._join()
        # Until the others are claimed the index has to be held: they are lost with it.
        copies = not is_index and self._copies_out(sum(needs), len(needs))
        try:
            claimed = blocks.claim(pairs, needs, is_index, sizes)
        except (OSError, ValueError) as error:
            pass_on_foreign(error)
            raise EnvelopeError(f"the arena cannot be read in this process: {error}") from error
        if isinstance(claimed, int):
            raise self._refusal(*struct.unpack_from("<2Q", pairs, 16 * claimed))
        self.keep_within_limit()
        views = []
        for block, nbytes in zip(claimed, needs, strict=True):
            if block.is_copy or (copies and nbytes):  # a reference has no bytes of its own
                views.append(memoryview(block) if block.is_copy else _copy_of(block, nbytes))
                if not is_index:
                    blocks.count(
                        *(_statistics.N_COPIED_ON_RECEIVE, 1),
                        *(_statistics.NBYTES_COPIED_ON_RECEIVE, views[-1].nbytes),
                    )
            else:
                views.append(memoryview(block))
        return views

    def within_limit(self, parts: list[Any]) -> list[Any]:
        """Copy the parts of a message that references brought, if there are too many mappings.

        Each reference has one of its own, and a process that has all that it may can do nothing.
        """
        if self._blocks.n_held <= self._most_held:
            return parts
        return [_copy_of(part, part.nbytes) if _is_view(part) else part for part in parts]

    def _copies_out(self, nbytes: int, n_blocks: int) -> bool:
        blocks = self._blocks
        if blocks.n_held + n_blocks > self._most_held:
            return True  # whatever the option says: a fork could not make more of them private
        if self._options.copy_on_receive is not None:
            return self._options.copy_on_receive
        if self._blocks.has_disk:  # what is held need not stay in memory; a copy would have to
            return False
        capacity = self._capacity
        held_nbytes: int = blocks.held + nbytes
        if held_nbytes <= capacity // 2:
            return False
        # What is so large is in use for a moment only, or there is no room for more of it anyway;
        # and a copy would need as much again, just when memory is scarce.
        return not (nbytes > capacity // 4 and held_nbytes <= capacity)

    def keep_within_limit(self) -> None:
        """Bound what free blocks may keep.

        A quarter of what the machine has available without the arena, half of what it has now, or
        an eighth of the lowest limit of a memory cgroup above this process, whichever is least; but
        64 MiB at least. What is released when there is more gives its pages back to the system.
        """
        resident = self._blocks.resident
        if resident > _LEAST_KEPT_NBYTES:
            now = time.monotonic()
            if now >= self._look_again_at:
                self._look_again_at = now + _LOOK_EVERY_S
                available = headroom.available_on_machine_nbytes()
                most = [limit // _KEPT_OF_LIMIT for limit, *_ in headroom.limits()]
                # What has pages now is available once it is given back; but not all of it may be,
                # and what is left now is not to become less.
                most += (available + resident) // _KEPT_OF_AVAILABLE, available // 2
                self._blocks.keep_nbytes = max(_LEAST_KEPT_NBYTES, min(most))

    def receive(self, call: Callable[..., tuple[Any, Block | None]], *args: Any) -> Any:
        """Take a message out of its channel, and keep its blocks from being reclaimed.

        Parameters
        ----------
        call : callable
            Reads; it returns the message, and the message's first block if that is an envelope.
        *args : object
            Its arguments.
        """
        blocks, block = self._blocks, None
        if not blocks.joined:
            self._join()
        reading = blocks.reading()
        try:
            message, block = call(*args)
            _faults.reach("receiving.read")
            if block is not None:
                blocks.adopt(*block)
                _faults.reach("receiving.adopted")
            return message
        except BaseException:
            if block is not None:
                blocks.discard(*block)
            raise
        finally:
            del reading

    def discard(self, index: int, generation: int) -> None:
        """Give back a message that was read and will never be loaded."""
        self._blocks.discard(index, generation)

    def send_on(
        self, index: int, generation: int, channel: int, write: Callable[..., object], *args: Any
    ) -> None:
        """Let a message that this process has read be sent on, unloaded, into another channel.

        Parameters
        ----------
        index, generation : int
            Its first block.
        channel : int
            Where `write` puts it.
        write : callable
            What writes it there.
        *args : object
            Its arguments.
        """
        blocks = self._blocks
        sending = blocks.send_on(index, generation, channel)
        try:
            _faults.reach("receiving.sent_on")
            write(*args)
        except OSError as error:
            if error.errno == errno.EPIPE and sending:
                blocks.adopt(index, generation)  # nobody can read it there: it is ours as before
            raise
        finally:
            blocks.settle(sending)

    def _refusal(self, index: int, generation: int) -> EnvelopeError:
        if self._blocks.is_damaged(index):
            return EnvelopeError(
                f"the table's entry of block {index} is damaged: some process of the arena "
                "has written where it should not. The block is not used any more; the message "
                "is lost. See Statistics.n_quarantined."
            )
        return StaleEnvelopeError(
            f"block {index} is not in flight with generation {generation}: this message was loaded "
            "already, or its sender took it back. Load each message once; keep the object instead."
        )


def _is_view(part: Any) -> bool:
    block = getattr(part, "obj", None)
    return isinstance(block, core.Block) and block.is_reference and not block.is_copy


def _copy_of(block: Any, nbytes: int) -> memoryview:
    import numpy as np

    copy = np.empty(nbytes, np.uint8)
    copy_bytes(memoryview(copy), memoryview(block))
    return memoryview(copy)


def _max_map_count() -> int:
    try:
        with open("/proc/sys/vm/max_map_count") as file:
            return int(file.read())
    except (OSError, ValueError) as error:
        pass_on_foreign(error)
        return 65530
