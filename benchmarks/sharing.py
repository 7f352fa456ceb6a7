"""The lock of a shared object against `multiprocessing.Lock`: ratios of times, by turns.

What
    ``python benchmarks/sharing.py [--passes 9] [--check] [--json FILE]`` prints the time of
    `multiprocessing.Lock` over ours, for one turn that nobody waits for, and for 4 processes that
    want it all the time.

How it works
    ``lock`` is the lock itself, called in C; ``reading`` and ``writing`` are `Shared`'s, which give
    an array, or a dict of four. Each pass times both, by turns. Each turn of the 4 processes counts
    in one array, and the sum is compared.

Lifetime
    The processes end with the program.

When it cannot
    ``--check`` ends with 1 if a row is below what it should be.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import _figures
import numpy as np

import oobpickle

_N_TURNS = 20_000
_N_CONTENDED = 3_000
_N_PROCESSES = 4
#: What each row should reach, as the time of `multiprocessing.Lock` over ours.
_WANTED = {
    "lock": 0.8,
    "reading array": 0.4,
    "writing array": 0.2,
    "writing dict": 0.08,
    "4 x lock": 1.0,
    "4 x writing": 0.2,
}

Make = Callable[[], AbstractContextManager[Any]]


def _nothing(*_: object) -> None:
    return None


def _turns_s(make: Make) -> float:
    start = time.perf_counter()
    for _ in range(_N_TURNS):
        with make():
            pass
    return (time.perf_counter() - start) / _N_TURNS


def _serve(shared: Any, lock: Any, barrier: Any) -> None:
    array = shared.unlocked
    for make in _contenders(shared, lock):
        _count(make, array, barrier)


def _bare(shared: Any) -> Make:
    """Return what gives one turn of the lock itself."""
    core = shared._lock
    return lambda: core.holding(None, False, None, _nothing, None)


def _contenders(shared: Any, lock: Any) -> list[Make]:
    return 2 * [lambda: lock, _bare(shared), shared.writing]


def _count(make: Make, array: Any, barrier: Any) -> float:
    barrier.wait()
    start = time.perf_counter()
    for _ in range(_N_CONTENDED):
        with make():
            array[0] += 1
    barrier.wait()  # all have ended
    return time.perf_counter() - start


def _contended_s(shared: Any, lock: Any) -> list[list[float]]:
    """Return seconds for one turn of each, with all the processes; twice."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(_N_PROCESSES)
    others = [
        context.Process(target=_serve, args=(shared, lock, barrier))
        for _ in range(_N_PROCESSES - 1)
    ]
    for process in others:
        process.start()
    array, n = shared.unlocked, _N_PROCESSES * _N_CONTENDED
    array[0] = 0
    found = [_count(make, array, barrier) / n for make in _contenders(shared, lock)]
    for process in others:
        process.join()
    if array[0] != len(found) * n:
        raise RuntimeError(f"{array[0]} turns were counted, expected {len(found) * n}")
    return [found[:3], found[3:]]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--check", action="store_true")
    _figures.add_option(parser)
    options = parser.parse_args()
    lock = multiprocessing.Lock()
    pairs: dict[str, list[tuple[float, float]]] = {row: [] for row in _WANTED}
    with (
        oobpickle.enabled(),
        oobpickle.share(np.zeros(1000)) as array,
        oobpickle.share({name: np.zeros(1000) for name in "abcd"}) as several,
    ):
        rows: dict[str, Make] = {
            "lock": _bare(array),
            "reading array": array.reading,
            "writing array": array.writing,
            "writing dict": several.writing,
        }
        for n in range(options.passes + 1):
            for row, make in rows.items():
                pairs[row].append((_turns_s(lambda: lock), _turns_s(make)))
            if n % 3 == 0:
                for plain_s, bare_s, writing_s in _contended_s(array, lock):
                    pairs["4 x lock"].append((plain_s, bare_s))
                    pairs["4 x writing"].append((plain_s, writing_s))
    is_short, figures = False, {}
    for row, wanted in _WANTED.items():
        taken = pairs[row][1:]  # after a warm-up
        ratios = [plain / ours for plain, ours in taken]
        first, ratio, third = statistics.quantiles(ratios, n=4)
        is_short |= ratio < wanted
        plain_us, ours_us = (statistics.median(one) * 1e6 for one in zip(*taken, strict=True))
        figures[row] = {
            **_figures.quartiles("ratio", ratios),
            "lock_s": plain_us / 1e6,
            "ours_s": ours_us / 1e6,
        }
        print(
            f"{row:14} {ratio:6.2f}  ({first:.2f} to {third:.2f}, {wanted} wanted)  "
            f"Lock {plain_us:.2f} us, ours {ours_us:.2f} us"
        )
    _figures.write(options.json, figures)
    return int(options.check and is_short)


if __name__ == "__main__":
    sys.exit(main())
