"""Large messages on a machine with an idle core: two threads copy, and one of them is gone then."""

import multiprocessing
import os
import signal

import inside
import numpy as np
from inside import reap

import oobpickle


def _n_threads():
    """Return what Python asks before it warns of a fork."""
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[17])


def a_fork_after_each_message_is_one_of_a_process_with_one_thread():
    """Run with warnings as errors: CPython 3.12 and newer warn of others."""
    array = np.zeros(48_000_000, "u1")
    with oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        for _ in range(100):
            write.send(array)
            assert (_n_threads(), len(os.listdir("/proc/self/task"))) == (1, 1)
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            reap(pid)
            read.recv()
        assert arena.statistics().n_messages_out_of_band == 100


def what_a_signal_handler_changes_arrives_as_it_was_at_one_moment():
    """No bytecode runs in between, where a handler could."""
    array = np.zeros(48_000_000, "u1")
    turn = 0

    def change(*_):
        nonlocal turn
        turn += 1
        array[:] = turn % 100
        signal.setitimer(signal.ITIMER_REAL, 0.004)

    with oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        signal.signal(signal.SIGALRM, change)  # instead of the watchdog's, for a moment
        signal.setitimer(signal.ITIMER_REAL, 0.004)
        for _ in range(30):
            write.send(array)
            received = read.recv()
            assert (received == received[0]).all()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(inside.WATCHDOG_S)
        assert turn > 0
        assert arena.statistics().n_messages_out_of_band == 30


if __name__ == "__main__":
    inside.main()
