"""A dead process that held 1,000 blocks: ``of_a_thousand.py N_ROUNDS``.

Each round a process receives 1,000 messages, holds them, which fills the arena, and is killed. Then
the next message that needs room is sent, and what `Arena.acquire` took for it is the time: it finds
the dead one and all of its blocks. No thread is started meanwhile. Prints JSON.
"""

import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time

import inside
from inside import Token, fork, message, reap, verify

import oobpickle
from internals import inner

N_BLOCKS = 1_000
NBYTES = 128 << 10
LONGEST_S = 0.050


def one_round(arena):
    """Return how long the next acquire took after the death of a process, in seconds."""
    read, write = multiprocessing.Pipe(duplex=False)
    full = Token()

    def hold():
        write.close()
        held = [verify(read.recv()) for _ in range(N_BLOCKS)]
        full.give()
        while held:
            signal.pause()

    pid = fork(hold)
    for seed in range(N_BLOCKS):
        write.send(message(seed % 50, NBYTES))
    full.take()
    assert arena.statistics().n_blocks["held"] == N_BLOCKS
    os.kill(pid, signal.SIGKILL)
    reap(pid, inside.KILLED)
    for fd in full.descriptors:
        os.close(fd)
    n_threads = threading.active_count()
    start_s = time.perf_counter()
    lease = inner(arena).acquire([NBYTES])
    elapsed_s = time.perf_counter() - start_s
    assert arena.statistics().n_blocks["held"] == 0
    assert threading.active_count() == n_threads
    lease.release()
    return elapsed_s


def main(n_rounds):
    arena = oobpickle.install(capacity=N_BLOCKS * NBYTES, copy_on_receive=False)
    times_s = [one_round(arena) for _ in range(int(n_rounds))]
    inside.assert_empty(arena)
    oobpickle.uninstall()
    figures = {
        "n_rounds": len(times_s),
        "median_ms": round(1e3 * statistics.median(times_s), 2),
        "longest_ms": round(1e3 * max(times_s), 2),
    }
    print(json.dumps(figures))
    assert max(times_s) < LONGEST_S, figures


if __name__ == "__main__":
    main(*sys.argv[1:])
