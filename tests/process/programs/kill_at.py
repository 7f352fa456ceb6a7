"""Kills one of three participants at a fault point, twice, while the others work on.

``kill_at.py POINT HIT [HIT ...]``: for each hit a *victim* lives a life that reaches every point of
the library; the *owner* (this process) and a *bystander* exchange messages all the time.
"""

import multiprocessing
import os
import signal
import sys

import inside
from inside import fork, message, verify

import oobpickle
from oobpickle import _layout as layout

CAPACITY = 48 << 20
SIZES = (300_000, 1_500_000, 70_000)


def victim(arena, from_owner, to_owner):
    """Send, receive, hold, drop, trim, fork, and outlive children that die with full hands."""
    own_read, own_write = multiprocessing.Pipe(duplex=False)
    held, n_received = [], 0
    for round in range(60):
        for size in SIZES:
            own_write.send(message(round, size))
            held.append(verify(own_read.recv(), round))
        own_write.send([message(n, 3_000) for n in range(40)])
        for part in own_read.recv():
            verify(part)
        while from_owner.poll():
            held.append(verify(from_owner.recv()))
            n_received += 1
        to_owner.send((n_received, message(1000 + round, 500_000)))
        if round % 2 == 0:
            inside.reap(fork(die_with_full_hands, held), inside.KILLED)
        held = held[-2:]
        if round % 3 == 1:
            arena.trim()


def die_with_full_hands(held):
    read, write = multiprocessing.Pipe(duplex=False)
    for seed in range(3):
        write.send(message(seed, 200_000))
    held.append(verify(read.recv(), 0))
    oobpickle.install().acquire([100_000, 2_000_000])
    os.kill(os.getpid(), signal.SIGKILL)


def bystander(from_owner, to_owner):
    """Return each message of the owner, and hold the last few all the while."""
    held = []
    while (received := from_owner.recv()) is not None:
        held = [verify(received), *held[:3]]
        to_owner.send(message(received[0] + 1, 400_000))
        for one in held:
            verify(one)


class Owner:
    """This process, its arena and its two partners."""

    def __init__(self):
        self.arena = oobpickle.install(capacity=CAPACITY)
        there, self.to_bystander = multiprocessing.Pipe(duplex=False)
        self.from_bystander, back = multiprocessing.Pipe(duplex=False)
        self.bystander = fork(self.be_bystander, there, back)
        there.close()
        back.close()
        self.seed = 0

    def be_bystander(self, there, back):
        self.to_bystander.close()
        self.from_bystander.close()
        bystander(there, back)

    def exchange(self):
        """One message there and one back; both whole."""
        self.seed += 2
        self.to_bystander.send(message(self.seed, 600_000))
        return verify(self.from_bystander.recv(), self.seed + 1)

    def outlive(self, point, hit):
        """Start a victim, work until it is dead, and look at what it left."""
        there, to_victim = multiprocessing.Pipe(duplex=False)
        from_victim, back = multiprocessing.Pipe(duplex=False)

        def be_victim():
            to_victim.close()
            from_victim.close()
            victim(self.arena, there, back)

        pid = fork(be_victim, fault=f"{point}:{hit}")
        there.close()
        back.close()
        kept = self.work_until_death(pid, to_victim, from_victim)
        inside.assert_ledger_consistent(self.arena)
        self.exchange()
        self.take_all_room()
        inside.assert_ledger_consistent(self.arena)
        for one in kept:
            verify(one)

    def work_until_death(self, pid, to_victim, from_victim):
        kept, n_sent, n_acknowledged = [], 0, 0
        ended = None
        while ended is None:
            ended = inside.exit_of(pid)
            kept.append(self.exchange())
            if n_sent < n_acknowledged + 3 and ended is None:
                try:
                    to_victim.send(message(2000 + n_sent, 250_000))
                    n_sent += 1
                except BrokenPipeError:
                    pass
            while ended is None and from_victim.poll():
                try:
                    n_acknowledged, part = from_victim.recv()
                except EOFError:
                    break
                kept.append(verify(part))
            kept = kept[-6:]
        assert ended == (inside.KILLED,), f"the victim ended with {ended}: the point was not met"
        # What it sent before it died arrives.
        while True:
            try:
                kept.append(verify(from_victim.recv()[1]))
            except EOFError:
                return kept[-6:]

    def take_all_room(self):
        """Whoever needs room finds all that the dead had, and the dead have nothing more."""
        leases, arena = [], self.arena
        try:
            while True:
                leases.append(arena.acquire([1 << 20], wait_s=0))
        except oobpickle.ArenaFullError as error:
            reason = error.reason
        assert reason == "full", reason
        rows = inside.owners(arena)
        living = {arena.membership.slot, self.slot_of(self.bystander)}
        stray = [row for row in rows if row[1] != layout.IN_FLIGHT and row[2] not in living]
        assert not stray, f"blocks (index, state, slot) of the dead: {stray}"
        others = [index for index, state, _ in rows if state != layout.LEASED]
        nbytes_others = sum(arena.ledger.resident[index] for index in others)
        # The bystander may have dropped something a moment ago: 2 MiB of slack.
        n_expected = (CAPACITY - nbytes_others - (2 << 20)) >> 20
        assert len(leases) >= n_expected, (len(leases), n_expected, nbytes_others)
        for lease in leases:
            lease.release()

    def slot_of(self, pid):
        for slot in range(self.arena.ledger.words[layout.H_N_SLOTS]):
            row = layout.HEADER_WORDS + slot * layout.PARTICIPANT_WORDS
            if self.arena.ledger.words[row + layout.P_PID] == pid:
                return slot
        raise AssertionError(f"process {pid} takes no part")

    def finish(self):
        """Stop the bystander; then not one block and not one page is left."""
        self.exchange()
        self.to_bystander.send(None)
        inside.reap(self.bystander)
        inside.assert_empty(self.arena)
        statistics = self.arena.statistics()
        assert statistics.n_participants == 1, statistics
        oobpickle.uninstall()
        assert inside.our_descriptors() == []


if __name__ == "__main__":
    owner = Owner()
    for hit in sys.argv[2:]:
        owner.outlive(sys.argv[1], hit)
    owner.finish()
