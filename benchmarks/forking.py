"""What a fork costs a process that holds received arrays: the first one, and one after it.

What
    ``python benchmarks/forking.py [--passes 5] [--quick] [--json FILE]`` prints milliseconds for
    arrays of a gigabyte together, and for many small ones.

How it works
    Each pass receives the arrays anew from a child, and forks twice. What is held is turned into
    ordinary memory by the first fork (docs/explanation/semantics.md#fork); what the second one
    takes is the system's. Medians of the passes.

Lifetime
    An arena for each pass.

When it cannot
    It takes 3 GB of memory; with ``--quick`` a tenth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import warnings

import _figures
import numpy as np

import oobpickle

#: Row: how many arrays, and the bytes of each.
_ROWS = {
    "1 x 1 GiB": (1, 1 << 30),
    "16 x 64 MiB": (16, 64 << 20),
    "256 x 1 MiB": (256, 1 << 20),
    "1,000 x 256 KiB": (1000, 256 << 10),
}


def _send(queue: multiprocessing.SimpleQueue[object], n_arrays: int, nbytes: int) -> None:
    array = np.ones(nbytes, np.uint8)
    for _ in range(n_arrays):
        queue.put(array)


def _fork_s() -> float:
    start_s = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    taken_s = time.perf_counter() - start_s
    os.waitpid(pid, 0)
    return taken_s


def _pass(n_arrays: int, nbytes: int) -> tuple[float, float]:
    """Return the seconds of the first fork, and of the second."""
    with oobpickle.enabled(copy_on_receive=False) as arena:
        queue: multiprocessing.SimpleQueue[object] = multiprocessing.SimpleQueue()
        context = multiprocessing.get_context("fork")
        sender = context.Process(target=_send, args=(queue, n_arrays, nbytes))
        sender.start()
        held = [queue.get() for _ in range(n_arrays)]
        sender.join()
        first_s, again_s = _fork_s(), _fork_s()
        n_turned = arena.statistics().n_copied_at_fork
        if n_turned != n_arrays:
            raise RuntimeError(f"{n_turned} blocks became ordinary memory, expected {n_arrays}")
        del held
    return first_s, again_s


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the bytes")
    _figures.add_option(parser)
    options = parser.parse_args()
    # The same array is sent again and again; `broadcast` would be no help.
    warnings.simplefilter("ignore", oobpickle.RepeatedWarning)
    figures = {}
    for name, row in _ROWS.items():
        n_arrays, nbytes = row
        if options.quick:
            n_arrays, nbytes = (
                (n_arrays // 10, nbytes) if n_arrays > 100 else (n_arrays, nbytes // 10)
            )
        passes = [_pass(n_arrays, nbytes) for _ in range(options.passes)]
        first_s, again_s = map(statistics.median, zip(*passes, strict=True))
        figures[name] = {
            "first_s": first_s,
            "first_each_gb_s": first_s / (n_arrays * nbytes / 1e9),
            "again_s": again_s,
        }
        print(
            f"{name:16} first {first_s * 1e3:7.1f} ms, {figures[name]['first_each_gb_s']:.2f} s "
            f"for each GB; again {again_s * 1e3:.1f} ms",
            flush=True,
        )
    _figures.write(options.json, figures)


if __name__ == "__main__":
    main()
