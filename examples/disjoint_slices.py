"""Parts of one array, each written by one process, without a lock and without a copy.

What
    ``python examples/disjoint_slices.py [--size 600] [--workers 4] [--start-method fork]`` has the
    workers of a pool compute a picture of the Mandelbrot set, some rows each, and ends with 1 if it
    differs from the one that is computed in this process.

How it works
    The picture is shared. A task gets its rows as numbers, and writes them through ``unlocked``:
    nobody else uses them. Nothing but numbers travels through the pipes.

Lifetime
    The picture is free when the block is left.

When it cannot
    Needs Linux and the compiled core of oobpickle.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from typing import Any

import numpy as np

import oobpickle

N_STEPS = 60

Picture = np.ndarray[Any, Any]


def compute(size: int, first: int, last: int) -> Picture:
    """Return some rows: after how many steps each point has left."""
    x = np.linspace(-2, 1, size)
    y = np.linspace(-1.5, 1.5, size)[first:last, np.newaxis]
    place = x + 1j * y
    value = np.zeros_like(place)
    steps = np.zeros(place.shape, np.uint8)
    for _ in range(N_STEPS):
        is_in = np.abs(value) <= 2
        value[is_in] = value[is_in] ** 2 + place[is_in]
        steps += is_in
    return steps


def fill(shared: oobpickle.Shared[Picture], first: int, last: int) -> None:
    """Write the rows from `first` to before `last`."""
    picture = shared.unlocked
    picture[first:last] = compute(len(picture), first, last)


def main() -> int:
    """Compute it twice, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=600)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--start-method", choices=multiprocessing.get_all_start_methods())
    options = parser.parse_args()
    context = multiprocessing.get_context(options.start_method)
    bounds = np.linspace(0, options.size, 4 * options.workers + 1).astype(int).tolist()
    picture = np.zeros((options.size, options.size), np.uint8)
    with oobpickle.enabled(), oobpickle.share(picture) as shared:
        parts = list(zip([shared] * len(bounds), bounds, bounds[1:], strict=False))
        with context.Pool(options.workers) as pool:
            pool.starmap(fill, parts, chunksize=1)
        with shared.reading() as found:
            is_right = np.array_equal(found, compute(options.size, 0, options.size))
            n_inside = int((found == N_STEPS).sum())
    print(f"{options.size} x {options.size} points in {len(bounds) - 1} parts: {n_inside} inside")
    print("the same as in one process" if is_right else "it differs from that of one process")
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main())
