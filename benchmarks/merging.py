"""Merging results where they are made, against ``functools.reduce``: ratios of times, by turns.

What
    ``python benchmarks/merging.py [--passes 7] [--quick] [--check] [--json FILE]`` prints the time
    of ``reduce(operator.iadd, pool.imap_unordered(...))``, with oobpickle and plainly, over that of
    ``oobpickle.merge(pool, ..., op=operator.iadd)``: for 16 models of 64 MB, and for 16
    ``collections.Counter`` of a million keys, with two workers.

How it works
    By turns, each time in processes of their own: once, as a program does it that does it once, and
    again with the memory that is there by then. Medians with quartiles. For the models also what
    the ratio would be if nothing waited for anything: every step is timed by itself, and the times
    are added up, with as many copies into fresh memory as ``reduce`` was seen to make.

Lifetime
    Each process ends when it has printed its times.

When it cannot
    ``--check`` ends with 1 if a row is below what it should be.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import mmap
import multiprocessing
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import _figures
import numpy as np

import oobpickle

_N_MODELS = 16
_N_WORKERS = 2
_N_FLOATS = 8_000_000
_N_KEYS = 1_000_000
_N_KEYS_QUICK = 100_000
_SIDES = ("merge", "reduce", "reduce-plain")
#: What each row should reach, as the time of the others over ours.
_WANTED = {
    ("models-16x64M", "once", "reduce"): 2.0,
    ("models-16x64M", "once", "reduce-plain"): 8.0,
    ("models-16x64M", "again", "reduce"): 1.0,
    ("models-16x64M", "again", "reduce-plain"): 8.0,
    ("counters-16x1M", "once", "reduce"): 1.0,
    ("counters-16x1M", "once", "reduce-plain"): 1.0,
}


def _fit(seed: int) -> Any:
    return np.full(_N_FLOATS, float(seed))


def _count(n_keys: int, seed: int) -> collections.Counter[int]:
    return collections.Counter(range(seed * n_keys // 10, seed * n_keys // 10 + n_keys))


def _run(side: str, row: str, n_keys: int) -> None:
    count = functools.partial(_count, n_keys)
    make: Callable[[int], Any] = _fit if row.startswith("models") else count
    block = contextlib.nullcontext() if side == "reduce-plain" else oobpickle.enabled()
    with block as arena, multiprocessing.Pool(_N_WORKERS) as pool:
        pool.map(abs, range(2 * _N_WORKERS))
        for _ in ("once", "again"):
            start = time.perf_counter()
            if side == "merge":
                total = oobpickle.merge(pool, make, range(_N_MODELS), op=operator.iadd)
            else:
                results = pool.imap_unordered(make, range(_N_MODELS))
                total = functools.reduce(operator.iadd, results)
            used = sum(arena.statistics().nbytes.values()) if arena else 0
            print(time.perf_counter() - start, used // (8 * _N_FLOATS), flush=True)
            assert float(total[0]) == (1 if isinstance(total, dict) else sum(range(_N_MODELS)))
            del total


def _time_parts() -> None:
    """Print the seconds to make a model, to add it to another, and to copy it."""

    def timed(step: Callable[..., object], *arguments: object) -> float:
        start = time.perf_counter()
        step(*arguments)
        return time.perf_counter() - start

    total = _fit(0)
    makes = [timed(_fit, 1) for _ in range(7)]
    model = _fit(1)
    adds = [timed(operator.iadd, total, model) for _ in range(7)]
    fd = os.memfd_create("model")
    os.ftruncate(fd, model.nbytes)
    with mmap.mmap(fd, model.nbytes) as memory:
        shared = np.frombuffer(memory)
        fresh, *warm = [timed(np.copyto, shared, model) for _ in range(8)]
        del shared
    os.close(fd)
    print(*map(statistics.median, (makes, adds)), fresh, statistics.median(warm))


def _limits(parts: list[float], n_fresh: float) -> dict[str, float]:
    """Return the time of ``reduce`` over that of ``merge`` if nobody ever waits."""
    make, add, fresh, warm = parts
    both = _N_MODELS * make + (_N_MODELS - 1) * add
    return {
        "once": (both + n_fresh * fresh + (_N_MODELS - n_fresh) * warm)
        / (both + _N_WORKERS * fresh),
        "again": (both + _N_MODELS * warm) / (both + _N_WORKERS * warm),
    }


def _printed_by(*arguments: str) -> list[float]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split()]


def _times_s(side: str, row: str, n_keys: int) -> dict[str, float]:
    once, n_fresh, again, _ = _printed_by("--run", side, row, str(n_keys))
    return {"once": once, "again": again, "n_fresh": n_fresh}


def _measure(row: str, n_passes: int, n_keys: int) -> dict[str, list[dict[str, float]]]:
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in (*_SIDES, "limit")}
    for n in range(n_passes):
        for side in _SIDES if n % 2 else _SIDES[::-1]:
            taken[side].append(_times_s(side, row, n_keys))
        if row.startswith("models"):
            taken["limit"].append(_limits(_printed_by("--parts"), taken["reduce"][-1]["n_fresh"]))
    return taken


Figures = dict[str, float]


def _print(row: str, when: str, other: str, taken: dict[str, list[dict[str, float]]]) -> Figures:
    pairs = zip(taken[other], taken["merge"], strict=True)
    ratios = [theirs[when] / ours[when] for theirs, ours in pairs]
    ratio = statistics.median(ratios)
    first, _, third = statistics.quantiles(ratios, n=4)
    ours_s = statistics.median(one[when] for one in taken["merge"])
    limit, found = "", {**_figures.quartiles("ratio", ratios), "ours_s": ours_s}
    if taken["limit"] and other == "reduce":
        n_fresh = statistics.median(one["n_fresh"] for one in taken["reduce"])
        most = statistics.median(one[when] for one in taken["limit"])
        found["most"] = most
        limit = f", an estimate of {most:.2f} if nobody waits, with {n_fresh:.0f} blocks of reduce"
    print(
        f"{row:15} {when:5}  over {other:12} {ratio:6.2f}  ({first:.2f} to {third:.2f}, "
        f"{_WANTED[row, when, other]} wanted{limit})  merge {ours_s * 1e3:.0f} ms",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="counters of a tenth of the keys")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--run", nargs=3, metavar=("SIDE", "ROW", "KEYS"), help="one process")
    _figures.add_option(parser)
    parser.add_argument("--parts", action="store_true", help="each step by itself")
    options = parser.parse_args()
    if options.parts:
        _time_parts()
        return 0
    if options.run:
        side, row, n_keys = options.run
        _run(side, row, int(n_keys))
        return 0
    figures: dict[str, Figures] = {}
    is_short = False
    for row in dict.fromkeys(row for row, _, _ in _WANTED):
        n_keys = _N_KEYS_QUICK if options.quick else _N_KEYS
        taken = _measure(row, max(options.passes, 2), n_keys)
        for (of, when, other), wanted in _WANTED.items():
            if of == row:
                found = _print(row, when, other, taken)
                figures[f"{row} {when} over {other}"] = found
                is_short |= found["ratio"] < wanted
    _figures.write(options.json, figures)
    return int(options.check and is_short)


if __name__ == "__main__":
    sys.exit(main())
