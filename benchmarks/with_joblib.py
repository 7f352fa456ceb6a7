"""joblib with oobpickle and without: ratios of times, by turns.

What
    ``python benchmarks/with_joblib.py [--passes 7] [--check] [--json FILE]`` prints plain's time
    over ours for a result and a by-value argument of 64 MB through ``Parallel(n_jobs=2)``, for 60
    results of 64 MB through a generator, and for 2,000 small tasks.

How it works
    Two processes, each with a `Parallel` that stays open, are asked by turns; one of them inside a
    block. Medians with quartiles, after a warm-up.

Lifetime
    Both end with the program.

When it cannot
    ``--check`` ends with 1 if a row is below what it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import _figures
import numpy as np
from _sides import Side, answer

_NBYTES = 64_000_000
_N_GENERATED = 60
_N_SMALL = 2000
#: What each row should reach, as plain's time over ours.
_WANTED = {"result-64M": 6.0, "argument-64M": 6.0, "generator-60x64M": 3.0, "small-tasks": 0.97}


def _make(_: int) -> Any:
    return np.ones(_NBYTES, np.uint8)


def _take(array: Any) -> int:
    return int(array[-1])


def _work(parallel: Any, generating: Any, delayed: Any) -> dict[str, Callable[[], object]]:
    array = _make(0)
    return {
        "result-64M": lambda: parallel([delayed(_make)(0)]),
        "argument-64M": lambda: parallel([delayed(_take)(array)]),
        "generator-60x64M": lambda: sum(
            int(one[0]) for one in generating(delayed(_make)(n) for n in range(_N_GENERATED))
        ),
        "small-tasks": lambda: parallel(delayed(abs)(n) for n in range(_N_SMALL)),
    }


def _serve(name: str) -> None:
    from joblib import Parallel, delayed

    import oobpickle

    block = oobpickle.enabled() if name == "oobpickle" else contextlib.nullcontext()
    with (
        block,
        Parallel(2, max_nbytes=None) as parallel,
        Parallel(2, max_nbytes=None, return_as="generator") as generating,
    ):
        answer(_work(parallel, generating, delayed))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--serve", choices=("plain", "oobpickle"))
    _figures.add_option(parser)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve)
        return 0
    sides = {name: Side(__file__, "--serve", name) for name in ("plain", "oobpickle")}
    is_short, figures = False, {}
    for row, wanted in _WANTED.items():
        n_passes = max(3, options.passes // 3) if row.startswith("generator") else options.passes
        for side in sides.values():
            side.time_s(row)
        ratios, ours_s = [], []
        for n in range(n_passes):
            order = list(sides) if n % 2 else list(sides)[::-1]
            taken = {name: sides[name].time_s(row) for name in order}
            ratios.append(taken["plain"] / taken["oobpickle"])
            ours_s.append(taken["oobpickle"])
        ratio = statistics.median(ratios)
        first, _, third = statistics.quantiles(ratios, n=4)
        is_short |= ratio < wanted
        figures[row] = {
            **_figures.quartiles("ratio", ratios),
            "ours_s": statistics.median(ours_s),
        }
        print(
            f"{row:18} {ratio:6.2f}  ({first:.2f} to {third:.2f}, {wanted} wanted)  "
            f"ours {statistics.median(ours_s) * 1e3:.1f} ms",
            flush=True,
        )
    for side in sides.values():
        side.end()
    _figures.write(options.json, figures, libraries=["joblib"])
    return int(options.check and is_short)


if __name__ == "__main__":
    sys.exit(main())
