"""Many small objects: what it saves to send them as a few large ones.

What
    The cases of docs/how-to/many-small-objects.md, before and after, plain and with oobpickle: the
    time from sender to receiver, until the object is rebuilt.

How it works
    The four take turns, in one run; the shortest time of each is what counts. The first message is
    not counted. Columns are made by the sender and unmade by the receiver within that time where a
    reducer does it, and before it where the object is kept as columns.

Lifetime
    Workers end with the program.

When it cannot
    Seconds of a busy machine are worth little; the ratios are worth more.
"""

from __future__ import annotations

import argparse
import collections
import gc
import multiprocessing
import multiprocessing.reduction
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import _figures
import numpy as np
from _receiver import timed, worker

import oobpickle


class Ragged:
    """A million small arrays."""

    def __init__(self, arrays: list[Any]) -> None:
        self.arrays = arrays


class Columns:
    """The same as one array, and where each begins."""

    def __init__(self, arrays: list[Any]) -> None:
        self.values = np.concatenate(arrays)
        self.starts = np.cumsum([0, *map(len, arrays)])


class Entries(dict[Any, Any]):
    """A dictionary that is sent as columns."""


class Sorted:
    """The same, looked up by bisection: nothing is made where it arrives."""

    def __init__(self, entries: dict[str, int]) -> None:
        keys = sorted(entries)
        self.keys = np.array(keys)
        self.values = np.array([entries[key] for key in keys])

    def __getitem__(self, key: str) -> int:
        at = np.searchsorted(self.keys, key)
        if at == len(self.keys) or self.keys[at] != key:
            raise KeyError(key)
        return int(self.values[at])


class Point:
    """A small object."""

    def __init__(self, x: float, y: int, name: str) -> None:
        self.x, self.y, self.name = x, y, name


class Cloud:
    """Many of them."""

    def __init__(self, points: list[Point]) -> None:
        self.points = points


class Columned(Cloud):
    """The same, sent as columns."""


class Counted(collections.Counter[str]):
    """A counter that is sent as columns."""


def rebuild_counter(kind: Any, text: Any, counts: Any) -> Any:
    """Make a counter of columns."""
    keys = bytes(text).decode().split("\0") if len(counts) else []
    made = kind()
    dict.update(made, zip(keys, counts.tolist(), strict=True))
    return made


def reduce_counter(counter: Any) -> Any:
    """Take a counter apart into columns, if its keys are strings and its values small integers."""
    text = "\0".join(counter) if all(type(key) is str for key in counter) else "\0"
    if text.count("\0") != max(0, len(counter) - 1):
        return counter.__reduce__()
    counts = np.fromiter(counter.values(), np.int64, len(counter))
    return rebuild_counter, (type(counter), np.frombuffer(text.encode(), np.uint8), counts)


oobpickle.register(Counted, reduce_counter)


def rebuild_entries(keys: Any, values: Any) -> Any:
    """Make a dictionary of columns."""
    return Entries(zip(_listed(keys), values.tolist(), strict=True))


def reduce_entries(entries: Any) -> Any:
    """Take a dictionary apart into columns of its keys and of its values."""
    return rebuild_entries, (_column(list(entries)), _column(list(entries.values())))


def _column(values: list[Any]) -> Any:
    (kind,) = set(map(type, values))
    if kind is str:
        text = "\0".join(values)
        assert text.count("\0") == len(values) - 1
        return np.frombuffer(text.encode(), np.uint8)
    return np.fromiter(values, kind, len(values))


def _listed(column: Any) -> list[Any]:
    if column.dtype == np.uint8:
        return bytes(column).decode().split("\0")
    listed: list[Any] = column.tolist()
    return listed


oobpickle.register(Entries, reduce_entries)


def rebuild_cloud(*columns: Any) -> Any:
    """Make points of columns."""
    return Columned(list(map(Point, *map(_listed, columns))))


def reduce_cloud(cloud: Columned) -> Any:
    """Take points apart into columns of their attributes."""
    names = ("x", "y", "name")
    return rebuild_cloud, tuple(_column([getattr(p, n) for p in cloud.points]) for n in names)


oobpickle.register(Columned, reduce_cloud)


def frames() -> tuple[Any, Any]:
    import pandas as pd  # type: ignore[import-untyped]

    n = 500_000
    names = pd.Series([f"name {i}" for i in range(n)], dtype=object)
    frame = pd.DataFrame({"x": np.arange(n) * 1.0, "name": names})
    return frame, frame.astype({"name": "str"})


def forests() -> tuple[Any, Any]:
    from sklearn.ensemble import RandomForestClassifier  # type: ignore[import-untyped]

    random = np.random.default_rng(0)
    x, y = random.random((20_000, 10)), random.integers(0, 2, 20_000)
    forest = RandomForestClassifier(50, random_state=0).fit(x, y)
    return forest, forest


def arrays() -> tuple[Any, Any]:
    made = [np.arange(5.0) + i for i in range(1_000_000)]
    return Ragged(made), Columns(made)


def counters() -> tuple[Any, Any]:
    words = {f"word {i}": i for i in range(500_000)}
    return collections.Counter(words), Counted(words)


def words() -> tuple[Any, Any]:
    entries = {f"word {i}": i for i in range(2_000_000)}
    return entries, Entries(entries)


def kept() -> tuple[Any, Any]:
    entries = {f"word {i}": i for i in range(2_000_000)}
    return entries, Sorted(entries)


def numbers() -> tuple[Any, Any]:
    entries = {7 * i: i * 1.0 for i in range(2_000_000)}
    return entries, Entries(entries)


def objects() -> tuple[Any, Any]:
    points = [Point(i * 1.0, i, f"point {i}") for i in range(500_000)]
    return Cloud(points), Columned(points)


CASES: tuple[Callable[[], tuple[Any, Any]], ...] = (
    *(frames, forests, arrays, counters),
    *(words, kept, numbers, objects),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="many small objects, before and after")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=[case.__name__ for case in CASES])
    _figures.add_option(parser)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    plain, one = worker(context)
    print("| case | plain, ms | before, ms | after, ms | before / after | plain / after |")
    print("|---|---:|---:|---:|---:|---:|")
    figures = {}
    with oobpickle.enabled():
        served, two = worker(context)
        for case in CASES:
            if case.__name__ in options.cases:
                name = case.__name__
                figures[name] = row(name, *case(), plain, served, options.rounds)
        for connection, process in ((plain, one), (served, two)):
            connection.close()
            process.join()
    _figures.write(options.json, figures, libraries=["pandas", "pyarrow", "scikit-learn"])


def row(
    name: str, before: Any, after: Any, plain: Connection, served: Connection, n_rounds: int
) -> dict[str, float]:
    """Print one row; return its figures."""
    gc.collect()
    gc.freeze()  # the objects of the benchmark itself are not looked at again and again
    times = [
        (
            timed(plain, before, is_plain=True),
            timed(served, before, is_plain=False),
            timed(served, after, is_plain=False),
        )
        for _ in range(n_rounds + 1)
    ][1:]
    a, b, c = (min(column) for column in zip(*times, strict=True))
    print(
        f"| {name} | {a * 1e3:.0f} | {b * 1e3:.0f} | {c * 1e3:.0f} | {b / c:.1f} | {a / c:.1f} |",
        flush=True,
    )
    return {"plain_s": a, "before_s": b, "after_s": c}


if __name__ == "__main__":
    main()
