"""The command line of the comparison against peers, inside its environment.

What
    `main` measures, or reads what was measured, prints the tables, stores and draws.

How it works
    Rows up to 64 MiB are measured with all sides open, larger ones with one side at a time.

Lifetime
    All sides have ended, and what they left is removed, when measuring ends.

When it cannot
    See ``peers.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import _environment
import _figures
import _peer_side
import _peers
from _harness import MismatchError
from _leftovers import Leftovers
from _peer_harness import (
    Cell,
    Limits,
    PeerSide,
    measure_apart,
    measure_together,
)
from _peer_report import Figures, compare, figures, header, lines, rows_of
from _peer_rows import ROWS, Row

Found = dict[Row, dict[str, Cell]]

_LIBRARIES = (
    *("numpy", "joblib", "loky", "npshmex", "py-sharedmemory", "ray", "distributed"),
    *("mpi4py", "mpich", "torch"),
)


def _parse(arguments: list[str], description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="peers.py", description=description)
    parser.add_argument("--rows", default="*", help="only the rows that match, as result-*")
    parser.add_argument("--peers", default="*", help="patterns, separated by commas")
    parser.add_argument("--sizes", default="*", help="patterns, separated by commas, as 64M,1G")
    parser.add_argument("--quick", action="store_true", help="64M only, fewer rounds")
    parser.add_argument("--passes", type=int, default=2, help="for the rows above 64M (2)")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for a cell (30)")
    parser.add_argument("--memory-gib", type=int, default=12, help="at most, for one peer (12)")
    parser.add_argument("--batches", type=Path, metavar="FILE", help="store all times there")
    _figures.add_option(parser)
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw into this directory")
    parser.add_argument(
        "--from",
        type=Path,
        nargs="+",
        metavar="FILE",
        dest="stored",
        default=[],
        help="print and draw what was stored; of a cell in several files, the last counts",
    )
    default = _environment.default_folder()
    text = f"where the libraries are installed ({default})"
    parser.add_argument("--environment", type=Path, default=default, help=text)
    parser.add_argument("--side", choices=_peers.NAMES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split(","))


def _facts(arguments: list[str]) -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "command": _figures.command_of(["peers.py", *arguments]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _reason(peer: str, failures: Mapping[str, str]) -> str:
    for requirement, reason in failures.items():
        if requirement.split("=")[0] in peer.lower():
            return f"not installed: {reason}"
    return ""


def _measure(
    arguments: argparse.Namespace, failures: Mapping[str, str], facts: dict[str, str]
) -> Found:
    names = [name for name in _peers.NAMES if _matches(name, arguments.peers)]
    missing = {name: reason for name in names if (reason := _reason(name, failures))}
    sizes = "64M" if arguments.quick else arguments.sizes
    rows = [row for row in ROWS if _matches(row.name, arguments.rows) and _matches(row.size, sizes)]
    limits = Limits(
        cell_s=4.0 if arguments.quick else arguments.budget,
        reply_s=120.0,
        memory_nbytes=arguments.memory_gib << 30,
        n_rounds=3 if arguments.quick else 7,
        n_passes=arguments.passes,
    )
    there = [name for name in names if name not in missing]
    found: Found = {}
    leftovers = Leftovers()
    try:
        for row, cells in _measure_rows(rows, there, limits, leftovers):
            compare(cells)
            cells.update({name: Cell(failure=reason) for name, reason in missing.items()})
            found[row] = cells
            if arguments.batches:
                _store(arguments.batches, facts, found)  # After each row: a run may be cut short.
    finally:
        leftovers.remove()
    return {row: found[row] for row in rows}


def _measure_rows(
    rows: list[Row], names: list[str], limits: Limits, leftovers: Leftovers
) -> Iterator[tuple[Row, dict[str, Cell]]]:
    for n_workers in sorted({row.n_workers for row in rows}):
        sides: dict[str, PeerSide] = {}
        try:
            for row in rows:
                if row.n_workers == n_workers and not row.is_apart:
                    with _noting_time(row):
                        cells = measure_together(row, names, sides, limits)
                    yield row, cells
        finally:
            for side in sides.values():
                side.__exit__()
    for row in rows:
        if row.is_apart:
            with _noting_time(row):
                cells = measure_apart(row, names, limits, leftovers)
            yield row, cells


@contextlib.contextmanager
def _noting_time(row: Row) -> Iterator[None]:
    start_s = time.monotonic()
    yield
    print(f"{row.name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr)


def _cell(values: dict[str, Any]) -> Cell:
    return Cell(**values | {"rounds": {int(index): s for index, s in values["rounds"].items()}})


def _load(paths: Iterable[Path]) -> tuple[list[dict[str, str]], Found]:
    all_facts: list[dict[str, str]] = []
    found: dict[Row, dict[str, Cell]] = {}
    for path in paths:
        stored = json.loads(path.read_text())
        all_facts.append(stored["facts"])
        for row in ROWS:
            cells = stored["rows"].get(row.name)
            if cells:
                found.setdefault(row, {}).update(
                    {name: _cell(values) for name, values in cells.items()}
                )
    return all_facts, {row: found[row] for row in ROWS if row in found}


def _known(found: Found, workload: str) -> dict[str, Cell]:
    """Of each peer, a cell of this workload in which it was tried out what is held."""
    known = {}
    for row, cells in found.items():
        for name, cell in cells.items():
            if row.workload == workload and row.is_judged and cell.is_writable is not None:
                known[name] = cell
    return known


def _known_of(found: Found, row: Row) -> dict[str, Cell]:
    # Pool.map and merging deliver results; slow peers are tried out in a smaller row.
    is_result = row.workload in ("map", "merge")
    return (_known(found, "result") if is_result else {}) | _known(found, row.workload)


def _show(found: Found, plots: Path | None, command: str) -> dict[Row, dict[str, Figures]]:
    """Print the tables, draw the plots, and return the figures."""
    print(header())
    all_figures = {}
    for row, cells in found.items():
        known = _known_of(found, row)
        print("\n".join(lines(row, cells, known)))
        all_figures[row] = {
            name: made
            for name, cell in cells.items()
            if (made := figures(row, cell, known.get(name))) is not None
        }
    if plots is not None:
        import _plots

        print(*_plots.draw(all_figures, plots, _figures.stamp(command)), sep="\n")
    return all_figures


def _store(path: Path, facts: dict[str, str], found: Found) -> None:
    rows = {
        row.name: {name: dataclasses.asdict(cell) for name, cell in cells.items()}
        for row, cells in found.items()
    }
    path.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1))


def main(words: list[str], description: str, failures: Mapping[str, str]) -> int:
    """Do what the words of the command line say; return the exit status."""
    arguments = _parse(words, description)
    if arguments.side:
        _peer_side.main(arguments.side)
        return 0
    # Sides are in sessions of their own: who ends this program must not leave them behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    all_facts = [_facts(words)]
    try:
        if arguments.stored:
            all_facts, found = _load(arguments.stored)
        else:
            found = _measure(arguments, failures, all_facts[0])
    except MismatchError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.batches and arguments.stored:
        _store(arguments.batches, all_facts[0], found)
    for facts in all_facts:
        print(*(f"{name}: {fact}" for name, fact in facts.items()), "", sep="\n")
    command = "; ".join(facts["command"] for facts in all_facts)
    rows = dict(rows_of(_show(found, arguments.plots, command)))
    _figures.write(arguments.json, rows, libraries=_LIBRARIES[1:], command=command)
    return 0
