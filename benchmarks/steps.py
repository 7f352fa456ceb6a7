"""What one message costs beside its copy: in one process, so that nothing but our own work shows.

What
    ``python benchmarks/steps.py`` prints microseconds, medians and minima: a block leased and given
    back, beside few and many live ones, and an array sent through a pipe and received.

How it works
    Each figure is the median of seven batches. The copy is that of ``np.copyto`` between warm
    arrays in the same run.

Lifetime
    One process, one arena.

When it cannot
    What fits into no pipe cannot be sent in-band in one process; so there is no column without us.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable

import numpy as np

import oobpickle

_BLOCK_NBYTES = 256 << 10
_SIZES = (256 << 10, 1 << 20, 4 << 20)


def _timed(call: Callable[[], object], n: int) -> tuple[float, float]:
    """Median and minimum of seven batches, microseconds for each call."""
    taken = []
    for _ in range(7):
        start_s = time.perf_counter()
        for _ in range(n):
            call()
        taken.append((time.perf_counter() - start_s) / n * 1e6)
    return statistics.median(taken), min(taken)


def main() -> None:
    with oobpickle.enabled() as shown:
        arena = shown._memory  # the library's own
        print("microseconds: median, minimum")
        arena.acquire([_BLOCK_NBYTES]).release()  # it has its pages from now on
        kept: list[object] = []
        for n_live in (10, 50_000):
            while len(kept) < n_live:
                kept.append(arena.blocks.lease([4096]))
            median, least = _timed(lambda: arena.blocks.lease([_BLOCK_NBYTES]), 5000)
            print(f"lease and release beside {n_live:,} live blocks: {median:.2f}, {least:.2f}")
        kept.clear()
        median, least = _timed(lambda: arena.acquire([_BLOCK_NBYTES]).release(), 2000)
        print(f"Arena.acquire and release: {median:.1f}, {least:.1f}")
        read, write = multiprocessing.Pipe(duplex=False)
        for nbytes in _SIZES:
            array = np.ones(nbytes, np.uint8)
            other = np.empty_like(array)

            def message(array: np.ndarray[tuple[int], np.dtype[np.uint8]] = array) -> None:
                write.send(array)
                read.recv()

            for _ in range(20):
                message()
            median, least = _timed(message, 100)
            copy, _ = _timed(lambda: np.copyto(other, array), 100)  # noqa: B023
            print(
                f"send and recv of {nbytes >> 10} KiB: {median:.0f}, {least:.0f}; "
                f"the copy {copy:.0f}, above it {median - copy:.0f}"
            )


if __name__ == "__main__":
    main()
