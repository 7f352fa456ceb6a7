"""What the figures say: the table of a row, places, and whether the goal is reached.

What
    `figures` makes the columns of one cell, `judge` the verdict of one row, `lines` the text.

How it works
    A ratio is that of the medians within a round, theirs over ours, and the figure is the median
    over the rounds that both have. Above 1 oobpickle is faster.

Lifetime
    Pure functions of the cells.

When it cannot
    A row without figures of oobpickle has no ratios and no verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from _peer_harness import Cell
from _peer_rows import Row

OURS = "oobpickle"
MAX_OF_BEST = 1.1  # Goal: no further from the best that does not deliver by value.


@dataclass(frozen=True)
class Figures:
    """What the table shows of one cell."""

    median_s: float
    best_s: float
    n_messages: int
    gigabytes_per_s: float
    ratio: float | None
    peak_nbytes: int
    is_writable: bool | None
    is_private: bool | None

    @property
    def is_by_value(self) -> bool:
        """Whether the receiver may write, and nobody sees it."""
        return bool(self.is_writable and self.is_private)


@dataclass(frozen=True)
class Verdict:
    """Where oobpickle stands in one row; ratios are its time over theirs, below 1 it is faster."""

    place: int
    n_by_value: int
    best_by_value: str
    of_best_by_value: float | None
    best_of_others: str
    of_best_of_others: float | None
    is_goal_reached: bool


def figures(row: Row, cell: Cell, known: Cell | None = None) -> Figures | None:
    """The figures of a cell; None if it failed.

    `known` is a cell of the same peer and workload in which it was tried out what is held.
    """
    seconds = [duration_s for durations_s in cell.rounds.values() for duration_s in durations_s]
    if cell.failure or not seconds:
        return None
    held = cell if cell.is_writable is not None or known is None else known
    median_s = statistics.median(seconds)
    return Figures(
        median_s=median_s,
        best_s=min(seconds),
        n_messages=len(seconds),
        gigabytes_per_s=row.n_transfers * row.nbytes / median_s / 1e9,
        ratio=statistics.median(cell.ratios) if cell.ratios else None,
        peak_nbytes=cell.peak_nbytes,
        is_writable=held.is_writable,
        is_private=held.is_private,
    )


def compare(cells: Mapping[str, Cell]) -> None:
    """Note in each cell the ratios within the rounds that it has in common with oobpickle's.

    All cells are of one run: rounds of different runs have nothing in common.
    """
    ours = cells.get(OURS)
    for cell in cells.values() if ours is not None else ():
        assert ours is not None
        cell.ratios = [
            statistics.median(durations_s) / statistics.median(ours.rounds[index])
            for index, durations_s in cell.rounds.items()
            if index in ours.rounds
        ]


def judge(row: Row, all_figures: Mapping[str, Figures]) -> Verdict | None:
    """Compare oobpickle with the others of a row; None if it has no figures."""
    if OURS not in all_figures:
        return None
    ratios: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    for name, found in all_figures.items():
        if name != OURS and found.ratio is not None:
            ratios[found.is_by_value].append((found.ratio, name))
    by_value, others = sorted(ratios[True]), sorted(ratios[False])
    place = 1 + sum(ratio < 1 for ratio, _ in by_value)
    is_near = not others or 1 / others[0][0] <= MAX_OF_BEST
    return Verdict(
        place=place,
        n_by_value=1 + len(by_value),
        best_by_value=by_value[0][1] if by_value else "",
        of_best_by_value=1 / by_value[0][0] if by_value else None,
        best_of_others=others[0][1] if others else "",
        of_best_of_others=1 / others[0][0] if others else None,
        is_goal_reached=all_figures[OURS].is_by_value and place == 1 and is_near,
    )


def lines(row: Row, cells: Mapping[str, Cell], known: Mapping[str, Cell]) -> list[str]:
    """The table of one row, the fastest first, what failed last; and the verdict."""
    all_figures = {}
    for name, cell in cells.items():
        found = figures(row, cell, known.get(name))
        if found is not None:
            all_figures[name] = found
    text = [f"{row.name}  ({row.n_workers} workers)" if row.n_workers > 1 else row.name]
    for name, found in sorted(all_figures.items(), key=_rank):
        text.append(f"  {name:22}" + _cells(found))
    text += [f"  {name:22}  {cell.failure}" for name, cell in cells.items() if cell.failure]
    return [*text, *_verdict_lines(row, judge(row, all_figures)), ""]


def rows_of(
    all_figures: Mapping[Row, Mapping[str, Figures]],
) -> Iterator[tuple[str, dict[str, object]]]:
    """Return what ``--json`` writes: the verdict of each row, and the figures of each peer."""
    for row, of_peers in all_figures.items():
        verdict = judge(row, of_peers)
        if verdict is not None:
            yield row.name, {**asdict(verdict), "is_judged": row.is_judged}
        for name, found in sorted(of_peers.items(), key=_rank):
            yield f"{row.name} {name}", {**asdict(found), "held": held(found)}


def _rank(item: tuple[str, Figures]) -> float:
    return item[1].ratio if item[1].ratio is not None else item[1].median_s


def header() -> str:
    """The head of the table."""
    return (
        f"  {'peer':22}{'median':>11}{'best':>11}{'n':>5}{'GB/s':>8}{'ratio':>9}"
        f"{'peak MiB':>10}  receiver's array"
    )


def _cells(found: Figures) -> str:
    ratio = f"{found.ratio:.3g}" if found.ratio is not None else ""
    return (
        f"{seconds(found.median_s):>11}{seconds(found.best_s):>11}{found.n_messages:>5}"
        f"{found.gigabytes_per_s:>8.3g}{ratio:>9}{found.peak_nbytes / (1 << 20):>10.0f}  "
        f"{held(found)}"
    )


def held(found: Figures) -> str:
    """What the receiver holds, in words."""
    if found.is_writable is None:
        return "not tried"
    if not found.is_writable:
        return "read-only"
    return "private" if found.is_private else "writable, shared"


def seconds(duration_s: float) -> str:
    """A duration with three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if duration_s * factor >= 1:
            return f"{duration_s * factor:.3g} {unit}"
    return f"{duration_s * 1e6:.3g} us"


def _verdict_lines(row: Row, verdict: Verdict | None) -> list[str]:
    if verdict is None:
        return ["  -> no figures of oobpickle"]
    text = f"  -> by value: place {verdict.place} of {verdict.n_by_value}"
    if verdict.of_best_by_value is not None:
        text += f", {verdict.of_best_by_value:.3g} of the time of {verdict.best_by_value}"
    if verdict.of_best_of_others is not None:
        text += f"; of the others {verdict.of_best_of_others:.3g} of {verdict.best_of_others}"
    if row.is_judged:
        text += "" if verdict.is_goal_reached else "   GOAL NOT REACHED"
    return [text + ("" if row.is_judged else "   (not judged: not above 1 MiB)")]
