"""Signal handlers of the program that raise, fork and send, wherever they strike."""

import contextlib
import gc
import linecache
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings

import inside
import numpy as np
from inside import content, message, reap, verify

import oobpickle
from internals import inner
from oobpickle import _faults
from oobpickle._hook import installed
from oobpickle._hook.replacements import of_standard_library

MIB = 1 << 20
LIBRARY = os.path.dirname(oobpickle.__file__)
#: Between the last statement of a `try` and the first of its `finally` no signal is delivered; and
#: after a call that opens something nothing can be done before it is stored.
UNREACHABLE = set[tuple[str, str]]()


def _pipe():
    return multiprocessing.Pipe(duplex=False)


class _Deadline(TimeoutError):
    """What alarms raise: an OSError, which must not be taken for one of a system call."""


@contextlib.contextmanager
def _handler(handle):
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _strike(*_):
    raise _Deadline


@contextlib.contextmanager
def _signal_at(point, hit=1):
    """Send this process a SIGUSR1 when it reaches a fault point for the `hit`-th time."""
    _faults.arm(f"{point}:{hit}:USR1")
    try:
        yield
    finally:
        _faults.arm(None)


# --- handlers that raise


def an_alarm_ends_the_wait_for_room():
    with (
        oobpickle.enabled(capacity=16 * MIB, wait_timeout=60, copy_on_receive=False) as arena,
        _handler(_strike),
    ):
        read, write = _pipe()
        write.send(message(1, 12 * MIB))
        held = verify(read.recv(), 1)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        try:
            write.send(message(2, 8 * MIB))
            raise AssertionError("sent")
        except _Deadline:
            pass
        verify(held, 1)
        assert arena.statistics().n_fallbacks == 0
        assert arena.statistics().n_blocks["leased"] == 0
        del held
        write.send(message(3, 8 * MIB))
        verify(read.recv(), 3)


def an_alarm_within_the_turning_of_held_blocks_into_ordinary_memory():
    """Between its steps of 64 MiB: what was copied already must not be mapped anew."""
    for hit in (1, 2, 3):
        with oobpickle.enabled(capacity=512 * MIB) as arena, _handler(_strike):
            read, write = _pipe()
            write.send(message(1, 160 * MIB))
            held = verify(read.recv(), 1)
            with _signal_at("privatize.step", hit), contextlib.suppress(_Deadline):
                inside.fork(verify, held, 1)
                raise AssertionError("the handler did not run")
            verify(held, 1)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
            assert arena.statistics().n_shared_after_fork == 0
            del held


def _is_bare_try(frame):
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() == "try:"


class _Tracer:
    """Raises a `_Deadline` at the `strike_at`-th line of the library that is run."""

    def __init__(self, strike_at):
        self.n_lines = 0
        self.where = None
        self._strike_at = strike_at

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        # CPython 3.11 reports the line of a bare `try` too, but delivers no signal there.
        if event == "line" and not _is_bare_try(frame):
            self.n_lines += 1
            if self.n_lines == self._strike_at:
                self.where = os.path.basename(frame.f_code.co_filename), frame.f_code.co_name
                raise _Deadline
        return self


def _objects():
    """Return what oobpickle replaces."""
    return [getattr(owner, name) for owner, name, _ in of_standard_library()]


def _descriptors():
    return set(os.listdir("/proc/self/fd"))


def _at_lines(run, n_places=36 * inside.REPEATS):
    """Run it in a child each, with an exception at places all over; return where sth. was left."""
    n_lines = int(_in_child(_n_lines, run))
    places = np.unique(np.linspace(1, n_lines, n_places).astype(int)).tolist()
    left = [_in_child(_left_behind, run, place) for place in places]
    assert len(left) >= n_places // 2
    return [one for one in left if one]


def _in_child(call, *args):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = "failed"
        try:
            answer = str(call(*args))
        except BaseException:
            answer = traceback.format_exc()
        finally:
            os.write(write, answer.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        answer = file.read()
    reap(pid)
    return answer


def _n_lines(run):
    tracer = _Tracer(0)
    run(tracer)
    return tracer.n_lines


def _left_behind(run, strike_at):
    # A file that is read in a with statement can be interrupted before that closes it.
    warnings.simplefilter("ignore", ResourceWarning)
    before, descriptors = _objects(), _descriptors()
    tracer = _Tracer(strike_at)
    with contextlib.suppress(_Deadline):
        run(tracer)
    if tracer.where is None:
        return ""  # other processes of the machine make it longer or shorter
    gc.collect()
    with oobpickle.enabled():
        pass
    gc.collect()
    clean = before == _objects() and installed.current is None
    clean = clean and len(_descriptors()) <= len(descriptors)
    return "" if clean or tracer.where in UNREACHABLE else (strike_at, tracer.where)


def entering_a_block_is_interrupted_at_any_line():
    def run(trace):
        try:
            sys.settrace(trace)
            with oobpickle.enabled():
                sys.settrace(None)
        finally:
            sys.settrace(None)

    left = _at_lines(run)
    assert not left, left


def leaving_a_block_is_interrupted_at_any_line():
    def run(trace):
        try:
            with oobpickle.enabled():
                read, write = _pipe()
                write.send(message(1))
                verify(read.recv(), 1)
                read.close()
                write.close()
                sys.settrace(trace)
        finally:
            sys.settrace(None)

    left = _at_lines(run)
    assert not left, left


def memory_is_given_back_though_leaving_is_interrupted():
    with _handler(_strike), contextlib.suppress(_Deadline), oobpickle.enabled() as arena:
        read, write = _pipe()
        for seed in range(3):
            write.send(message(seed, (seed + 1) * 3_000_000))
            verify(read.recv(), seed)
        _faults.arm("block.emptied:2:USR1")
    _faults.arm(None)
    assert installed.current is None
    statistics = arena.statistics()
    assert statistics.nbytes["free"] == statistics.nbytes_resident == 0, statistics
    assert statistics.n_blocks["leased"] == 0, statistics


def a_handler_runs_after_the_copy():
    """Not in the middle of it, where it could change what is copied, or let the memory go."""
    n_calls = 0

    def interrupt(*_):
        nonlocal n_calls
        n_calls += 1
        raise _Deadline

    with oobpickle.enabled(capacity=512 * MIB) as arena, _handler(interrupt):
        read, write = _pipe()
        write.send(np.full(64 * MIB, 7, np.uint8))  # warm
        read.recv()
        threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with contextlib.suppress(_Deadline):
            while True:
                write.send(np.full(64 * MIB, 9, np.uint8))
                assert (read.recv() == 9).all()
        assert n_calls == 1
        read, write = _pipe()
        write.send(np.full(64 * MIB, 9, np.uint8))
        received = read.recv()
        assert (received == 9).all()
        del received
        gc.collect()
        arena.trim()
        assert arena.statistics().n_blocks["leased"] == 0


# --- handlers that collect garbage


class _Cycle:
    """Garbage that reads its array as it dies, and then sends it."""

    ends = None
    n_dead = 0

    def __init__(self, received):
        self.received = received
        self.itself = self

    def __del__(self):
        verify(self.received)
        read, write = _Cycle.ends
        write.send(self.received[1][:1000])
        assert (read.recv() == content(self.received[0], 1000)).all()
        _Cycle.n_dead += 1


def a_handler_collects_arrays_within_a_step():
    """Wherever it strikes, in a step of the table or in the copy, they are released once."""
    points = (
        "lock.taken", "lease.committed", "release.committed", "release.pushed",
        "claim.committed", "block.reserved", "lease.sealed", "drain.taken", "lock.clean",
    )  # fmt: skip
    _Cycle.ends = _pipe()
    warnings.simplefilter("ignore", oobpickle.FallbackWarning)
    n_collected = 0

    def collect(*_):
        nonlocal n_collected
        n_collected += 1
        gc.collect()

    for point in points:
        with oobpickle.enabled(capacity=64 * MIB, threshold=100) as arena, _handler(collect):
            read, write = _pipe()
            gc.disable()
            for seed in range(5):
                write.send(message(seed, 100_000 + 50_000 * seed))
                _Cycle(verify(read.recv(), seed))
            with _signal_at(point):
                write.send(message(7, 700_000))
                kept = verify(read.recv(), 7)
                del kept
                inner(arena).blocks.reap()
            gc.enable()
            gc.collect()
            arena.trim()
            assert arena.statistics().n_blocks["held"] == 0, (point, arena.statistics())
            assert arena.statistics().n_blocks["leased"] == 0, (point, arena.statistics())
            # In the middle of a step of the same thread a message travels in-band.
            assert set(arena.statistics().fallbacks) <= {"busy"}, (point, arena.statistics())
            inside.assert_table_in_order(arena)
    assert n_collected == len(points)
    assert _Cycle.n_dead == 5 * len(points)


# --- handlers that fork


def _fork_and_wait(*_):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def a_handler_forks_within_a_step():
    for point in ("claim.committed", "lease.committed", "release.committed"):
        with oobpickle.enabled(capacity=64 * MIB) as arena, _handler(_fork_and_wait):
            read, write = _pipe()
            for seed in range(3):
                write.send(message(seed))
                verify(read.recv(), seed)
            write.send(message(7))
            held = verify(read.recv(), 7)
            write.send(message(8))
            with _signal_at(point):
                mine = read.recv()
                inner(arena).blocks.reap()
                write.send(message(9))
            write.send(message(10))
            kept = [read.recv(), read.recv()]
            verify(held, 7)
            verify(mine, 8)
            verify(kept[0], 9)
            verify(kept[1], 10)
            inside.assert_table_in_order(arena)
            del kept, mine, held


def a_child_that_was_forked_within_a_step_changes_nothing_here():
    """It goes on with the step when the handler returns; and then it sends, in-band."""
    report, answer = _pipe()
    pid = 0

    def fork_and_go_on(*_):
        nonlocal pid
        pid = os.fork()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with oobpickle.enabled(capacity=64 * MIB) as arena, _handler(fork_and_go_on):
            read, write = _pipe()
            write.send(message(1))
            with _signal_at("claim.committed"):
                held = read.recv()
            if pid == 0:
                status = 1
                try:
                    answer.send(message(2, 100_000))
                    status = 0
                finally:
                    os._exit(status)
            verify(report.recv(), 2)
            reap(pid)
            verify(held, 1)
            for seed in range(3):
                write.send(message(seed))
                verify(read.recv(), seed)
            verify(held, 1)
            inside.assert_table_in_order(arena)
            del held


def a_handler_forks_below_the_hooks_of_a_fork():
    """What another thread receives until the outer fork is over is a copy."""
    go, received, held = threading.Event(), threading.Event(), []

    def before():  # registered first: runs last before fork(2)
        if not go.is_set():
            go.set()
            os.kill(os.getpid(), signal.SIGUSR1)
            received.wait(1)

    os.register_at_fork(before=before)
    with oobpickle.enabled(capacity=64 * MIB) as arena, _handler(_fork_and_wait):
        read, write = _pipe()
        write.send(message(1))

        def receive():
            assert go.wait(20)
            held.append(read.recv())
            received.set()

        thread = threading.Thread(target=receive)
        thread.start()
        written, seen = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert os.read(written, 1) == b"x"
                for one in held:
                    verify(one, 1)
                status = 0
            finally:
                os._exit(status)
        thread.join(20)
        held[0][1][:] = 2
        os.write(seen, b"x")
        reap(pid)
        held[0][1][:] = content(1, held[0][1].nbytes)
        write.send(message(2))
        verify(read.recv(), 2)
        inside.assert_table_in_order(arena)
        del held[:]


if __name__ == "__main__":
    inside.main()
