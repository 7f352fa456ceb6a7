"""Any history of participants: they lease, send, read, receive, drop, fork, die; against a model.

Each participant is an arena of its own over the same files, in this one process; one that dies is
abandoned, which is what the others see of a death. Deaths in the middle of a step are the business
of ``tests/long/kills.py``. The same with a file on disk, for what finds no room in memory.
"""

import gc
import os
import tempfile
from pickle import PickleBuffer

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from exploring import examples
from oobpickle._envelope import tables
from oobpickle._errors import ArenaFullError
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._memory.sending import Lease
from oobpickle._native import core
from table import ADOPTED, FREE, HELD, IN_FLIGHT, JOINED, LEASED, PUBLISHED, RELEASED, Table

MIB = 1 << 20
CAPACITY = 16 * MIB
SIZES = st.lists(st.sampled_from([1, 4096, 70_000, 300_000, 5 * MIB]), min_size=1, max_size=4)
CHANNELS = st.sampled_from([7, 8])
WHO = st.integers(0, 5)


def content(seed, nbytes):
    """Return the first and the last bytes of what a block holds."""
    return seed.to_bytes(4, "little")[: min(nbytes, 4)]


class Process:
    def __init__(self, arena):
        self.arena = arena
        arena.reclaim.look = lambda: 0  # what is lost, and when, is for the rules to say
        self.blocks = arena.blocks
        self.slot = arena.blocks.slot
        self.incarnation = int(Table.of(arena).participant(self.slot).incarnation[0])
        self.leases = []  # (lease, sizes, seeds)
        self.held = []  # (view, seed)
        self.views = []  # frozen, of what is published: (block, seed)
        self.keeps = set()


class Message:
    def __init__(self, lease, sizes, seeds, channel):
        self.pairs, self.needs, self.seeds = lease.pairs, sizes, seeds
        self.source = channel
        numbers = memoryview(self.pairs).cast("Q").tolist()
        self.blocks = list(zip(numbers[::2], numbers[1::2], strict=True))


class TableMachine(RuleBasedStateMachine):
    spill_dir = None

    @initialize()
    def begin(self):
        self.first = SharedArena.create(Options(capacity=CAPACITY, spill_dir=self.spill_dir))
        self.table = Table.of(self.first)
        self.living = [Process(self.first)]
        self._dead, self.gone = [], []
        self.in_flight, self.seed = [], 0

    def one(self, who):
        return self.living[who % len(self.living)]

    @property
    def dead(self):
        """Those that were not reaped yet: whoever looks for fresh pages does that, too."""
        rows = [self.table.participant(process.slot) for process in self._dead]
        self._dead = [
            process
            for process, row in zip(self._dead, rows, strict=True)
            if (row.state[0], row.incarnation[0]) == (JOINED, process.incarnation)
        ]
        return self._dead

    def adopted_by(self, process):
        return ADOPTED | (process.incarnation & 0xFFFFFFFF) << 28

    # --- rules

    @precondition(lambda self: len(self.living) < 5)
    @rule()
    def join(self):
        arena = SharedArena.attach(*(os.dup(fd) for fd in self.first.descriptors))
        self.living.append(Process(arena))

    @rule(who=WHO, sizes=SIZES)
    def lease(self, who, sizes):
        process = self.one(who)
        try:
            lease = process.arena.acquire(sizes, wait_timeout=0)
        except ArenaFullError as error:
            reason = error.reason
        else:
            reason = ""
        assert reason == "" or (reason == "full" and not self.spill_dir)
        if reason:
            return
        seeds = []
        for block, need in zip(lease.blocks, sizes, strict=True):
            self.seed += 1
            seeds.append(self.seed)
            block.write(0, content(self.seed, need))
        process.leases.append((lease, sizes, seeds))

    @rule(who=WHO, keep=st.booleans(), channel=CHANNELS)
    def send_or_give_back(self, who, keep, channel):
        process = self.one(who)
        if not process.leases:
            return
        lease, sizes, seeds = process.leases.pop()
        if keep:
            message = Message(lease, sizes, seeds, channel)
            lease.seal(channel)
            lease.depart()
            lease.settle()
            self.in_flight.append(message)

    @rule(who=WHO)
    def read(self, who):
        """The message has left its channel: its reader answers for it, until it sends it on."""
        process = self.one(who)
        if self.in_flight:
            message = self.in_flight[-1]
            process.blocks.adopt(*message.blocks[0])
            message.source = self.adopted_by(process)

    @rule(who=WHO, channel=CHANNELS)
    def send_on(self, who, channel):
        process = self.one(who)
        if self.in_flight:
            message = self.in_flight[-1]
            sending = process.blocks.send_on(*message.blocks[0], channel)
            assert process.slot == self.table.owner(message.blocks[0][0])
            process.blocks.settle(sending)
            message.source = channel

    @rule(who=WHO, channel=CHANNELS)
    def read_unseen(self, who, channel):
        """It asks for the descriptor: what was sent there is kept as long as it lives."""
        process = self.one(who)
        assert process.blocks.keep(channel)
        process.keeps.add(channel)

    @rule(who=WHO, twice=st.booleans())
    def receive(self, who, twice):
        process = self.one(who)
        if not self.in_flight:
            return
        message = self.in_flight.pop(0)
        claimed = process.blocks.claim(message.pairs, message.needs, False)
        process.held += zip(map(memoryview, claimed), message.seeds, strict=True)
        del claimed
        if twice:
            assert process.blocks.claim(message.pairs, message.needs, False) == 0

    @rule(who=WHO)
    def publish(self, who):
        process = self.one(who)
        if not process.leases:
            return
        lease, _, seeds = process.leases.pop()
        views = process.blocks.publish(lease.blocks)
        process.views += zip(views, seeds, strict=True)

    @rule(who=WHO, channel=CHANNELS)
    def send_reference(self, who, channel):
        process = self.one(who)
        message = core.Message(None, 0, tables({}), process.blocks)
        for view, _ in process.views:
            message.take(PickleBuffer(view))
        referred = [(v, seed) for v, seed in process.views if memoryview(v).nbytes >= 64 << 10]
        assert len(referred) == len(message.references)
        if referred:
            lease = Lease(process.blocks, message.references)
            sent = Message(lease, [0] * len(referred), [seed for _, seed in referred], channel)
            lease.seal(channel)
            lease.depart()
            lease.settle()
            self.in_flight.append(sent)

    @rule(who=WHO)
    def look_again(self, who):
        """A further view of the same, which may be written: nobody else sees that."""
        process = self.one(who)
        if process.views:
            view, _ = process.views[0]
            again = process.blocks and view.again()
            self.seed += 1
            start = content(self.seed, memoryview(again).nbytes)
            memoryview(again)[: len(start)] = start
            process.held.append((memoryview(again), self.seed))

    @rule(who=WHO)
    def freeze(self, who):
        process = self.one(who)
        references = [one for one in process.held if one[0].obj.is_reference]
        if references:
            one = references[0]
            process.held.remove(one)
            view, seed = one
            block = view.obj
            del one, references[:], view
            # What was written to is this process's own, and may not be sent as what is published.
            if bytes(memoryview(block)[:4]) == self.content_of(block):
                assert block.freeze()
                process.views.append((block, seed))

    def content_of(self, block):
        again = block.again()
        return bytes(memoryview(again)[:4])

    @rule(who=WHO)
    def drop_view(self, who):
        process = self.one(who)
        if process.views:
            process.views.pop()

    @rule(who=WHO)
    def give_up(self, who):
        """It has read a message, and will never load it: what follows is lost with the first."""
        process = self.one(who)
        if self.in_flight and self.in_flight[-1].source == self.adopted_by(process):
            message = self.in_flight.pop()
            process.blocks.discard(*message.blocks[0])
            process.blocks.free_lost([])

    @rule(who=WHO)
    def drop(self, who):
        process = self.one(who)
        if process.held:
            process.held.pop()

    @rule(who=WHO)
    def fork(self, who):
        """What its parent holds is the parent's; the child ends without giving anything back.

        What is on disk is published by it.
        """
        process = self.one(who)
        pid = os.fork()
        if pid == 0:
            process.held.clear()
            process.leases.clear()
            process.views.clear()
            gc.collect()
            os._exit(0)
        os.waitpid(pid, 0)
        self.living[0].blocks.reap()  # the child, and whoever died before

    @precondition(lambda self: len(self.living) > 1)
    @rule(who=WHO)
    def die(self, who):
        process = self.one(who)
        if process is self.living[0]:
            return
        process.blocks.abandon()
        process.held.clear()
        process.leases.clear()
        process.views.clear()
        self.living.remove(process)
        self._dead.append(process)
        self.gone.append(process)

    @rule(who=WHO)
    def reap(self, who):
        n_dead = len(self.dead)
        assert n_dead == self.one(who).blocks.reap()
        assert not self.dead
        for index in range(self.table.n_rows):
            if self.table.state(index) in (LEASED, HELD, RELEASED):
                assert self.table.owner(index) in {process.slot for process in self.living}

    @rule(who=WHO, nbytes=st.sampled_from([1, MIB, 1 << 60]))
    def punch(self, who, nbytes):
        self.one(who).arena.reclaim.punch_idle(nbytes)

    @rule(who=WHO, nbytes=st.sampled_from([0, MIB, 64 * MIB]))
    def keep_less(self, who, nbytes):
        self.one(who).blocks.keep_nbytes = nbytes

    @rule(who=WHO)
    def reclaim(self, who):
        """Free what was in flight and lost, as the one that asks can tell."""
        process = self.one(who)
        lost = self.lost_for(process)
        found = {one[0]: one for one in process.blocks.unowned()}
        heads = [m.blocks[0][0] for m in lost if m.blocks[0][0] in found]
        n_freed = process.blocks.free_lost([found[index] for index in heads])
        assert n_freed == sum(len(message.blocks) for message in lost)
        for message in lost:
            self.in_flight.remove(message)

    def lost_for(self, asking):
        """Return the messages that may be nobody's."""
        have_rows = [*self.living, *self.dead]
        others = {process.slot for process in have_rows if process is not asking}
        kept = {self.adopted_by(process) for process in have_rows}
        kept.update(*(process.keeps for process in have_rows))
        return [
            message
            for message in self.in_flight
            if message.source not in kept
            and (message.source & ADOPTED or self.table.owner(message.blocks[0][0]) not in others)
        ]

    # --- what must hold

    @invariant()
    def every_process_has_what_it_believes(self):
        for process in getattr(self, "living", ()):
            for lease, sizes, seeds in process.leases:
                for block, need, seed in zip(lease.blocks, sizes, seeds, strict=True):
                    self.is_his(process, LEASED, block)
                    if not block.is_on_disk:
                        self.holds(memoryview(block), need, seed)
            for block, seed in process.views:
                self.is_his(process, HELD, block)
                self.holds(memoryview(block), memoryview(block).nbytes, seed)
            for view, seed in process.held:
                self.is_his(process, HELD, view.obj)
                self.holds(view, view.nbytes, seed)

    def is_his(self, process, state, block):
        assert (state, process.slot, block.generation) == (
            self.table.state(block.index),
            self.table.owner(block.index),
            self.table.generation(block.index),
        )

    def holds(self, view, nbytes, seed):
        expected = content(seed, nbytes)
        assert bytes(view[: len(expected)]) == expected, "somebody else has written there"

    @invariant()
    def what_was_sent_can_be_received(self):
        for message in getattr(self, "in_flight", ()):
            for index, generation in message.blocks:
                assert self.table.state(index) == IN_FLIGHT
                assert generation == self.table.generation(index)

    @invariant()
    def what_somebody_may_load_is_not_lost(self):
        """And what nobody can is found."""
        if not getattr(self, "living", ()):
            return
        asking = self.living[-1]
        found = {index for index, _, _ in asking.blocks.unowned()}
        lost = [message.blocks[0][0] for message in self.lost_for(asking)]
        heads = {message.blocks[0][0] for message in self.in_flight}
        assert found & heads == set(lost)

    @invariant()
    def the_table_is_in_order(self):
        if getattr(self, "living", ()) and not self.dead:
            self.table.assert_in_order()
            for index in range(self.table.n_rows):  # what nobody refers to is gone at once
                assert self.table.state(index) != PUBLISHED or self.table.n_named(index)

    def teardown(self):
        for process in self.living[1:]:
            process.blocks.abandon()
        survivor = self.living[0]
        survivor.blocks.reap()
        survivor.leases.clear()
        survivor.held.clear()
        survivor.views.clear()
        survivor.blocks.reap()
        states = {self.table.state(index) for index in range(self.table.n_rows)}
        named = {self.table.named(index) for index in range(self.table.n_rows)}
        assert states <= {FREE, IN_FLIGHT, *([PUBLISHED] if named - {None} else [])}
        self.table.assert_in_order()
        survivor.arena.reclaim.punch_idle()
        if self.spill_dir and states == {FREE}:
            assert os.fstat(self.first.descriptors[3]).st_blocks == self.table["on_disk"] == 0
        for process in [*self.living[1:], *self.gone]:
            process.arena._files.close()
        del self.table
        survivor.blocks.abandon()
        survivor.arena._files.close()


class SpillingMachine(TableMachine):
    spill_dir = os.path.realpath(tempfile.gettempdir())


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = examples(20, stateful_step_count=40)
TestSpillingMachine = SpillingMachine.TestCase
TestSpillingMachine.settings = examples(10, stateful_step_count=40)
