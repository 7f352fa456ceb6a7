"""Plots of the comparison against peers.

What
    `draw` writes a figure with the latency over the size for each workload, and one with GB/s and
    peak memory of the largest rows.

How it works
    Colours are Okabe and Ito's, which stay apart for the colour-blind; each peer has a marker of
    its own besides. oobpickle is black and thick. Hollow bars: the receiver does not get a private
    writable object.

Lifetime
    Files are overwritten.

When it cannot
    matplotlib is imported here only, and its absence is an `ImportError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from _peer_report import OURS, Figures
from _peer_rows import SIZES, WORKLOADS, Row

AllFigures = Mapping[Row, Mapping[str, Figures]]

_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
_MARKERS = "osD^vP<>X*hdp"
_BAR_ROWS = ("result-1G", "argument-1G", "roundtrip-1G", "broadcast-1G", "map-500M", "merge-500M")


def _style(names: list[str], name: str) -> dict[str, Any]:
    if name == OURS:
        return {"color": "black", "marker": "o", "linewidth": 2.5, "zorder": 5}
    index = names.index(name)
    dashes = ("-", "--", ":")[index // len(_COLOURS) % 3]
    colour = _COLOURS[index % len(_COLOURS)]
    return {"color": colour, "marker": _MARKERS[index], "linestyle": dashes, "linewidth": 1.2}


def draw(all_figures: AllFigures, folder: Path, source: str) -> list[Path]:
    """Write all plots, with the source in each; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    # Small files, and the same ones for the same figures.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "peers"})
    names = [name for name in _names(all_figures) if name != OURS]
    metadata = {"Date": None, "Source": source}
    paths = [_draw_latency(all_figures, names, folder / "peers-latency.svg", metadata)]
    for quantity, label, title in (
        ("gigabytes_per_s", "GB/s", "Model bytes delivered and read per second"),
        ("peak_nbytes", "GiB", "Peak memory of all processes together"),
    ):
        path = folder / f"peers-{'throughput' if label == 'GB/s' else 'memory'}.svg"
        _draw_bars(all_figures, quantity, f"{title} ({label})", path, metadata)
        paths.append(path)
    return paths


def _names(all_figures: AllFigures) -> list[str]:
    names: dict[str, None] = {}
    for found in all_figures.values():
        names.update(dict.fromkeys(found))
    return list(names)


Metadata = dict[str, str | None]


def _draw_latency(
    all_figures: AllFigures, names: list[str], path: Path, metadata: Metadata
) -> Path:
    workloads = [workload for workload in WORKLOADS if workload != "map"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, workload in zip(axes.flat, workloads, strict=False):
        for name in [*names, OURS]:
            points = sorted(
                (row.nbytes, found[name].median_s)
                for row, found in all_figures.items()
                if row.workload == workload and name in found
            )
            if points:
                [handles[name]] = axis.plot(*zip(*points, strict=True), **_style(names, name))
        axis.set(xscale="log", yscale="log", title=workload, xlabel="size of the model", ylabel="s")
        if not axis.lines:
            axis.axis("off")
            continue
        sizes = {row.size for row in all_figures if row.workload == workload}
        axis.set_xticks([SIZES[size] for size in sizes], sizes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles.values(), handles.keys(), loc="center", fontsize=10)
    figure.suptitle("Median time until every byte of what arrived was read")
    figure.savefig(path, metadata=metadata)
    plt.close(figure)
    return path


def _draw_bars(
    all_figures: AllFigures, quantity: str, title: str, path: Path, metadata: Metadata
) -> None:
    rows = [row for row in all_figures if row.name in _BAR_ROWS and all_figures[row]]
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        axis.axis("on")
        _draw_row(axis, all_figures[row], quantity)
        axis.set_title(row.name)
    figure.suptitle(f"{title}; hollow: what arrives is read-only or shared")
    figure.savefig(path, metadata=metadata)
    plt.close(figure)


def _draw_row(axis: Any, found: Mapping[str, Figures], quantity: str) -> None:
    unit = 1 << 30 if quantity == "peak_nbytes" else 1
    values = {name: getattr(figures, quantity) / unit for name, figures in found.items()}
    order = sorted(values, key=values.__getitem__, reverse=quantity == "peak_nbytes")
    for position, name in enumerate(order):
        colour = "black" if name == OURS else "#56B4E9"
        fill = colour if found[name].is_by_value else "white"
        axis.barh(position, values[name], color=fill, edgecolor=colour)
        axis.text(values[name], position, f" {values[name]:.2g}", va="center", fontsize=8)
    axis.set_yticks(range(len(order)), order, fontsize=8)
    axis.set_xlim(0, max(values.values()) * 1.15)
