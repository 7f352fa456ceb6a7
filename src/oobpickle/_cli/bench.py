"""The command ``bench``: this machine, plain and with oobpickle, in ten seconds.

**What.** `bench` prints a table: the time of a message each way, and how many times faster.

**How it works.** On each side a worker makes an object and sends it; one side never has oobpickle
in use. They take turns, so that what slows the machine down slows both. The first messages are not
counted. A row may be unstable if the times of one way differ much among each other.

**Lifetime.** The workers end with the command.

**When it cannot.** A busy machine says little; ``benchmarks/`` of the project has the long ones.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from oobpickle._api import enabled
from oobpickle._cli.output import Progress, print_table
from oobpickle._errors import format_seconds

_QUICK: Final = ("64 KiB", "1 MiB", "16 MiB", "128 MiB", "1,000 arrays", "100,000 floats")
_FULL: Final = ("4 KiB", *_QUICK[:4], "512 MiB", *_QUICK[4:], "dict of 100,000")
_ROW_S: Final = 0.7
_FULL_ROW_S: Final = 6.0
_N_WARM: Final = 2
_LEAST: Final = 3
_SPREAD: Final = 0.5


class Times(NamedTuple):
    """Seconds of each message, both ways."""

    plain: list[float]
    ours: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster, as the median of the pairs."""
        return statistics.median(a / b for a, b in zip(self.plain, self.ours, strict=True))

    @property
    def is_unstable(self) -> bool:
        """Tell whether the times of one way differ much."""
        return any(_spread(times) > _SPREAD for times in self)


def _spread(times: list[float]) -> float:
    quarters = statistics.quantiles(times, n=4)
    return (quarters[2] - quarters[0]) / quarters[1]


def object_named(name: str) -> Any:
    """Return the object of a row."""
    import numpy as np

    if name.endswith("iB"):
        number, unit = name.split()
        return np.ones(int(number) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit] // 8)
    if name.endswith("arrays"):
        return [np.full(1000, float(i)) for i in range(1000)]
    if name.endswith("floats"):
        return [float(i) for i in range(100_000)]
    return {f"key {i}": float(i) for i in range(100_000)}


def serve(connection: Connection) -> None:
    """Send the object that was asked for, again and again."""
    name, obj = "", None
    while wanted := connection.recv():
        if wanted != name:
            name, obj = wanted, object_named(wanted)
        connection.send(obj)


def drive(connection: Connection, *, is_served: bool) -> None:
    """Be one side: receive objects from a worker, and answer how long each took."""
    with enabled() if is_served else contextlib.nullcontext():
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        worker = context.Process(target=serve, args=(theirs,))
        worker.start()
        theirs.close()
        while name := connection.recv():
            connection.send(_timed(ours, name))
        ours.send("")
        worker.join()
        ours.close()


class _Side:
    """A process that drives a worker."""

    def __init__(self, *, is_served: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        options = {"is_served": is_served}
        self._process = context.Process(target=drive, args=(theirs,), kwargs=options)
        self._process.start()
        theirs.close()

    def send(self, name: str) -> float:
        self._connection.send(name)
        return float(self._connection.recv())

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.send("")
        self._process.join()
        self._connection.close()


def _timed(connection: Connection, name: str) -> float:
    start = time.perf_counter()
    connection.send(name)
    obj = connection.recv()
    took = time.perf_counter() - start
    del obj
    return took


def measure(name: str, plain: _Side, ours: _Side, row_s: float) -> Times:
    """Return the times of one row; both sides take turns."""
    times = Times([], [])
    start = time.monotonic()
    n_done = 0
    while len(times.plain) < _LEAST or time.monotonic() - start < row_s:
        pair = plain.send(name), ours.send(name)
        n_done += 1
        if n_done > _N_WARM:
            times.plain.append(pair[0])
            times.ours.append(pair[1])
    return times


def bench(*, is_full: bool, form: str) -> int:
    """Print the table in a form: text, json or markdown; return the exit code."""
    rows: dict[str, Times] = {}
    with Progress() as progress, _Side(is_served=False) as plain, _Side(is_served=True) as ours:
        for name in _FULL if is_full else _QUICK:
            progress.say(name)
            rows[name] = measure(name, plain, ours, _FULL_ROW_S if is_full else _ROW_S)
    _FORMS[form](rows)
    return 0


def _cells(name: str, times: Times) -> tuple[str, ...]:
    plain, ours = map(statistics.median, times)
    note = "may be unstable" if times.is_unstable else ""
    return name, format_seconds(plain), format_seconds(ours), f"{times.ratio:.2f}x", note


_HEAD: Final = ("message", "plain", "oobpickle", "faster", "")


def _as_text(rows: dict[str, Times]) -> None:
    print_table(_HEAD, [_cells(name, times) for name, times in rows.items()])


def _as_markdown(rows: dict[str, Times]) -> None:
    print(f"| {' | '.join(_HEAD)} |\n|---|---:|---:|---:|---|")
    for name, times in rows.items():
        print(f"| {' | '.join(_cells(name, times))} |")


def _as_json(rows: dict[str, Times]) -> None:
    found = {
        name: {
            "plain_s": times.plain,
            "oobpickle_s": times.ours,
            "ratio": times.ratio,
            "is_unstable": times.is_unstable,
        }
        for name, times in rows.items()
    }
    print(json.dumps({"python": platform.python_version(), "rows": found}, indent=1))


_FORMS: Final[dict[str, Callable[[dict[str, Times]], None]]] = {
    "text": _as_text,
    "markdown": _as_markdown,
    "json": _as_json,
}
