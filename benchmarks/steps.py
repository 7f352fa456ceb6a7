"""What one message costs beside its copy: in one process, so that nothing but our own work shows.

What
    ``python benchmarks/steps.py [--passes 3] [--json FILE]`` prints microseconds: a block leased
    and given back, beside few and many live ones, and an array sent through a pipe and received.
    And what a task of a plain ``Pool(1)`` takes above a copy in it whose result is not sent: the
    waking of threads, which every library pays, with caches that the copy has filled.

How it works
    Each pass takes the median of seven batches, and the least and the most of all passes are
    printed. The copy is that of ``np.copyto`` between warm arrays in the same pass.

Lifetime
    One process, and an arena for each pass.

When it cannot
    What fits into no pipe cannot be sent in-band in one process; so there is no column without us.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable

import _figures
import numpy as np

import oobpickle

_BLOCK_NBYTES = 256 << 10
_SIZES = (256 << 10, 1 << 20, 4 << 20)
_SIZES_IN_POOL = tuple(4**k << 20 for k in range(5))


def _timed_s(call: Callable[[], object], n: int) -> float:
    """Median of seven batches, seconds for each call."""
    taken = []
    for _ in range(7):
        start_s = time.perf_counter()
        for _ in range(n):
            call()
        taken.append((time.perf_counter() - start_s) / n)
    return statistics.median(taken)


def _measure() -> dict[str, float]:
    """One pass: the seconds of each step."""
    found = {}
    with oobpickle.enabled() as shown:
        arena = shown._memory  # the library's own
        arena.acquire([_BLOCK_NBYTES]).release()  # it has its pages from now on
        kept: list[object] = []
        for n_live in (10, 50_000):
            while len(kept) < n_live:
                kept.append(arena.blocks.lease([4096]))
            name = f"lease and release beside {n_live:,} live blocks"
            found[name] = _timed_s(lambda: arena.blocks.lease([_BLOCK_NBYTES]), 5000)
        kept.clear()
        found["Arena.acquire and release"] = _timed_s(
            lambda: arena.acquire([_BLOCK_NBYTES]).release(), 2000
        )
        read, write = multiprocessing.Pipe(duplex=False)
        for nbytes in _SIZES:
            array = np.ones(nbytes, np.uint8)
            other = np.empty_like(array)

            def message(array: np.ndarray[tuple[int], np.dtype[np.uint8]] = array) -> None:
                write.send(array)
                read.recv()

            for _ in range(20):
                message()
            median_s = _timed_s(message, 100)
            copy_s = _timed_s(lambda: np.copyto(other, array), 100)  # noqa: B023
            name = f"send and recv of {nbytes >> 10} KiB"
            found[name] = median_s
            found[f"{name}, the copy"] = copy_s
            found[f"{name}, above it"] = median_s - copy_s
    return found


_arrays: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []  # of a worker


def _copy_there(nbytes: int) -> float:
    """Seconds of a copy between arrays that the worker keeps."""
    if not _arrays or _arrays[0].nbytes != nbytes:
        _arrays[:] = [np.ones(nbytes, np.uint8) for _ in range(2)]
    source, destination = _arrays
    start_s = time.perf_counter()
    np.copyto(destination, source)
    return time.perf_counter() - start_s


def _measure_pool() -> dict[str, float]:
    """Medians of one pass through a plain pool."""
    found = {}
    with multiprocessing.get_context("fork").Pool(1) as pool:
        for nbytes in _SIZES_IN_POOL:
            copies_s, others_s = [], []
            for _ in range(max(15, min(300, (4 << 30) // nbytes))):
                start_s = time.perf_counter()
                copies_s.append(pool.apply(_copy_there, (nbytes,)))
                others_s.append(time.perf_counter() - start_s - copies_s[-1])
            name = f"a task that copies {nbytes >> 20} MiB"
            found[f"{name}, the copy"] = statistics.median(copies_s)
            found[f"{name}, above it"] = statistics.median(others_s)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=3)
    _figures.add_option(parser)
    options = parser.parse_args()
    # It is what this does; `broadcast` would be no help.
    warnings.simplefilter("ignore", oobpickle.RepeatedWarning)
    passes = [{**_measure(), **_measure_pool()} for _ in range(options.passes)]
    figures = {}
    print("microseconds: the least and the most of the medians")
    for name in passes[0]:
        least_s, most_s = (end(one[name] for one in passes) for end in (min, max))
        figures[name] = {"least_s": least_s, "most_s": most_s}
        print(f"{name}: {least_s * 1e6:.2f} to {most_s * 1e6:.2f}")
    _figures.write(options.json, figures)


if __name__ == "__main__":
    main()
