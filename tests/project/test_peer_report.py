"""The benchmark against peers ranks and judges as it says, on figures made by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_peer_report")


def row(name: str) -> Any:
    rows = importlib.import_module("_peer_rows").ROWS
    return next(row for row in rows if row.name == name)


def cell(*rounds_s: float, is_writable: bool = True, is_private: bool = True) -> Any:
    rounds = {index: [duration_s] for index, duration_s in enumerate(rounds_s)}
    made = importlib.import_module("_peer_harness").Cell
    return made(rounds=rounds, is_writable=is_writable, is_private=is_private)


def verdict_of(report: ModuleType, name: str, **cells: Any) -> Any:
    report.compare(cells)
    found = {peer: report.figures(row(name), cell) for peer, cell in cells.items()}
    return report.judge(row(name), found)


def test_ratio_is_the_median_within_rounds(report: ModuleType) -> None:
    ours, theirs = cell(1.0, 2.0, 4.0), cell(3.0, 2.0, 8.0, 100.0)

    report.compare({"oobpickle": ours, "Pool": theirs})
    found = report.figures(row("result-64M"), theirs)

    assert 2.0 == found.ratio  # Of 3, 1 and 2; ours had no fourth round.
    assert 5.5 == found.median_s
    assert 2.0 == found.best_s
    assert 4 == found.n_messages


def test_throughput_counts_each_model_that_crosses(report: ModuleType) -> None:
    found = report.figures(row("broadcast-1G"), cell(2.0))

    assert 4 * (1 << 30) / 2 / 1e9 == found.gigabytes_per_s


def test_failed_cell_has_no_figures_and_says_why(report: ModuleType) -> None:
    failed = cell(1.0)
    failed.failure = "out of memory: over 12 GiB"

    text = report.lines(row("result-1G"), {"oobpickle": cell(1.0), "Pool": failed}, {})

    assert report.figures(row("result-1G"), failed) is None
    assert any("Pool" in line and "out of memory" in line for line in text)


def test_goal_is_reached_by_the_first_by_value(report: ModuleType) -> None:
    verdict = verdict_of(
        report,
        "result-64M",
        oobpickle=cell(1.0),
        Pool=cell(9.0),
        Ray=cell(0.95, is_writable=False, is_private=False),
    )

    assert (1, 2, True) == (verdict.place, verdict.n_by_value, verdict.is_goal_reached)
    assert pytest.approx(1 / 9) == verdict.of_best_by_value
    assert ("Pool", "Ray") == (verdict.best_by_value, verdict.best_of_others)


def test_goal_fails_behind_another_by_value(report: ModuleType) -> None:
    verdict = verdict_of(report, "result-64M", oobpickle=cell(1.0), files=cell(0.99))

    assert (2, False) == (verdict.place, verdict.is_goal_reached)


@pytest.mark.parametrize(("theirs_s", "is_goal_reached"), [(0.92, True), (0.90, False)])
def test_goal_allows_ten_percent_to_those_that_share(
    report: ModuleType, theirs_s: float, is_goal_reached: bool
) -> None:
    verdict = verdict_of(
        report, "argument-1G", oobpickle=cell(1.0), view=cell(theirs_s, is_private=False)
    )

    assert is_goal_reached is verdict.is_goal_reached


def test_goal_fails_if_ours_is_not_by_value(report: ModuleType) -> None:
    verdict = verdict_of(
        report, "result-64M", oobpickle=cell(1.0, is_private=False), Pool=cell(9.0)
    )

    assert not verdict.is_goal_reached


def test_rows_up_to_one_mebibyte_are_not_judged(report: ModuleType) -> None:
    cells = {"oobpickle": cell(1.0), "files": cell(0.5)}
    report.compare(cells)

    small = "\n".join(report.lines(row("result-1M"), cells, {}))
    large = "\n".join(report.lines(row("result-64M"), cells, {}))

    assert "not judged" in small
    assert "GOAL" not in small
    assert "GOAL NOT REACHED" in large


def test_what_is_held_comes_from_the_row_in_which_it_was_tried(report: ModuleType) -> None:
    untried = cell(1.0)
    untried.is_writable = untried.is_private = None

    assert not report.figures(row("result-1G"), untried).is_by_value
    assert report.figures(row("result-1G"), untried, known=cell(2.0)).is_by_value
