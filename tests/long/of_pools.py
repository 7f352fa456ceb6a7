"""Pools that are terminated with unread results: ``of_pools.py N_ROUNDS WITHIN_S``.

Under one `install`, each round makes a ``Pool(2)``, has it make eight results of 1 MB that nobody
reads, and terminates it. Prints JSON: the most bytes that were in flight after a round, and what is
left in the end.
"""

import gc
import json
import multiprocessing
import sys
import time

import inside
from inside import Token, message

import oobpickle

N_RESULTS = 8
NBYTES = 1_000_000
CAPACITY = 1 << 30


def one_round(context, never, ready):
    # The workers are within a task when they are terminated: if one is about to return a result,
    # CPython's own Pool.terminate() can wait for ever for the lock that it died with.
    unread = context.SimpleQueue()
    with context.Pool(2, _begin, (unread, never, ready)) as pool:
        for half in range(2):
            pool.apply_async(_make, (half,))
        for _ in range(2):
            ready.take()


def _begin(*given):
    global _given
    _given = given


def _make(half):
    unread, never, ready = _given
    for seed in range(half, N_RESULTS, 2):
        unread.put(message(seed, NBYTES))
    ready.give()
    never.take()


def main(n_rounds, within_s):
    until = time.monotonic() + float(within_s)
    context = multiprocessing.get_context("fork")
    arena = oobpickle.install(capacity=CAPACITY)
    most, n_done, never, ready = 0, 0, Token(), Token()
    while n_done < int(n_rounds) and time.monotonic() < until:
        one_round(context, never, ready)
        gc.collect()  # pools are cycles; their pipes close with them
        most = max(most, arena.statistics().nbytes["in_flight"])
        n_done += 1
        inside.signal.alarm(inside.WATCHDOG_S)
    assert most <= 2 * N_RESULTS * NBYTES, most
    inside.assert_empty(arena)
    statistics = arena.statistics()
    assert statistics.n_fallbacks == 0, statistics
    oobpickle.uninstall()
    assert inside.our_descriptors() == []
    print(
        json.dumps(
            {
                "n_rounds": n_done,
                "most_nbytes_in_flight": most,
                "n_out_of_band": statistics.n_messages_out_of_band,
                "n_reclaimed": statistics.n_reclaimed,
                "nbytes_left": statistics.nbytes_resident,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
