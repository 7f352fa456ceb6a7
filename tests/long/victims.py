"""Lives that end by a kill, each in a process of its own.

**What.** `live` reaches every fault point of the library, and six of its own
(`points.OF_VICTIMS`) in places where the library has no code that could stop; `Armed` chooses the
point in a child that is started.

**How it works.** A life is a round of acts that is repeated until the armed point is reached; it
begins with the act that reaches the point soonest. Every message that it receives is verified, and
a life that fails, or does not come to its point, ends with another exit code than the signal's.

**Lifetime.** Until the kill. What it has sent stays with its receiver.

**When it cannot.** A point that a forked child dies at (`fork.after_in_child`, `participant.born`,
`views.referred`) takes its parent along, so that who watches the parent sees it.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import mmap
import multiprocessing
import os
import resource
import signal
import termios
import threading
import warnings
from array import array
from multiprocessing import util

import inside
import numpy as np
from inside import content, message, verify

import oobpickle
from internals import inner
from oobpickle import _faults
from oobpickle._hook import installed
from oobpickle._published import store
from table import LEASED, Table

SIZES = (300_000, 1_500_000, 70_000)
COPIED_NBYTES = 24 << 20
N_ROUNDS = 40
_PAGE_NBYTES = 4096
#: Of what is copied. `memcpy` may write the very first and last bytes when all else is there.
_EARLY, _LATE = slice(_PAGE_NBYTES, _PAGE_NBYTES + 64), slice(-_PAGE_NBYTES - 64, -_PAGE_NBYTES)


class Armed(str):
    """The name of a process that arms a fault point in the child as soon as it is unpickled there:
    before the child joins the arena."""

    def __new__(cls, name, fault):
        self = super().__new__(cls, name)
        self.fault = fault
        return self

    def __reduce__(self):
        return _arm, (str(self), self.fault)


def _arm(name, fault):
    _faults.arm(fault)
    return name


def no_core():
    """Let this process and its children die of a signal without a core dump."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def live(fault, from_owner, to_owner, clogged):
    """Send, receive, hold, drop, spill, prepare, trim and fork, until the kill.

    Parameters
    ----------
    fault : str
        What is armed.
    from_owner, to_owner : Connection
        Read and written now and then.
    clogged : Connection
        Nobody reads there before this process is dead.
    """
    no_core()
    point = fault.partition(":")[0]
    victim = Victim(fault, from_owner, to_owner, clogged)
    if point == "victim.copying":
        victim.die_in_a_copy()
    if point == "victim.piping":
        victim.die_in_the_pipe()
    acts = victim.acts()
    soonest = [at for at, act in enumerate(acts) if point in REACHED_BY.get(act.__name__, ())]
    first = (soonest or [0])[0]
    for _ in range(N_ROUNDS):
        for act in acts[first:] + acts[:first]:
            act()
            if point == "victim.exiting" and len(victim.held) > 1:
                util.Finalize(None, _faults.reach, args=(point,), exitpriority=50)
                return


#: What is reached sooner than by the acts in their order.
REACHED_BY = {
    "lease_new_rows": {"row.written", "row.numbered", "row.counted"},
    "prepare": {"arena.preallocated"},
    "send_on": {"receiving.sent_on"},
    "load": {"victim.loading"},
    "finalize": {"victim.finalizing"},
    "spill": {"block.spilled"},
    "trim": {"block.reserved", "block.emptied", "row.emptied"},
    "fork_and_go_on": {
        "birth.in_child",
        "birth.in_parent",
        "birth.prepared",
        "fork.after_in_child",
        "fork.after_in_parent",
        "fork.before",
        "fork.privatized",
        "participant.born",
        "privatize.step",
    },
    "broadcast": {
        "publish.committed",
        "publish.named",
        "reference.counted",
        "reference.named",
        "reference.uncounted",
        "reference.unnamed",
        "views.referred",
    },
    "share": {
        "shared_lock.counted",
        "shared_lock.ended",
        "shared_lock.entered",
        "shared_lock.given",
        "shared_lock.inherited",
        "shared_lock.taken",
        "view.shared",
    },
    "bury_a_child": {
        "participant.recovered",
        "participant.absorbed",
        "participant.reaped",
        "participant.summed",
    },
}


class Victim:
    """A participant, and its ends of the channels to the owner."""

    def __init__(self, fault, from_owner, to_owner, clogged):
        of_children = ("fork.after_in_child", "participant.born", "views.referred")
        self._of_children = fault if fault.startswith(of_children) else None
        self.arena = installed.current.arena
        self.from_owner, self.to_owner, self.clogged = from_owner, to_owner, clogged
        self.own_read, self.own_write = multiprocessing.Pipe(duplex=False)
        self.held, self.seed = [], 0

    def acts(self):
        return [
            self.talk_to_itself,
            self.send_small_parts,
            self.talk_to_the_owner,
            self.hold,
            self.finalize,
            self.load,
            self.prepare,
            self.copy_on_receive,
            self.send_on,
            self.spill,
            self.broadcast,
            self.fork_and_go_on,
            self.drop,
            self.lease_new_rows,
            self.bury_a_child,
            self.share,
            self.trim,
        ]

    def talk_to_itself(self):
        for size in SIZES:
            self.seed += 1
            self.own_write.send(message(self.seed, size))
            self.held.append(verify(self.own_read.recv(), self.seed))

    def send_small_parts(self):
        self.own_write.send([message(n, 3_000) for n in range(40)])
        for part in self.own_read.recv():
            verify(part)

    def talk_to_the_owner(self):
        self.to_owner.send(message(1000 + self.seed, 500_000))
        while self.from_owner.poll():
            self.held.append(verify(self.from_owner.recv()))

    def hold(self):
        for one in self.held:
            verify(one)
        if self.held:
            _faults.reach("victim.holding")

    def drop(self):
        self.held = self.held[-2:]

    def finalize(self):
        self.own_write.send(message(7, 200_000))
        Finalized(self.own_read.recv())
        gc.collect()

    def load(self):
        self.own_write.send(Loaded(message(8, 200_000)))
        verify(self.own_read.recv())

    def prepare(self):
        with contextlib.suppress(oobpickle.ArenaFullError):  # while somebody else trims
            self.arena.preallocate(nbytes=400_000, count=2)

    def trim(self):
        self.arena.trim()
        self.talk_to_itself()

    def copy_on_receive(self):
        options = self.arena.options
        self.arena.options = dataclasses.replace(options, copy_on_receive=True)
        self.own_write.send([message(9, 100_000), message(10, 200_000)])
        for part in self.own_read.recv():
            verify(part)
        self.arena.options = options

    def send_on(self):
        self.own_write.send(message(11, 200_000))
        self.own_write.send_bytes(self.own_read.recv_bytes())
        verify(self.own_read.recv(), 11)

    def spill(self):
        """Find no room in memory: what is held from then on, in forks too, is partly on disk."""
        hook, sending = installed.current, inner(self.arena).sending
        hook.destination, sending._in_memory = None, _no_room
        try:
            self.seed += 1
            self.own_write.send([message(self.seed, 300_000), message(self.seed, 100_000)])
        finally:
            del sending._in_memory
        self.held += [verify(part, self.seed) for part in self.own_read.recv()]

    def broadcast(self):
        self.seed += 1
        sent = self.seed, content(self.seed, 300_000)
        with contextlib.suppress(oobpickle.ArenaFullError):
            handle = store(sent, inner(self.arena), readonly=False)
            for _ in range(2):
                self.own_write.send([handle, handle])
                one, _ = self.own_read.recv()
                self.held.append(verify(one, sent[0]))
            self.to_owner.send(handle)
            with inside.faulty_children(self._of_children):
                pid = os.fork()
            if pid == 0:
                verify(handle.value)
                os._exit(0)
            self._follow(pid)

    def lease_new_rows(self):
        table, leases = Table.of(self.arena), []
        n_rows = table.n_rows
        while table.n_rows < n_rows + 4:
            leases.append(inner(self.arena).acquire([32 << 10]))
        for lease in leases:
            lease.release()

    def fork_and_go_on(self):
        self.talk_to_itself()
        with inside.faulty_children(self._of_children):
            pid = os.fork()
        if pid == 0:
            inner(self.arena).acquire([1000]).release()  # it joins
            os._exit(0)
        self._follow(pid)

    def bury_a_child(self):
        pid = os.fork()
        if pid == 0:
            self._take_and_die()
        self._follow(pid, signal.SIGKILL)
        inner(self.arena).reclaim.reap()

    def _take_and_die(self):
        for seed in range(3):
            self.own_write.send(message(seed, 200_000))
        self.held.append(verify(self.own_read.recv()))
        inner(self.arena).acquire([100_000, 2_000_000])
        os.kill(os.getpid(), signal.SIGKILL)

    def share(self):
        """Take the lock from a child that dies in the middle of a change."""
        with warnings.catch_warnings(), oobpickle.share(np.zeros(10)) as shared:
            warnings.simplefilter("ignore", oobpickle.LockOwnerDiedWarning)
            self.own_write.send(shared)
            arrived = self.own_read.recv()
            with inside.faulty_children(self._of_children):
                pid = os.fork()
            self._follow(pid or os._exit(0))  # it takes references of its own
            pid = os.fork()
            if pid == 0:
                turn = shared.writing()
                turn.__enter__()
                os.kill(os.getpid(), signal.SIGKILL)
            self._follow(pid, signal.SIGKILL)
            with arrived.writing() as array:
                array += 1
            with shared.reading() as array:
                assert (array == 1).all()

    def _follow(self, pid, expected=0):
        """Wait for a child; if it died of the armed signal, die of the same."""
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == -_faults._signal and expected == 0:
            os.kill(os.getpid(), -code)
        if code != -expected and code != -_faults._signal:
            raise AssertionError(f"a child ended with {code}")
        while self.own_read.poll():  # what it has sent
            for part in [self.own_read.recv()]:
                verify(part)

    # --- where the library has no code: someone else strikes while the first is in one call of C

    def die_in_a_copy(self):
        """The kill comes when the first bytes of a message are in place, and the last are not."""
        data = content(1, COPIED_NBYTES)
        first, last = data[_EARLY], data[_LATE]
        for part in (first, last):
            part ^= 0x55  # what no earlier copy can have left there
        self._be_struck_in_a_copy(first.tobytes(), last.tobytes())
        for _ in range(200):
            self.own_write.send(data)
            received = self.own_read.recv()
            received[_EARLY] = received[_LATE] = 0
            del received
            gc.collect()
        raise AssertionError("no copy was met in the middle")

    def _be_struck_in_a_copy(self, first, last):
        """Have a process watch the blocks: a thread would have to wait for the GIL until the copy
        is done. It is a child of C's fork, which is no participant."""
        table = Table.of(self.arena)
        data_file = mmap.mmap(
            inner(self.arena).descriptors[0], 1 << 32
        )  # blocks lie at its beginning
        me = os.getpid()
        if ctypes.CDLL(None).fork() != 0:
            return
        while os.getppid() == me:
            for index, state, _ in table.owned():
                if state != LEASED or table.rows["used"][index] != COPIED_NBYTES:
                    continue
                start = table.offset(index)
                view = memoryview(data_file)[start : start + COPIED_NBYTES]
                if view[_EARLY] == first and view[_LATE] != last:
                    self._strike(me)
                    os._exit(0)
        os._exit(0)  # it has failed, and says so

    def die_in_the_pipe(self):
        """The kill comes when one page of an envelope is in the pipe, and there is no more room."""
        fd = self.clogged.fileno()
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PAGE_NBYTES)
        # More than a page, and so little that it travels in the envelope.
        parts = [message(1, 300_000), bytes(6_000)]
        threading.Thread(target=self._strike_in_the_pipe, args=(fd,), daemon=True).start()
        self.clogged.send(parts)
        raise AssertionError("the envelope was not larger than the pipe")

    def _strike_in_the_pipe(self, fd):
        unread = array("i", [0])
        while unread[0] != _PAGE_NBYTES:
            fcntl.ioctl(fd, termios.FIONREAD, unread)
        self._strike(os.getpid())

    def _strike(self, pid):
        os.kill(pid, _faults._signal)


def _no_room(*_):
    raise oobpickle.ArenaFullError("said so", "full")


class Finalized:
    """A cycle that has an array when it is collected."""

    def __init__(self, received):
        self.received = received
        self.itself = self

    def __del__(self):
        verify(self.received)
        _faults.reach("victim.finalizing")


class Loaded:
    """An object in whose loading there is a fault point, after its array is there."""

    def __init__(self, one):
        self.one = one

    def __reduce__(self):
        return _load, (self.one,)


def _load(one):
    _faults.reach("victim.loading")
    return one
