"""The owner of an arena in which others are killed, and the workers that are busy beside them.

**What.** `Survivors`: this process, its arena, and two workers that send each other messages all
the while; `look` says that nobody hangs, nothing wrong has arrived, and nothing is left of the
dead.

**How it works.** Each worker verifies every byte of every message, again when it drops it. `look`
asks both how far they are, compares the table with a recomputation, and takes all room there is:
what is not to be had must belong to somebody who lives.

**Lifetime.** From its making to `finish`, after which nothing may be left in this process.

**When it cannot.** A survivor that does not answer within `inside.TOKEN_S` seconds is taken to
hang, and fails the run.
"""

import contextlib
import gc
import multiprocessing
import os
import random
import tempfile
import time
import warnings

import inside
from inside import eventually, message, verify

import oobpickle
from internals import inner
from table import Table

WAIT_S = 10.0
PAUSE_S = 0.5e-3  # so that the victims get a core now and then
CAPACITY = 192 << 20
#: More than the two workers have at any time, in blocks that may be larger than what they hold.
WORKERS_NBYTES = 48 << 20
SIZES = (80_000, 300_000, 1_000_000, 2_000_000)


def work(control, get, put, begins, seed):
    """Exchange messages with the other worker until the owner says stop."""
    chance, held, n_verified = random.Random(seed), [], 0
    if begins:
        put.send(message(seed))
    while (received := get.recv()) is not None:
        held = [verify(received), *held[:3]]
        n_verified += 1
        if len(held) == 4:
            verify(held[-1])
        if control.poll():
            if control.recv() == "stop":
                break
            control.send(n_verified)
        time.sleep(PAUSE_S)
        put.send(message(received[0] + 1, chance.choice(SIZES)))
    with contextlib.suppress(BrokenPipeError):  # the other one has ended
        put.send(None)
    control.send(n_verified)


class Survivors:
    """This process and its workers.

    Attributes
    ----------
    n_verified : int
        Messages whose every byte was looked at by a survivor.
    """

    def __init__(self, method):
        self.n_descriptors = len(os.listdir("/proc/self/fd"))
        self.context = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(["numpy", "oobpickle", "victims"])
        # Long enough for others to finish what they do with idle blocks: nobody reads from a victim
        # that sends to itself in-band.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", oobpickle.FallbackWarning)  # it may be a tmpfs
            self.arena = oobpickle.install(
                capacity=CAPACITY, wait_timeout=WAIT_S, spill_dir=tempfile.gettempdir()
            )
        self.n_verified = 0
        there, back = self.pipe(), self.pipe()
        self.workers = [
            self._start(there[0], back[1], True, 10_000),
            self._start(back[0], there[1], False, 20_000),
        ]
        for end in (*there, *back):
            end.close()

    def pipe(self):
        return self.context.Pipe(duplex=False)

    def _start(self, *args):
        here, there = self.context.Pipe()
        process = self.context.Process(target=work, args=(there, *args), daemon=True)
        process.start()
        there.close()
        return process, here

    def verify(self, received, seed=None):
        self.n_verified += 1
        return verify(received, seed)

    def look(self):
        """Assert that all is well, and that nothing is left of the dead."""
        for process, control in self.workers:
            control.send("report")
            assert control.poll(inside.TOKEN_S), f"{process} hangs"
            control.recv()
        inside.assert_table_in_order(self.arena, [process.pid for process, _ in self.workers])
        eventually(lambda: not self._strays())
        self._take_all_room()
        inside.assert_table_in_order(self.arena, [process.pid for process, _ in self.workers])

    def _strays(self):
        table = Table.of(self.arena)
        nbytes = sum(table.used(index) for index, _, _ in inside.owners(self.arena))
        return blocks_of_the_dead(self.arena) or nbytes > WORKERS_NBYTES

    def _take_all_room(self):
        leases = []
        try:
            while True:
                leases.append(inner(self.arena).sending.lease([1 << 20], 0, may_spill=False))
        except oobpickle.ArenaFullError as error:
            reason = error.reason
        assert reason == "full", reason
        assert len(leases) >= (CAPACITY - WORKERS_NBYTES) >> 20, len(leases)
        for lease in leases:
            lease.release()

    def finish(self):
        """End the workers; then not one block, page, descriptor or participant is left."""
        (first, control), (second, other_control) = self.workers
        control.send("stop")
        for process, end in ((first, control), (second, other_control)):
            self.n_verified += last_of(end)
            process.join(inside.TOKEN_S)
            assert process.exitcode == 0, process
            process.close()
            end.close()
        self.workers.clear()
        del first, second, process
        inside.assert_empty(self.arena)
        statistics = self.arena.statistics()
        assert statistics.n_participants == 1, statistics
        oobpickle.uninstall()
        gc.collect()
        assert inside.our_descriptors() == []
        return statistics


def blocks_of_the_dead(arena):
    """Return what is in use by nobody who lives, after a look for such."""
    inner(arena).reclaim.look()
    living = {
        slot
        for slot, _, _ in inner(arena).blocks.participants()
        if slot == inner(arena).blocks.slot or inner(arena).blocks.is_alive(slot)
    }
    return [row for row in inside.owners(arena) if row[2] not in living]


def last_of(connection):
    """Return the last of what somebody sends before he ends."""
    assert connection.poll(inside.TOKEN_S), "a worker hangs"
    found = connection.recv()
    while True:
        try:
            found = connection.recv()
        except (EOFError, ConnectionResetError):
            return found
