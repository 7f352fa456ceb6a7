"""A buffer of prices: one process writes, three read as fast as they can, and every read is whole.

What
    ``python examples/price_buffer.py [--updates 20000] [--symbols 1000] [--readers 3]
    [--start-method fork]`` prints how often the buffer was written and read, and ends with 1 if a
    reader saw prices of two updates at once.

How it works
    Bids and asks are arrays in one shared object. Each update writes both, under the lock; a reader
    takes the lock, looks whether all of them are of one update, and takes what it needs along.

Lifetime
    The readers end when they have seen the last update.

When it cannot
    Needs Linux and the compiled core of oobpickle.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import oobpickle

SPREAD = 0.5


@dataclass
class Prices:
    """What all processes see; `update` is the number of the last one."""

    bid: np.ndarray[Any, Any]
    ask: np.ndarray[Any, Any]
    update: np.ndarray[Any, Any]


def make_prices(n_symbols: int) -> Prices:
    """Return a buffer before the first update."""
    bid = np.zeros(n_symbols)
    return Prices(bid, bid + SPREAD, np.zeros(1, np.int64))


def write(shared: oobpickle.Shared[Prices], n_updates: int) -> None:
    """Write one update after the other."""
    for number in range(1, n_updates + 1):
        with shared.writing() as prices:
            prices.bid[:] = number
            prices.ask[:] = prices.bid + SPREAD
            prices.update[0] = number


def is_whole(prices: Prices) -> bool:
    """Tell whether all prices are of one update."""
    number = prices.update[0]
    return bool((prices.bid == number).all() and (prices.ask == number + SPREAD).all())


def read(shared: oobpickle.Shared[Prices], n_updates: int) -> tuple[int, int, int]:
    """Read until the last update; return how many reads, different updates, and torn ones."""
    n_reads = n_different = n_torn = last = 0
    while last < n_updates:
        with shared.reading() as prices:
            number = int(prices.update[0])
            n_torn += not is_whole(prices)
        n_reads += 1
        n_different += number != last
        last = number
    return n_reads, n_different, n_torn


def main() -> int:
    """Run it, and print what was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--symbols", type=int, default=1000)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--start-method", choices=multiprocessing.get_all_start_methods())
    options = parser.parse_args()
    context = multiprocessing.get_context(options.start_method)
    with (
        oobpickle.enabled(),
        oobpickle.share(make_prices(options.symbols)) as shared,
        context.Pool(options.readers) as pool,
    ):
        readers = [
            pool.apply_async(read, (shared, options.updates)) for _ in range(options.readers)
        ]
        start = time.perf_counter()
        write(shared, options.updates)
        seconds = time.perf_counter() - start
        found = [reader.get() for reader in readers]
    print(f"{options.updates} updates of {options.symbols} prices in {seconds:.2f} s")
    for n_reads, n_different, n_torn in found:
        print(f"reader: {n_reads} reads, {n_different} different updates, {n_torn} torn")
    return int(any(n_torn for _, _, n_torn in found))


if __name__ == "__main__":
    sys.exit(main())
