"""What `explain` predicts, against what sending the object takes.

What
    Six objects, each sent to another process and rebuilt there, plain and with oobpickle; beside it
    what `oobpickle.explain` said before. And a seventh, which is rebuilt by code of its own: what
    that takes is not known before.

How it works
    A worker answers when it has loaded a message. Both ways take turns, in one run; the shortest
    time of each is what counts, as in the measurement of the machine. The first message of each is
    not counted: the prediction is for memory that has pages.

Lifetime
    Workers end with the program.

When it cannot
    ``--check``: exit 1 if a prediction is more than a factor of two off. On a busy machine it may
    be; there ``--cpu`` compares with the CPU seconds of both sides, which are what an idle machine
    takes, or somewhat more where both work at the same time, at the two ends of a pipe.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from typing import Any

import _figures
import numpy as np
from _receiver import timed_both, worker

import oobpickle

FACTOR = 2.0
UNKNOWN = "forest"


class Point:
    """A small object."""

    def __init__(self, i: int) -> None:
        self.x, self.y, self.name = float(i), i, f"point {i}"


class Model:
    """Something with a name and parts."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def model_of_arrays() -> Any:
    return Model(layers=[np.ones((1000, 1000)) for _ in range(16)], step=3)


def dictionary() -> Any:
    return {f"key {i}": float(i) for i in range(500_000)}


def points() -> Any:
    return [Point(i) for i in range(100_000)]


def small_arrays() -> Any:
    return Model(arrays=[np.arange(10.0) + i for i in range(50_000)])


def frame_with_object_strings() -> Any:
    import pandas as pd  # type: ignore[import-untyped]

    n = 300_000
    names = pd.Series([f"name {i}" for i in range(n)], dtype=object)
    return pd.DataFrame({"x": np.arange(n) * 1.0, "y": np.arange(n), "name": names})


def arrays_by_the_thousand() -> Any:
    return {f"layer {i}": np.ones(2000) for i in range(3000)}


def forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier  # type: ignore[import-untyped]

    random = np.random.default_rng(0)
    x, y = random.random((3000, 10)), random.integers(0, 2, 3000)
    return RandomForestClassifier(100, random_state=0).fit(x, y)


OBJECTS = (
    model_of_arrays,
    dictionary,
    points,
    small_arrays,
    frame_with_object_strings,
    arrays_by_the_thousand,
    forest,
)


def measured(obj: object, n_rounds: int, *, cpu: bool) -> tuple[float, float]:
    """Return the shortest times of both ways, seconds; or the least CPU seconds."""
    context = multiprocessing.get_context("spawn")
    plain, one = worker(context)
    with oobpickle.enabled() as arena:
        served, two = worker(context)
        times: list[tuple[float, float]] = []
        for _ in range(n_rounds + 1):
            # `plain` is older than the block: its messages go in-band, but through the hook.
            both = timed_both(plain, obj, is_plain=True), timed_both(served, obj)
            times.append((both[0][cpu], both[1][cpu]))
        assert arena.statistics().n_messages_out_of_band == n_rounds + 1
        for connection, process in ((plain, one), (served, two)):
            connection.close()
            process.join()
    first, second = zip(*times[1:], strict=True)
    return min(first), min(second)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="predictions of explain against the truth")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", nargs="*", default=[make.__name__ for make in OBJECTS])
    parser.add_argument("--check", action="store_true", help="exit 1 if one is off by more than 2")
    _figures.add_option(parser)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds: for a busy machine")
    options = parser.parse_args()
    print(f"{'':26} {'plain, ms':>22} {'oobpickle, ms':>24} {'explained':>10}")
    print(
        f"{'object':26} {'said':>7} {'took':>7} {'ratio':>6} {'said':>9} {'took':>7} {'ratio':>6}"
    )
    rows = {}
    for make in OBJECTS:
        if make.__name__ not in options.rows:
            continue
        obj = make()
        oobpickle.explain(None)  # measures the machine
        start_s = time.perf_counter()
        said = oobpickle.explain(obj).seconds
        explained_s = time.perf_counter() - start_s
        plain_s, ours_s = measured(obj, options.rounds, cpu=options.cpu)
        ratios = said.plain / plain_s, said.oobpickle / ours_s
        rows[make.__name__] = (said.plain, plain_s, said.oobpickle, ours_s)
        print(
            f"{make.__name__:26} {said.plain * 1e3:7.1f} {plain_s * 1e3:7.1f} {ratios[0]:6.2f} "
            f"{said.oobpickle * 1e3:9.1f} {ours_s * 1e3:7.1f} {ratios[1]:6.2f} "
            f"{explained_s:8.2f} s",
            flush=True,
        )
    names = ("plain_said_s", "plain_s", "oobpickle_said_s", "oobpickle_s")
    figures = {name: dict(zip(names, found, strict=True)) for name, found in rows.items()}
    _figures.write(options.json, figures, libraries=["pandas", "scikit-learn"])
    off = [
        name
        for name, (a, b, c, d) in rows.items()
        if name != UNKNOWN
        and not all(1 / FACTOR < said / took < FACTOR for said, took in ((a, b), (c, d)))
    ]
    if off:
        print(f"off by more than {FACTOR:.0f}: {', '.join(off)}", file=sys.stderr)
    return int(bool(off) and options.check)


if __name__ == "__main__":
    sys.exit(main())
