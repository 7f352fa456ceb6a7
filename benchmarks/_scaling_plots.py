"""The plots of ``scaling.py``: one file for each row, cost over the number, both logarithmic.

What
    `plot_row` draws the series of a row: oobpickle, what it is compared with, and a dotted line of
    what the cost would be if it grew as the work does.

How it works
    The line of proportional growth goes through the last step. On the left, what lies above it has
    a fixed part, and what lies below it grows faster than the work.

Lifetime
    Writes ``scaling-ROW.svg`` into the directory, which is made if it is not there.

When it cannot
    Importing this module needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _figures
import matplotlib as mpl
from _growth import Series
from matplotlib.figure import Figure

_COLUMNS = 3
_INCHES = (4.0, 3.1)  # of one series


def plot_row(name: str, found: list[Series], directory: Path) -> None:
    """Draw the series of a row into ``directory/scaling-NAME.svg``."""
    drawn = [series for series in found if len(series.steps) > 1]
    if not drawn:
        return
    n_columns = min(_COLUMNS, len(drawn))
    n_rows = -(-len(drawn) // n_columns)
    # No dates and no random names in it: the same figures give the same file.
    mpl.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none"})
    figure = Figure((_INCHES[0] * n_columns, _INCHES[1] * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
    for series, one in zip(drawn, axes, strict=False):
        _draw(series, one)
    for empty in list(axes)[len(drawn) :]:
        empty.set_visible(False)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Source": _figures.stamp()}
    figure.savefig(directory / f"scaling-{name}.svg", metadata=metadata)


def _draw(series: Series, axes: Any) -> None:
    numbers = [step.n for step in series.steps]
    costs_s = [series.cost_s(step) for step in series.steps]
    axes.loglog(numbers, costs_s, "o-", label="oobpickle")
    compared = [step for step in series.steps if step.reference_s]
    if compared:
        reference_s = [series.reference_cost_s(step) for step in compared]
        axes.loglog([step.n for step in compared], reference_s, "s-", label=series.reference)
    works = [series.work(n) for n in numbers]
    each_s = costs_s[-1] / works[-1]
    label = "proportional to the number" if series.is_each else "the same at any number"
    axes.loglog(numbers, [each_s * work for work in works], "k:", label=label)
    low = min([*costs_s, *(s for step in compared for s in step.reference_s)])
    axes.set_ylim(bottom=low / 3)  # the line goes on below, where a fixed part is what counts
    axes.set_title(series.name, fontsize=10)
    axes.set_xlabel(series.unit, fontsize=8)
    axes.set_ylabel("seconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
