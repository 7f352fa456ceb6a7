"""What a benchmark has found, as JSON of one shape, of which the tables in the documents are made.

What
    `add_option` gives a program ``--json FILE``, and `write` writes that file::

        {"command": "python benchmarks/sharing.py --passes 12",
         "version": "0.1.0", "commit": "1d218c288", "date": "2026-11-29",
         "machine": {"cores": 2, "processor": "...", "memory": "24 GiB", "kernel": "Linux 6.18",
                     "python": "3.13.0", "numpy": "2.5.5", "load": 0.4},
         "libraries": {"joblib": "1.6.0"},
         "note": "",
         "rows": {"lock": {"ratio": 1.01, "ratio_first": 0.73, "ratio_third": 1.12}}}

    ``rows`` has the named figures of each row, in SI units where a name says one (``_s``,
    ``_nbytes``). ``note`` is for what a program cannot know of its run; it writes an empty one.

How it works
    The command is the one that was typed, without the options that name files: two runs that
    measure the same have the same one. The commit is that of the clone whose oobpickle was
    imported, with ``+changes`` behind it if the sources were not as committed. A plot that is drawn
    in the same run has the same `stamp`.

Lifetime
    Day and load are those of the time when this module was imported. A file that is there is
    overwritten.

When it cannot
    Without git, or with an oobpickle that is installed somewhere else, the commit is empty.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
#: Options that name a file or a folder, and change nothing of what is measured.
PLACES = ("--json", "--batches", "--plots", "--environment")

_DAY = datetime.datetime.now(datetime.UTC).date().isoformat()
_LOAD = round(os.getloadavg()[0], 2)
_KIB, _GIB = 1 << 10, 1 << 30

Rows = Mapping[str, Mapping[str, object]]


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE``."""
    text = "write the figures there, as docs/figures has them"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


def command_of(words: Sequence[str]) -> str:
    """Return the command, without the options that only name places."""
    kept: list[str] = []
    rest = iter(words[1:])
    for word in rest:
        if word in PLACES:
            next(rest, None)
        elif word.partition("=")[0] not in PLACES:
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{Path(words[0]).name}", *kept])


def quartiles(name: str, values: Sequence[float], unit: str = "") -> dict[str, float]:
    """Return the median and the quartiles as figures: ``name``, ``name_first``, ``name_third``."""
    first, median, third = statistics.quantiles(values, n=4)
    return {f"{name}{unit}": median, f"{name}_first{unit}": first, f"{name}_third{unit}": third}


def write(
    path: Path | None, rows: Rows, *, libraries: Iterable[str] = (), command: str = ""
) -> None:
    """Write the figures of a run into a file; do nothing if none was asked for.

    Parameters
    ----------
    path : Path or None
        What ``--json`` named.
    rows : mapping
        The named figures of each row.
    libraries : iterable of str
        Distributions whose versions matter; those that are not installed are left out.
    command : str
        If it is not that of this process.
    """
    if path is None:
        return
    record = {
        **_run(command),
        "machine": machine(),
        "libraries": dict(_versions(libraries)),
        "note": "",
        "rows": rows,
    }
    path.write_text(text_of(record))


def stamp(command: str = "") -> str:
    """Return what says in a plot of which run it is."""
    run = _run(command)
    return f"{run['command']}, oobpickle {run['version']} ({run['commit']}), {run['date']}"


def _run(command: str) -> dict[str, str]:
    import oobpickle  # only now: the plain side of a comparison must never import it

    return {
        "command": command or command_of(sys.argv),
        "version": oobpickle.__version__,
        "commit": _commit(Path(oobpickle.__file__)),
        "date": _DAY,
    }


def text_of(record: Mapping[str, object]) -> str:
    """Return the JSON, with a line for each row."""
    *head, (_, rows) = record.items()
    assert isinstance(rows, Mapping)
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head]
    of_rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return "{\n" + ",\n".join([*lines, f' "rows": {{\n{of_rows}\n }}']) + "\n}\n"


def machine() -> dict[str, object]:
    """Return what it was measured on."""
    memory_kib = _found("/proc/meminfo", r"^MemTotal:\s+(\d+)")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _found("/proc/cpuinfo", r"^model name\s*:\s*(.*)$") or platform.machine(),
        "memory": f"{int(memory_kib) * _KIB / _GIB:.0f} GiB",
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load": _LOAD,
    }


def _found(path: str, pattern: str) -> str:
    found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    return found[1].strip() if found else ""


def _versions(libraries: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _commit(imported: Path) -> str:
    if imported.resolve().parents[1] != PROJECT / "src":
        return ""
    head = _git("rev-parse", "--short=9", "HEAD")
    changed = _git("status", "--porcelain", "--", "src", "benchmarks", "setup.py")
    return f"{head}+changes" if head and changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PROJECT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
