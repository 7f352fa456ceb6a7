"""The ledger against a dict model: participants lease, pass on, fork and die at every step."""

from contextlib import contextmanager

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from exploring import examples
from ledger_tools import FakeLocks, assert_in_order, make_ledger, make_mutex, owner_of, state_of
from oobpickle import _faults
from oobpickle._memory import ledger, mutex, participants
from oobpickle._memory.layout import (
    ADOPTED,
    FREE,
    HEADER_WORDS,
    HELD,
    IN_FLIGHT,
    JOINED,
    LEASED,
    P_INCARNATION,
    P_STATE,
    PARTICIPANT_WORDS,
    adopted_by,
)
from oobpickle._memory.participants import OwnRow, Participants
from oobpickle._memory.unloaded import Unloaded

SIZES = st.lists(
    st.sampled_from([1, 4096, 4097, 70_000, 300_000, 1 << 20, 5 << 20]), min_size=1, max_size=4
)
CAPACITY = 24 << 20


class Crash(BaseException):
    """Stands for SIGKILL: nothing of the step runs after it."""


class Process:
    """What one simulated process believes to have."""

    def __init__(self, slot, incarnation):
        self.slot = slot
        self.incarnation = incarnation
        self.keeps = set()  # of messages that were read by these, or sent there, it has the bytes
        self.leases = []
        self.held = []


class LedgerMachine(RuleBasedStateMachine):
    """Blocks are what the model says, whoever dies where."""

    processes = Bundle("processes")

    def __init__(self):
        super().__init__()
        self.ledger = make_ledger(CAPACITY)
        self.locks = FakeLocks()
        self.mutex = make_mutex(self.ledger, self.locks)
        self.participants = Participants(self.ledger)
        self.living = []
        self.started = []
        self.in_flight = []  # messages: lists of (index, generation, nbytes)
        self.lost = []  # blocks in flight of which no message is left
        self.bomb = None
        self.source_of = {}  # first blocks in flight: their channel, or who has read them

    # --- helpers

    def step(self, step, *args):
        return self.mutex.run(1.0, step, *args)

    @contextmanager
    def dying_at(self, process, reach):
        """Run a step of `process` that is killed at its n-th fault point, if it gets there."""
        hits = 0

        def point(_name):
            nonlocal hits
            hits += 1
            if hits == reach:
                raise Crash

        modules = (ledger, mutex, participants)
        original = _faults.reach
        _faults.reach = point
        assert all(module._faults is _faults for module in modules)
        try:
            yield
            died = False
        except Crash:
            died = True
        finally:
            _faults.reach = original
        if died:
            self.mutex._interrupted = False  # that was the other process's memory
            self.bury(process)

    def bury(self, process):
        self.living.remove(process)
        self.locks.alive.discard(process.slot)

    def alive(self, process):
        return process in self.living

    def has_row(self, process):
        """Whether it is living, or was not reaped."""
        row = HEADER_WORDS + process.slot * PARTICIPANT_WORDS
        words = self.ledger.words
        return words[row + P_STATE] == JOINED and words[row + P_INCARNATION] == process.incarnation

    # --- rules

    @rule(target=processes)
    def join(self):
        return self.start()

    def start(self, keeps=()):
        unloaded = Unloaded(keeps)
        slot = self.step(self.participants.join, self.locks, unloaded)
        process = Process(slot, OwnRow(self.ledger.words, slot).incarnation)
        process.unloaded = unloaded
        process.keeps = set(keeps)
        self.started.append(process)
        self.living.append(process)
        return process

    @rule(process=processes, sizes=SIZES, reach=st.integers(0, 12))
    def lease(self, process, sizes, reach):
        if not self.alive(process):
            return
        taken = []
        with self.dying_at(process, reach):
            shortage = self.step(self.ledger.lease, sizes, process.slot, taken)
            blocks = [
                (index, self.ledger.generation[index], nbytes)
                for (index, _), nbytes in zip(taken, sizes, strict=False)
            ]
            if shortage is None:
                process.leases.append(blocks)
            else:
                assert shortage.reason == "full"
                pairs = [block[:2] for block in blocks]
                self.step(self.ledger.release, pairs, process.slot)

    @rule(
        process=processes,
        keep=st.booleans(),
        channel=st.sampled_from([7, 8]),
        reach=st.integers(0, 6),
    )
    def send_or_give_back(self, process, keep, channel, reach):
        if not self.alive(process) or not process.leases:
            return
        message = process.leases.pop()
        if keep:
            self.ledger.seal([block[:2] for block in message], process.slot, channel)
            self.in_flight.append(message)
            self.source_of[message[0][:2]] = channel
        else:
            with self.dying_at(process, reach):
                self.step(self.ledger.release, [b[:2] for b in message], process.slot)

    @rule(process=processes)
    def read(self, process):
        """The message has left its channel: its reader answers for it, until it sends it on."""
        if self.alive(process) and self.in_flight:
            index, generation, _ = self.in_flight[-1][0]
            owner = owner_of(self.ledger, index)
            self.ledger.adopt(index, generation, process.incarnation)
            self.source_of[index, generation] = adopted_by(process.incarnation)
            assert owner == owner_of(self.ledger, index)

    @rule(process=processes, channel=st.sampled_from([7, 8]))
    def send_on(self, process, channel):
        if self.alive(process) and self.in_flight:
            index, generation, _ = self.in_flight[-1][0]
            assert self.step(self.ledger.readdress, index, generation, process.slot, channel)
            self.source_of[index, generation] = channel
            assert process.slot == owner_of(self.ledger, index)

    @rule(process=processes, channel=st.sampled_from([7, 8]))
    def read_unseen(self, process, channel):
        """It asks for the descriptor: what was sent there is kept as long as it lives."""
        if self.alive(process):
            assert process.unloaded.note(channel)
            process.keeps.add(channel)

    @rule(process=processes, reach=st.integers(0, 6), twice=st.booleans())
    def receive(self, process, reach, twice):
        if not self.alive(process) or not self.in_flight:
            return
        message = self.in_flight.pop(0)
        blocks, needs = [b[:2] for b in message], [b[2] for b in message]
        self.lost += message
        with self.dying_at(process, reach):
            assert self.step(self.ledger.claim, blocks, needs, process.slot) is None
            process.held += message
            for block in message:
                self.lost.remove(block)
            if twice:
                assert self.step(self.ledger.claim, blocks, needs, process.slot) == 0

    @rule(process=processes, reach=st.integers(0, 6))
    def drop(self, process, reach):
        if not self.alive(process) or not process.held:
            return
        block = process.held.pop()
        with self.dying_at(process, reach):
            self.step(self.ledger.release, [block[:2]], process.slot)

    @rule(process=processes)
    def release_of_a_stranger_does_nothing(self, process):
        if not self.alive(process):
            return
        for other in self.living:
            if other is not process:
                blocks = [block[:2] for block in other.held]
                self.step(self.ledger.release, blocks, process.slot)

    @rule(target=processes, process=processes, reach=st.integers(0, 6))
    def fork(self, process, reach):
        """The parent's held blocks lose their file pages; the child is a new participant that has
        nothing, but the bytes of what the parent has read."""
        keeps = {adopted_by(process.incarnation), *process.keeps}
        if self.alive(process):
            with self.dying_at(process, reach):
                indices = [index for index, _, _ in process.held]
                self.step(self.ledger.mark_punched, indices)
        return self.start(keeps)

    @rule(process=processes)
    def crash(self, process):
        if self.alive(process):
            self.bury(process)

    @rule(process=processes, reach=st.integers(0, 8))
    def reap(self, process, reach):
        if not self.alive(process):
            return
        with self.dying_at(process, reach):
            self.step(self.participants.reap, self.locks, process.slot)
            for index in range(self.ledger.words[17]):
                if state_of(self.ledger, index) in (LEASED, HELD):
                    assert owner_of(self.ledger, index) in {p.slot for p in self.living}

    @rule(process=processes, nbytes=st.sampled_from([1, 1 << 20, 1 << 60]), reach=st.integers(0, 9))
    def punch(self, process, nbytes, reach):
        if not self.alive(process):
            return
        taken = []
        with self.dying_at(process, reach):
            self.step(self.ledger.take_idle, nbytes, process.slot, taken)
            self.step(self.ledger.mark_punched, taken)
            blocks = [(index, self.ledger.generation[index]) for index in taken]
            self.step(self.ledger.release, blocks, process.slot)

    @rule(sender=processes, reader=processes, channel=st.sampled_from([7, 8]), dies=st.booleans())
    def send_and_read(self, sender, reader, channel, dies):
        """What most messages go through; without it few of the histories have one that was read."""
        if not self.alive(sender) or not self.alive(reader):
            return
        self.lease(sender, [4096, 70_000], 0)
        if sender.leases:
            self.send_or_give_back(sender, True, channel, 0)
            self.read(reader)
        if dies and len(self.living) > 1:
            self.bury(reader)

    @precondition(lambda self: self.lost)
    @rule(process=processes)
    def reclaim(self, process):
        """Free what was in flight and lost, if its sender is dead."""
        if not self.alive(process):
            return
        lost = {(index, generation) for index, generation, _ in self.lost}
        others = [other.slot for other in self.living if other is not process]
        words = [
            (index, word)
            for index, word, _ in self.ledger.in_flight(others)
            if (index, self.ledger.generation[index]) in lost
        ]
        assert self.step(self.ledger.free_unread, words) == len(words)

    # --- what must hold

    @invariant()
    def every_process_has_what_it_believes(self):
        for process in self.living:
            for state, blocks in (
                (LEASED, [block for lease in process.leases for block in lease]),
                (HELD, process.held),
            ):
                for index, generation, nbytes in blocks:
                    assert state == state_of(self.ledger, index)
                    assert process.slot == owner_of(self.ledger, index)
                    assert (generation, nbytes) == (
                        self.ledger.generation[index],
                        self.ledger.used[index],
                    )

    @invariant()
    def what_was_sent_can_be_received(self):
        for message in self.in_flight:
            for index, generation, _ in message:
                assert state_of(self.ledger, index) == IN_FLIGHT
                assert generation == self.ledger.generation[index]

    @invariant()
    def what_somebody_may_load_is_not_lost(self):
        """And what nobody can is, if it was read, or its sender is dead or the one that asks."""
        if not self.living:
            return
        asking = self.living[-1]
        kept, keeps_all = self.participants.kept()
        have_rows = [process for process in self.started if self.has_row(process)]
        others = [process.slot for process in have_rows if process is not asking]
        found = {index for index, _, _ in self.ledger.in_flight(others, kept)}
        assert not keeps_all
        sources = {adopted_by(process.incarnation) for process in have_rows}
        sources.update(*(process.keeps for process in have_rows))
        for message in self.in_flight:
            index, generation, _ = message[0]
            source = self.source_of[index, generation]
            may_be_lost = source & ADOPTED or owner_of(self.ledger, index) not in others
            assert (index in found) == bool(may_be_lost and source not in sources)

    @invariant()
    def nobody_has_what_another_has(self):
        owned = [b[0] for p in self.living for lease in (*p.leases, p.held) for b in lease]
        owned += [block[0] for message in self.in_flight for block in message]
        assert len(owned) == len(set(owned))

    @invariant()
    def the_table_is_in_order(self):
        self.step(lambda: None)  # whoever comes next repairs what a death has left
        assert_in_order(self.ledger)

    def teardown(self):
        if not self.living:
            self.start()
        survivor = self.living[0]
        for process in self.living[1:]:
            self.bury(process)
        self.step(self.participants.reap, self.locks, survivor.slot)
        expected = {block[0] for lease in (*survivor.leases, survivor.held) for block in lease}
        found = {
            index
            for index in range(self.ledger.words[17])
            if state_of(self.ledger, index) not in (FREE, IN_FLIGHT)
        }
        assert expected == found


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = examples(60, stateful_step_count=40)
