"""One object for many readers: `oobpickle.broadcast` beside plain multiprocessing and Ray.

What
    ``python benchmarks/broadcasting.py [--nbytes 1e9] [--passes 7] [--check] [--json FILE]`` prints
    the times of others over ours for an array of that size and four workers:

    ``each-reads-all``  stored anew for each round, each worker reads every byte once
    ``hundred-tasks``   stored once before, 100 tasks that each read one hundredth
    ``slices``          16 slices of it as the arguments of 16 tasks

    and, of ours alone, how long an arrival, a fork that inherits a view, and the first and later
    reads of one take, beside a copy of as many bytes. With ``--memory`` nothing but the memory of
    ours, as parts of the array's size: see `_broadcast_memory`.

How it works
    A process for each side, asked by turns, with a pool of four workers that stays open. Plain
    sends ``functools.partial(task, array)``; Ray puts the array into its store and passes the
    reference. Medians with quartiles, after a warm-up.

Lifetime
    All end with the program.

When it cannot
    Without Ray its columns are left out. ``--check`` ends with 1 if a row is below what it should
    be.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import _broadcast_memory
import _figures
import numpy as np
from _sides import Side, answer

import oobpickle

_N_WORKERS = 4
_N_TASKS = 100
_N_SLICES = 16
#: What each row should reach, as the other's time over ours.
_WANTED = {
    ("each-reads-all", "ray"): 0.9,
    ("hundred-tasks", "ray"): 5.0,
    ("hundred-tasks", "plain"): 100.0,
}
_SLOW_IN_PLAIN = 3  # so many passes
#: What each figure of memory should be at most, as parts of the array's size.
_MOST = {"beside": 1.1, "in_all": 1.1, "copied_read_only": 0, "copied_writable": 0}


def _read_all(array: Any, _n: int) -> float:
    return float(array.sum())


def _read_part(array: Any, n: int) -> float:
    n_each = len(array) // _N_TASKS
    return float(array[n * n_each : (n + 1) * n_each].sum())


Work = dict[str, Callable[[], object]]


def _plain(array: Any) -> Work:
    pool = multiprocessing.get_context("fork").Pool(_N_WORKERS)
    parts = np.array_split(array, _N_SLICES)
    return {
        "each-reads-all": lambda: pool.map(
            functools.partial(_read_all, array), range(_N_WORKERS), chunksize=1
        ),
        "hundred-tasks": lambda: pool.map(functools.partial(_read_part, array), range(_N_TASKS)),
        "slices": lambda: pool.map(len, parts, chunksize=1),
    }


def _ours(array: Any) -> Work:
    oobpickle.install(capacity=3 * array.nbytes + (256 << 20))
    pool = multiprocessing.get_context("fork").Pool(_N_WORKERS)
    kept = oobpickle.broadcast(array)
    parts = np.array_split(oobpickle.broadcast(array, readonly=True).value, _N_SLICES)

    def store_and_read() -> None:
        with oobpickle.broadcast(array) as handle:
            pool.map(functools.partial(_read_all, handle), range(_N_WORKERS), chunksize=1)

    return {
        "each-reads-all": store_and_read,
        "hundred-tasks": lambda: pool.map(functools.partial(_read_part, kept), range(_N_TASKS)),
        "slices": lambda: pool.map(len, parts, chunksize=1),
        **_alone(array),
    }


def _alone(array: Any) -> Work:
    read, write = multiprocessing.Pipe(duplex=False)
    handle = oobpickle.broadcast(array)
    destination = np.zeros_like(array)
    viewed = [handle.value]

    def arrive() -> None:
        write.send(handle)
        viewed.append(read.recv())

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    return {
        "arrival": arrive,
        "first read": lambda: viewed[-1].sum(),
        "later read": lambda: viewed[-1].sum(),
        "drop": viewed.pop,
        "fork": fork,
        "copy": lambda: np.copyto(destination, array),
    }


def _ray(array: Any) -> Work:
    import ray

    ray.init(
        num_cpus=_N_WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=3 * array.nbytes + (256 << 20),
    )
    read_all, read_part, length = map(ray.remote, (_read_all, _read_part, lambda part: len(part)))
    kept = ray.put(array)

    def store_and_read() -> None:
        stored = ray.put(array)
        ray.get([read_all.remote(stored, n) for n in range(_N_WORKERS)])

    return {
        "each-reads-all": store_and_read,
        "hundred-tasks": lambda: ray.get([read_part.remote(kept, n) for n in range(_N_TASKS)]),
        "slices": lambda: ray.get(
            [length.remote(ray.put(part)) for part in np.array_split(array, _N_SLICES)]
        ),
    }


_SIDES = {"plain": _plain, "oobpickle": _ours, "ray": _ray}


def _serve(name: str, nbytes: int) -> None:
    work = _SIDES[name](np.arange(nbytes // 8, dtype=np.float64))
    answer(work)
    os._exit(0)  # the pool's workers end with it


def _ms(times_s: list[float]) -> str:
    first, middle, third = statistics.quantiles(times_s, n=4)
    return f"{1e3 * middle:.2f} ms ({1e3 * first:.2f} to {1e3 * third:.2f})"


Figures = dict[str, float]


def _compare(row: str, sides: dict[str, Side], n_passes: int) -> tuple[bool, Figures]:
    """Print a row; return whether it is below what it should be, and its figures."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(-1, n_passes):
        for name in list(sides) if n % 2 else list(sides)[::-1]:
            if name == "plain" and n >= _SLOW_IN_PLAIN:
                continue
            taken_s = sides[name].time_s(row)
            if n >= 0:
                times[name].append(taken_s)
    ours_s = statistics.median(times["oobpickle"])
    print(f"{row}: oobpickle {_ms(times['oobpickle'])}")
    is_short, figures = False, _figures.quartiles("oobpickle", times["oobpickle"], "_s")
    for name in sides:
        if name != "oobpickle":
            ratio = statistics.median(times[name]) / ours_s
            wanted = _WANTED.get((row, name))
            is_short |= wanted is not None and ratio < wanted
            figures |= {**_figures.quartiles(name, times[name], "_s"), f"{name}_ratio": ratio}
            print(f"    {name} {_ms(times[name])}: {ratio:.2f} times ours, wanted {wanted or '-'}")
    return is_short, figures


def _memory(nbytes: int) -> tuple[bool, Figures]:
    """Print the figures of memory; return whether one is more than it should be, and them."""
    found = _broadcast_memory.measure(nbytes)
    for name, part in found.items():
        print(f"{name}: {part:.3f} of the array, at most {_MOST[name]} wanted")
    return any(part > _MOST[name] for name, part in found.items()), found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nbytes", type=float, default=1e9)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--memory", action="store_true", help="the memory of ours alone")
    parser.add_argument("--serve", choices=_SIDES)
    _figures.add_option(parser)
    options = parser.parse_args()
    nbytes = int(options.nbytes)
    if options.serve:
        _serve(options.serve, nbytes)
        return 0
    if options.memory:
        is_more, found = _memory(nbytes)
        _figures.write(options.json, {"memory": found})
        return int(options.check and is_more)
    names = [n for n in _SIDES if n != "ray" or importlib.util.find_spec("ray") is not None]
    sides = {name: Side(__file__, "--serve", name, "--nbytes", str(nbytes)) for name in names}
    rows = ("each-reads-all", "hundred-tasks", "slices")
    compared = {row: _compare(row, sides, options.passes) for row in rows}
    alone: dict[str, list[float]] = {}
    for n in range(options.passes + 1):
        for row in ("arrival", "first read", "later read", "drop", "fork", "copy"):
            taken_s = sides["oobpickle"].time_s(row)
            if n:
                alone.setdefault(row, []).append(taken_s)
    figures = {row: found for row, (_, found) in compared.items()}
    for row, times_s in alone.items():
        print(f"{row}: {_ms(times_s)}")
        figures[row] = _figures.quartiles("oobpickle", times_s, "_s")
    for side in sides.values():
        side.end()
    _figures.write(options.json, figures, libraries=["ray"])
    return int(options.check and any(is_short for is_short, _ in compared.values()))


if __name__ == "__main__":
    sys.exit(main())
