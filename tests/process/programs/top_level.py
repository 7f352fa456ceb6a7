"""Installs at the top level of the main module, where spawned children come by on their start."""

import multiprocessing
import sys

import inside
from inside import message, verify

import oobpickle

arena = oobpickle.install(capacity=64 << 20)


def _echo(received):
    verify(received)[1][:] = 0
    return message(received[0] + 1), oobpickle.statistics().n_messages_out_of_band


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    if "preload" in sys.argv[2:]:
        context.set_forkserver_preload(["__main__", "top_level"])
    with context.Pool(2) as pool:
        for seed, (received, n_messages) in enumerate(pool.map(_echo, map(message, range(6)))):
            verify(received, seed + 1)
            assert n_messages > 0  # the arena of the worker is ours
        pool.close()
        pool.join()
    statistics = arena.statistics()
    assert statistics.n_fallbacks == 0, statistics
    assert statistics.n_messages_out_of_band >= 8, statistics
    inside.assert_table_in_order(arena)
    oobpickle.uninstall()
