"""How cost grows: with the arrays of a message, the blocks of the arena, the processes, the size.

What
    ``python benchmarks/scaling.py`` varies one number per row over several decades, prints what an
    operation took at each step, and by which factor a unit of work is dearer at the last one. With
    ``--check`` it exits 1 and names each line that grows faster than its work.

How it works
    As ``transfer.py``: sides in processes of their own (``_scaling_side.py``), plain and oobpickle
    in turn within a round. ``_scaling_rows.py`` says what is varied, ``_growth.py`` what is too
    much.

Lifetime
    Each row starts sides of its own and ends them.

When it cannot
    Steps that need more memory than there is are left out, and said. A row whose side fails falls
    short. ``--plots`` needs matplotlib.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from pathlib import Path
from typing import Any

import _driver
import _figures
from _growth import Series, Step
from _harness import OtherWork, SideError
from _scaling_rows import ROWS, Options
from _scaling_side import ScalingSide
from transfer import _facts, _seconds


def _print_series(series: Series) -> None:
    against = f", {series.reference}" if series.reference else ""
    each = "each of them" if series.is_each else "one, whatever their number"
    print(f"\n{series.name}: by {series.unit}, the work is {each}")
    reference = [series.reference, "each", "ratio"] if series.reference else []
    _print_line([series.unit, "oobpickle", "each", *reference])
    for step in series.steps:
        _print_line([f"{step.n:,}", *_cells(series, step)])
    exponent, reference_growth = series.exponent(), series.reference_growth()
    words = [f"growth {series.growth():.2f}"]
    words += [f"exponent {exponent:.2f}"] if exponent is not None else []
    words += [f"growth of{against[1:]} {reference_growth:.2f}"] if reference_growth else []
    words += [f"{key}: {value}" for key, value in series.facts.items() if type(value) is str]
    print(f"  {', '.join(words)}; {series.shortfall() or 'ok'}")
    _print_facts(series)


def _cells(series: Series, step: Step) -> list[str]:
    cells = [_seconds([series.cost_s(step)]), _seconds([series.unit_s(step)])]
    if step.reference_s:
        median_s = series.reference_cost_s(step)
        cells += [_seconds([median_s]), _seconds([median_s / series.work(step.n)])]
        cells += [f"{median_s / series.cost_s(step):.2f}"]
    return cells


def _print_facts(series: Series) -> None:
    rows = {n: facts for n, facts in series.facts.items() if isinstance(facts, dict)}
    for name in next(iter(rows.values()), {}):
        print(f"  {name}: " + ", ".join(f"{n} {facts[name]:.3g}" for n, facts in rows.items()))


def _print_line(cells: list[str]) -> None:
    print(f"  {cells[0]:>24}" + "".join(f"{cell:>13}" for cell in cells[1:]))


def _run_row(name: str, options: Options) -> tuple[list[Series], dict[str, Any]]:
    other_work, start_s = OtherWork(), time.monotonic()
    found: list[Series] = []
    values: dict[str, Any] = {"error": ""}
    try:
        for series in ROWS[name](options):
            _print_series(series)
            found.append(series)
    except (SideError, ValueError) as error:
        print(error, file=sys.stderr)
        values["error"] = str(error)
    values["seconds"], values["busy_with_others"] = (
        time.monotonic() - start_s,
        other_work.n_cores(),
    )
    others = f"other work kept {values['busy_with_others']:.2f} cores busy"
    print(f"\n{name}: {values['seconds']:.0f} s; {others}", flush=True)
    return found, values


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a line grows too fast")
    parser.add_argument("--rows", default="*", help="only the rows that match, as arrays-*")
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    parser.add_argument("--batches", type=Path, metavar="FILE", help="write all batches there")
    _figures.add_option(parser)
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write a plot of each row there")
    parser.add_argument("--side", choices=["plain", "oobpickle", "page"], help=argparse.SUPPRESS)
    parser.add_argument("--start-method", default="fork", help=argparse.SUPPRESS)
    return parser.parse_args()


def _plot_function() -> Any:
    try:
        from _scaling_plots import plot_row
    except ImportError as error:
        sys.exit(f"--plots needs matplotlib ({error}): pip install --group benchmarks")
    return plot_row


def main() -> int:
    arguments = _parse()
    if arguments.side:
        _driver.main(arguments.side, arguments.start_method, ScalingSide)
        return 0
    plot_row = _plot_function() if arguments.plots else None
    options = Options(arguments.quick)
    facts = _facts()
    print(*(f"{name}: {fact}" for name, fact in facts.items()), sep="\n")
    start_s = time.monotonic()
    stored, short = {}, []
    figures: dict[str, dict[str, object]] = {}
    for name in fnmatch.filter(ROWS, arguments.rows):
        found, values = _run_row(name, options)
        short += [series.name for series in found if series.shortfall()]
        short += [name] if values["error"] else []
        figures |= {key: row for series in found for key, row in series.figures()}
        stored[name] = {**values, "series": [series.stored() for series in found]}
        if plot_row is not None:
            plot_row(name, found, arguments.plots)
    print(f"\n{len(stored)} rows in {time.monotonic() - start_s:.0f} s")
    if arguments.batches:
        arguments.batches.write_text(json.dumps({"facts": facts, "rows": stored}, indent=1))
    _figures.write(arguments.json, figures)
    print(f"{len(short)} grow faster than their work, or failed: {', '.join(short) or 'none'}")
    return 1 if arguments.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
