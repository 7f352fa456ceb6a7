"""The intake: how messages come into a process, out of their channels and out of the arena.

**What.** `Intake.receive` takes a message out of its channel, `claim` takes over its blocks, and
`send_on` notes that it is sent on unloaded, and `note_reader` that somebody reads by himself.

**How it works.** Each future owner of a block (an array over it, the *anchor*) is made and watched
first, and the block is written into its watch by the step that claims it: so no interrupt can lose
one. A block that is not to stay, or cannot be seen through the mapping, is copied to ordinary
memory and given back at once.

**Lifetime.** One for each `Arena` of this process; no state but a limit.

**When it cannot.** `StaleEnvelopeError` for a message that was loaded already. Without the
ledger's lock a message is copied out unclaimed: a load never waits, and never fails for it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Protocol

from oobpickle import _faults, _statistics
from oobpickle._errors import ArenaFullError, EnvelopeError, StaleEnvelopeError
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._memory.holdings import Holdings
from oobpickle._memory.layout import H_HELD
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.membership import Membership
from oobpickle._memory.options import Options
from oobpickle._memory.pipes import open_channels
from oobpickle._memory.retention import Retention
from oobpickle._memory.room import Room
from oobpickle._memory.segment import Segment
from oobpickle._memory.watch import Keeper, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


Block = tuple[int, int]  # index and generation


class Receiver(Protocol):
    """Whose messages come in."""

    data: Segment
    ledger: Ledger
    holdings: Holdings
    membership: Membership
    room: Room
    retention: Retention
    options: Options

    @property
    def closed(self) -> bool:
        """Whether the owner has closed it."""

    def give_back(self, blocks: Sequence[Block]) -> None:
        """Nobody needs the blocks any more."""


class Intake:
    """The receiving side of an arena."""

    def __init__(self, arena: Receiver) -> None:
        self._arena = arena
        self._data = arena.data
        self._ledger = arena.ledger
        self._holdings = arena.holdings
        self._membership = arena.membership
        self._most_held = _max_map_count() // 4

    def claim(
        self, blocks: Sequence[Block], needs: Sequence[int], *, is_index: bool = False
    ) -> list[memoryview]:
        """Take over the blocks of one message.

        Parameters
        ----------
        blocks : sequence of (int, int)
            ``(index, generation)`` of each block, from the envelope.
        needs : sequence of int
            Bytes used of each.
        is_index : bool
            Whether further blocks of the same message are claimed before this one is dropped.

        Returns
        -------
        list of memoryview
            Writable bytes of each block: the block itself, released when the last view of it is
            collected, or a private copy.

        Raises
        ------
        StaleEnvelopeError
            If a block is not in flight with that generation: loaded already, or taken back.
        EnvelopeError
            If the ledger's entry of a block is damaged.
        """
        ledger, holdings = self._ledger, self._holdings
        for (index, generation), nbytes in zip(blocks, needs, strict=True):
            if not ledger.fits(index, nbytes):  # the rest is looked at by the step
                raise self._refusal(index, generation)
        holdings.collect()
        copying = self._copies_out(sum(needs), len(needs))
        # Each with a watch, but no block yet: an interrupt anywhere from here on loses none.
        anchors: list[object] = [
            Keeper() if copying else self._data.array(ledger.rows.offset(index), nbytes)
            for (index, _), nbytes in zip(blocks, needs, strict=True)
        ]
        watches = [holdings.watch(anchor, []) for anchor in anchors]
        try:
            position, unmapped = self._membership.run(self._claim, blocks, needs, watches, copying)
        except (ArenaFullError, OSError) as error:  # no lock, or somebody closed its descriptor
            pass_on_foreign(error)
            position, unmapped = -1, frozenset()
        if position is not None:
            for watch in watches:
                holdings.unwatch(watch)
            if position < 0:
                return self._copy_unclaimed(blocks, needs, is_index=is_index)
            raise self._refusal(*blocks[position])
        views = []
        for block, nbytes, anchor, watch in zip(blocks, needs, anchors, watches, strict=True):
            if copying or block[0] in unmapped:
                in_file = block[0] in unmapped
                views.append(self._copy_claimed(block, nbytes, in_file, keep=is_index))
                holdings.unwatch(watch)
                _faults.reach("intake.copied")
            else:
                self._arena.room.enter(block[0], nbytes)
                views.append(memoryview(anchor))  # type: ignore[arg-type]
        self._arena.room.leave_others(sum(needs))
        if self._arena.closed:
            holdings.free_pages_at_death()
        elif not copying:
            self._arena.retention.received(watches)
        return views

    def _claim(
        self,
        blocks: Sequence[Block],
        needs: Sequence[int],
        watches: Sequence[Watch],
        copying: bool,
    ) -> tuple[int | None, frozenset[int]]:
        """Step: give back what died, then take over.

        Returns the position of a stale block, and the indices whose ranges were private before, so
        that the mapping does not show the message. Looked up here, where no thread can be forking:
        a fork later privatizes these blocks *with* their content.
        """
        slot = self._membership.slot
        self._holdings.release_pending(slot)
        position = self._ledger.claim(blocks, needs, slot)
        if position is not None:
            return position, frozenset()
        private = self._holdings.private
        for index, _ in blocks[:1]:
            self._holdings.adopted.pop(index, None)
        unmapped = frozenset(index for index, _ in blocks if index in private)
        for block, nbytes, watch in zip(blocks, needs, watches, strict=True):
            index, generation = block
            watch.anchored = not copying and index not in unmapped
            watch.blocks.append(block)
            if index not in unmapped:
                self._holdings.held[index] = (generation, nbytes)
            else:
                self._holdings.leased[index] = generation  # to be copied and given back at once
        return None, unmapped

    def _copies_out(self, nbytes: int, n_blocks: int) -> bool:
        if not self._data.mapped:
            return True
        if len(self._holdings.held) + n_blocks > self._most_held:
            return True  # whatever the option says: a fork could not make more of them private
        if self._arena.options.copy_on_receive is not None:
            return self._arena.options.copy_on_receive
        words = self._ledger.words
        capacity, held_nbytes = self._ledger.capacity, words[H_HELD] + nbytes
        # What is so large is in use for a moment only, or there is no room for more of it anyway;
        # and a copy would need as much again, just when memory is scarce.
        is_huge = nbytes > capacity // 4 and held_nbytes <= capacity
        return held_nbytes > capacity // 2 and not is_huge

    def _copy_claimed(self, block: Block, nbytes: int, in_file: bool, *, keep: bool) -> memoryview:
        index = block[0]
        copy = self._copy_of(index, nbytes, in_file=in_file)
        if keep:
            self._holdings.watch(copy.obj, [block])
            return copy
        self._arena.give_back([block])
        if not in_file:
            self._holdings.share_unanchored(index)
        self._membership.count(
            (_statistics.N_COPIED_ON_RECEIVE, 1), (_statistics.NBYTES_COPIED_ON_RECEIVE, nbytes)
        )
        return copy

    def _copy_unclaimed(
        self, blocks: Sequence[Block], needs: Sequence[int], *, is_index: bool
    ) -> list[memoryview]:
        token = object()
        try:
            self._holdings.unclaimed_readers.add(token)
            return self._copy_without_lock(blocks, needs, is_index=is_index)
        finally:
            self._holdings.unclaimed_readers.discard(token)

    def _copy_without_lock(
        self, blocks: Sequence[Block], needs: Sequence[int], *, is_index: bool
    ) -> list[memoryview]:
        # Nobody may change a block in flight, so look, copy, and look again.
        words = [self._ledger.word[index] for index, _ in blocks]
        copies: list[memoryview] = []
        for (index, generation), nbytes, word in zip(blocks, needs, words, strict=True):
            copy = self._copy_of(index, nbytes, in_file=index in self._holdings.private)
            unchanged = self._ledger.word[index] == word
            if not unchanged or not self._ledger.is_of(index, generation, nbytes):
                raise self._refusal(index, generation)
            copies.append(copy)
        for copy, block, word in zip(copies, blocks, words, strict=True):
            self._holdings.consume(*block, word, when_dead=copy.obj if is_index else None)
        return copies

    def _copy_of(self, index: int, nbytes: int, *, in_file: bool) -> memoryview:
        import numpy as np

        offset = self._ledger.rows.offset(index)
        copy = np.empty(nbytes, np.uint8)
        if self._data.mapped and not in_file:
            self._arena.room.enter(index, nbytes)
            np.copyto(copy, self._data.array(offset, nbytes))
        else:
            self._data.read_into(offset, memoryview(copy))
        return memoryview(copy)

    def receive(self, call: Callable[..., tuple[Any, tuple[int, int] | None]], *args: Any) -> Any:
        """Take a message out of its channel, and keep its blocks from being reclaimed.

        Parameters
        ----------
        call : callable
            Reads; it returns the message, and the message's first block if that is an envelope.
        *args : object
            Its arguments.
        """
        own, token = self._membership.reader(), object()
        if own is None:
            return call(*args)[0]
        done = own.readings.discard
        block = None
        try:
            own.readings.add(token)
            own.publish_readings()
            message, block = call(*args)
            _faults.reach("intake.read")
            if block is not None:
                self._adopt(*block)
                _faults.reach("intake.adopted")
            return message
        except BaseException:
            if block is not None:
                self.discard(*block)
            raise
        finally:
            done(token)  # a C call, so no interrupt comes before it
            own.publish_readings()

    def _adopt(self, index: int, generation: int) -> None:
        if self._membership.joined and self._ledger.is_in_flight(index, generation):
            self._holdings.adopted[index] = generation
            self._ledger.adopt(index, generation, self._membership.incarnation)

    def discard(self, index: int, generation: int) -> None:
        """Give back a message that was read and will never be loaded."""
        if self._holdings.adopted.pop(index, None) == generation:
            word = self._ledger.word[index]
            if self._ledger.is_in_flight(index, generation):
                self._holdings.consume(index, generation, word, when_dead=None)

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
        if not self._ledger.is_in_flight(index, generation):
            write(*args)
            return
        try:
            # It is in no channel yet, and must not be taken for lost.
            self._holdings.leased[index] = generation
            self._readdress(index, generation, channel)
            _faults.reach("intake.readdressed")
            write(*args)
            self._holdings.adopted.pop(index, None)
        except OSError as error:
            if error.errno == errno.EPIPE:
                self._adopt(index, generation)  # nobody can read it there: it is ours as before
            raise
        finally:
            self._holdings.forget_lease(index, generation)

    def _readdress(self, index: int, generation: int, channel: int) -> None:
        try:
            # Under the lock: whoever was sent the same bytes may be claiming the block.
            self._membership.run(
                lambda: self._ledger.readdress(index, generation, self._membership.slot, channel)
            )
        except (ArenaFullError, OSError) as error:
            pass_on_foreign(error)
            self._ledger.channel[index] = 0  # no lock: from now on it may be anywhere

    def note_reader(self, channel: int) -> None:
        """Somebody in this process can read there himself, without a connection."""
        unloaded = self._membership.unloaded
        if unloaded.note(channel):
            return
        try:
            needed = open_channels() | self._ledger.sources()
        except OSError as error:
            pass_on_foreign(error)
        else:
            unloaded.retain(needed)
        if not unloaded.note(channel):
            unloaded.keep_any()

    def _refusal(self, index: int, generation: int) -> EnvelopeError:
        ledger = self._ledger
        if index < ledger.rows.n_rows and not ledger.is_sound(index):
            with ignoring(ArenaFullError, OSError):  # then whoever meets it next does it
                self._membership.run(ledger.examine, index)
            if not ledger.is_sound(index):
                return EnvelopeError(
                    f"the ledger's entry of block {index} is damaged: some process of the arena "
                    "has written where it should not. The block is not used any more; the message "
                    "is lost. See Statistics.n_quarantined."
                )
        return StaleEnvelopeError(
            f"block {index} is not in flight with generation {generation}: this message was loaded "
            "already, or its sender took it back. Load each message once; keep the object instead."
        )


def _max_map_count() -> int:
    try:
        with open("/proc/sys/vm/max_map_count") as file:
            return int(file.read())
    except (OSError, ValueError) as error:
        pass_on_foreign(error)
        return 65530
