"""Ctrl-C, garbage collection, finalizers and signal handlers, at any moment."""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import warnings
import weakref

import inside
from inside import content, eventually, fork, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._memory.reclaim import FOLLOWS

MIB = 1 << 20


def _pipe():
    return multiprocessing.Pipe(duplex=False)


def _storm(pid, number, stop_read, longest_s):
    """Send signal after signal at random moments until told to stop."""
    chance = random.Random(os.getpid())
    os.set_blocking(stop_read, False)
    while True:
        deadline = time.perf_counter() + chance.uniform(0, longest_s)
        while time.perf_counter() < deadline:
            pass
        with contextlib.suppress(BlockingIOError):
            os.read(stop_read, 1)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class _Weather:
    """A storm of interrupts around a block; each one is raised where it strikes."""

    def __init__(self, longest_s):
        self.n_struck = 0
        self._armed = False
        self._read, self._write = os.pipe()
        signal.signal(signal.SIGINT, self._strike)
        self._pid = fork(_storm, os.getpid(), signal.SIGINT, self._read, longest_s)

    def _strike(self, number, frame):
        # In a finalizer it would reach nobody: the interpreter prints it and goes on.
        if self._armed and frame.f_code.co_name != "__del__":
            self.n_struck += 1
            raise KeyboardInterrupt

    def expose(self, run, *args):
        """Run once, unprotected; tell whether it came through."""
        try:
            self._armed = True
            run(*args)
            self._armed = False
            return True
        except KeyboardInterrupt:
            self._armed = False
            return False

    def end(self):
        os.write(self._write, b"x")
        reap(self._pid)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _assert_sound(arena, live):
    """Nothing is leased or unread, what is held is what is alive, and messages flow."""
    gc.collect()
    arena.trim()
    statistics = arena.statistics()
    assert statistics.n_blocks["leased"] == 0, statistics
    # Read, and interrupted before it was loaded: kept, since the bytes may still be somewhere.
    unread = [block for block in inner(arena).blocks.unowned() if not block[2] & FOLLOWS]
    assert not unread, (unread, statistics)
    assert statistics.nbytes["held"] == sum(one[1].nbytes for one in live), statistics
    for one in live:
        verify(one)
    inside.assert_table_in_order(arena)
    n = statistics.n_messages_out_of_band
    read, write = _pipe()
    for seed in range(5):
        write.send(message(seed))
        verify(read.recv(), seed)
    assert arena.statistics().n_messages_out_of_band == n + 5


def storm_over_sending_and_receiving():
    # A file that is read in a with statement can be interrupted before that closes it.
    warnings.simplefilter("ignore", ResourceWarning)
    arena = oobpickle.install(capacity=96 * MIB)
    kept, ends, n_rounds = [], [], 0
    messages = [message(seed, 70_000 + 300_000 * seed) for seed in range(4)]

    def round():
        nonlocal kept
        # An interrupt in the middle of a message leaves a pipe unusable, as ever: take new ones.
        read, write = _pipe()
        ends.append((read, write))
        for n, one in enumerate(messages):
            write.send(one)
            kept = [*kept[-5:], verify(read.recv(), n)]
        write.send(messages)
        kept = [*kept[-4:], *read.recv()]

    round()
    start = time.perf_counter()
    round()
    # However fast the machine is, about half of the rounds come through.
    weather = _Weather(longest_s=2 * (time.perf_counter() - start))
    while weather.n_struck < 200 * inside.REPEATS:
        n_rounds += weather.expose(round)
        while len(ends) > 4:
            for end in ends.pop(0):
                end.close()
    weather.end()
    assert n_rounds > 0
    for pair in ends:
        for end in pair:
            end.close()
    kept = [one for one in kept if one[1].nbytes < 500_000]
    _assert_sound(arena, kept)


def partner_of_an_interrupted_sender():
    """Whatever arrives at the other side is whole and can be loaded; nothing arrives twice."""
    arena = oobpickle.install(capacity=96 * MIB)
    read, write = _pipe()
    report_read, report = _pipe()

    def partner():
        write.close()
        seeds = []
        with contextlib.suppress(EOFError):
            while True:
                seeds.append(verify(read.recv())[0])
        assert len(set(seeds)) == len(seeds)
        report.send(set(seeds))

    pid = fork(partner)
    read.close()
    report.close()
    weather = _Weather(longest_s=0.002)
    sent, attempted = set(), 0
    while weather.n_struck < 200 * inside.REPEATS:
        if weather.expose(write.send, message(attempted, 200_000)):
            sent.add(attempted)
        attempted += 1
    weather.end()
    write.close()
    arrived = report_read.recv()
    assert sent <= arrived <= set(range(attempted)), sent - arrived
    reap(pid)
    assert arena.statistics().n_fallbacks == 0, arena.statistics()
    _assert_sound(arena, [])


def storm_over_large_copies():
    """A copy of many megabytes ends before the interrupt is seen."""
    warnings.simplefilter("ignore", ResourceWarning)  # as above
    arena = oobpickle.install(capacity=512 * MIB)
    kept, ends, seeds = [], [], itertools.count()

    def round():
        read, write = _pipe()
        ends.extend((read, write))
        for seed in itertools.islice(seeds, 3):
            write.send(message(seed, 40 * MIB))
            kept.append(verify(read.recv(), seed))

    round()
    start = time.perf_counter()
    round()
    weather = _Weather(longest_s=time.perf_counter() - start)
    while weather.n_struck < 10 * inside.REPEATS:
        weather.expose(round)
        while kept:
            verify(kept.pop())
        while ends:
            ends.pop().close()
    weather.end()
    _assert_sound(arena, [])


def _let_late_interrupts_come():
    """What a fork hook swallowed is delivered a few milliseconds later."""
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        with contextlib.suppress(KeyboardInterrupt, AssertionError):
            eventually(lambda: time.monotonic() >= deadline, within_s=0.3)


def storm_over_forks():
    warnings.simplefilter("ignore", ResourceWarning)  # as above
    arena = oobpickle.install(capacity=96 * MIB)
    read, write = _pipe()
    kept = []
    for seed in range(4):
        write.send(message(seed))
        kept.append(verify(read.recv(), seed))
    weather = _Weather(longest_s=0.003)
    children, n_forks, n_refreshed = [], 0, 0

    def child():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for one in kept:
            verify(one)
            one[1][:] = 1

    def forks():
        nonlocal n_forks
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child()
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
        n_forks += 1

    while weather.n_struck < 35 * inside.REPEATS:
        weather.expose(forks)
        for one in kept:
            verify(one)
        if n_forks % 4 == 0:
            kept.pop(0)
            write.send(message(100 + n_refreshed))
            kept.append(verify(read.recv()))
            n_refreshed += 1
    weather.end()
    _let_late_interrupts_come()
    while True:
        try:
            _, status = os.wait()
        except ChildProcessError:
            break
        assert status == 0 or os.waitstatus_to_exitcode(status) == 1, status
    read.close()
    write.close()
    _assert_sound(arena, kept)


def _fork_with_a_pending_interrupt(arena):
    """Fork with a SIGINT that comes at a chosen moment; see that nothing is wrong after it."""
    read, write = _pipe()
    write.send(message(1))
    held = verify(read.recv(), 1)
    written, seen = os.pipe()
    in_parent = os.getpid()
    interrupted = False
    try:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                assert os.read(written, 1) == b"x"
                verify(held, 1)
                held[1][:] = 3
                status = 0
            finally:
                os._exit(status)
        eventually(lambda: False, within_s=5)  # the interrupt comes, if late
    except KeyboardInterrupt:
        interrupted = True
    except AssertionError:
        pass
    if os.getpid() != in_parent:
        os._exit(2)
    held[1][:] = 2
    os.write(seen, b"x")
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 0, "the child saw another value"
    assert (held[1] == 2).all(), "the parent saw the child's writes"
    assert interrupted, "Ctrl-C was swallowed"
    write.send(message(2))
    verify(read.recv(), 2)
    held[1][:] = content(1, held[1].nbytes)
    _assert_sound(arena, [held])
    assert not arena.statistics().fallbacks, arena.statistics()


def _interrupt_once():
    """Return a callable all in C, so that the signal is handled by what comes after it."""
    kill = ctypes.PyDLL(None).kill
    once = iter([signal.SIGINT])
    return functools.partial(next, map(kill, itertools.repeat(os.getpid()), once), None)


def ctrl_c_while_the_fork_runs():
    os.register_at_fork(before=_interrupt_once())  # registered first: runs last before fork(2)
    _fork_with_a_pending_interrupt(oobpickle.install(capacity=64 * MIB))


def ctrl_c_just_before_the_fork():
    arena = oobpickle.install(capacity=64 * MIB)
    os.register_at_fork(before=_interrupt_once())  # registered last: runs before oobpickle's
    _fork_with_a_pending_interrupt(arena)


# --- garbage


def what_a_feeder_has_sent_is_not_kept():
    """The object dies as soon as its message has left, and the block under it comes back."""
    arena = oobpickle.install(capacity=64 * MIB)
    queue = multiprocessing.Queue()
    gc.disable()
    for seed in range(3):
        queue.put(message(seed))
        received = verify(queue.get(), seed)
        echo = inside.Fitted(seed, 800_000)
        echo.received = received
        is_alive = weakref.ref(echo)
        queue.put(echo)
        del echo, received
        verify(queue.get().received, seed)
        eventually(lambda: is_alive() is None)  # noqa: B023
        inner(arena).blocks.reap()
        assert arena.statistics().n_blocks["held"] == 0, arena.statistics()


class _Cycle:
    """Garbage that only the collector finds, and that reads its array as it dies."""

    n_dead = 0

    def __init__(self, received):
        self.received = received
        self.itself = self

    def __del__(self):
        verify(self.received)
        _Cycle.n_dead += 1


def cycles_with_arrays_are_collected_everywhere():
    arena = oobpickle.install(capacity=64 * MIB)
    gc.set_threshold(1, 1, 1)  # a collection may come with every allocation, in acquire too
    read, write = _pipe()
    for seed in range(150):
        write.send(message(seed, 100_000))
        _Cycle(verify(read.recv(), seed))
        write.send([message(n, 2_000) for n in range(40)])
        list(map(_Cycle, read.recv()))
    gc.set_threshold(700, 10, 10)
    gc.collect()
    assert _Cycle.n_dead == 150 * 41
    assert arena.statistics().n_fallbacks == 0
    _assert_sound(arena, [])


def finalizers_at_interpreter_shutdown():
    """Modules are being taken apart. As long as pickling works at all, they can send, too."""
    global _left
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    write.send([message(seed, 100_000) for seed in range(3)])
    arrays = read.recv()

    class Last:
        # What it needs is its own: the module's names may be gone.
        def __init__(self, array, expected, ends, arena):
            self.array, self.expected, self.ends, self.arena = array, expected, ends, arena
            self.say, self.modules, self.itself = os.write, sys, self

        def __del__(self):
            assert self.array.tobytes() == self.expected
            if self.modules.meta_path is not None:
                read, write = self.ends
                write.send(self.array)
                assert read.recv().tobytes() == self.expected
            del self.array
            inner(self.arena).blocks.reap()
            self.say(1, b"dead\n")

    wanted = [content(seed, 100_000).tobytes() for seed in range(3)]
    lasts = [Last(one[1], wanted[one[0]], (read, write), arena) for one in arrays]
    atexit.register(lasts.pop)  # one dies in an exit function, the others when modules are cleared
    _left = lasts


class _Sender:
    """Garbage that sends a message as it dies, as a manager's proxy does."""

    read = write = None
    n_sent = 0

    def __init__(self, received):
        self.received = received
        self.itself = self

    def __del__(self):
        _Sender.write.send(self.received)
        verify(_Sender.read.recv(), self.received[0])
        _Sender.n_sent += 1


def finalizers_that_send(threshold):
    arena = oobpickle.install(capacity=64 * MIB, threshold=int(threshold))
    _Sender.read, _Sender.write = _pipe()
    gc.set_threshold(1, 1, 1)
    read, write = _pipe()
    for seed in range(200):
        write.send(message(seed, 70_000 if int(threshold) else 2_000))
        _Sender(verify(read.recv(), seed))
    gc.set_threshold(700, 10, 10)
    gc.collect()
    assert _Sender.n_sent == 200
    # Below a step of the same thread a message travels in-band; nothing else may be the reason.
    assert set(arena.statistics().fallbacks) <= {"busy"}, arena.statistics()
    gc.collect()
    arena.trim()
    assert arena.statistics().n_blocks["held"] == 0
    inside.assert_table_in_order(arena)


def signal_handlers_that_send():
    arena = oobpickle.install(capacity=64 * MIB)
    handler_read, handler_write = _pipe()
    # What has to travel in-band must fit: nobody else empties this pipe.
    fcntl.fcntl(handler_write.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
    n_handled, handling = 0, False

    def handle(number, frame):
        nonlocal n_handled, handling
        if handling:
            return
        handling = True
        handler_write.send(message(n_handled, 100_000))
        verify(handler_read.recv(), n_handled)
        n_handled += 1
        handling = False

    signal.signal(signal.SIGUSR2, handle)
    stop_read, stop = os.pipe()
    storm = fork(_storm, os.getpid(), signal.SIGUSR2, stop_read, 0.003)
    read, write = _pipe()
    kept, seed = [], 0
    while n_handled < 300:
        write.send(message(seed, 100_000))
        kept = [*kept[-3:], verify(read.recv(), seed)]
        seed += 1
    os.write(stop, b"x")
    reap(storm)
    # A handler that comes in the middle of a step sends in-band; the other sender never does.
    assert set(arena.statistics().fallbacks) <= {"busy"}, arena.statistics()
    assert arena.statistics().n_messages_out_of_band >= seed
    _assert_sound(arena, kept)


def arrays_that_die_in_other_threads():
    sys.setswitchinterval(1e-5)
    arena = oobpickle.install(capacity=64 * MIB)
    shelf, stop = [], threading.Event()

    def drop():
        while not stop.is_set():
            with contextlib.suppress(IndexError):
                verify(shelf.pop())

    threads = [threading.Thread(target=drop) for _ in range(2)]
    for thread in threads:
        thread.start()
    read, write = _pipe()
    for seed in range(300):
        write.send([message(seed, 70_000), message(seed + 1, 1_200_000)])
        shelf.extend(read.recv())
    eventually(lambda: not shelf)
    stop.set()
    for thread in threads:
        thread.join()
    assert arena.statistics().n_fallbacks == 0
    _assert_sound(arena, [])


if __name__ == "__main__":
    inside.main()
