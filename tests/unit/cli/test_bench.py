"""``oobpickle bench``: both sides, and the forms of the table."""

import json

import pytest

from oobpickle._cli import bench
from oobpickle._cli.bench import Times


@pytest.fixture
def _two_rows(monkeypatch):
    monkeypatch.setattr(bench, "_QUICK", ("1 MiB", "100,000 floats"))
    monkeypatch.setattr(bench, "_ROW_S", 0.01)


@pytest.mark.usefixtures("_two_rows")
def test_rows_of_both_sides(capsys):
    assert bench.bench(is_full=False, form="json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]

    assert list(rows) == ["1 MiB", "100,000 floats"]
    for row in rows.values():
        assert len(row["plain_s"]) == len(row["oobpickle_s"]) >= 3
        assert row["ratio"] > 0


STEADY, SHAKY = Times([2.0] * 5, [1.0] * 5), Times([1.0, 9.0, 2.0, 30.0], [1.0] * 4)


def test_forms(capsys):
    bench._as_markdown({"one": STEADY})
    assert capsys.readouterr().out.splitlines()[-1] == "| one | 2.0 s | 1.0 s | 2.00x |  |"
    bench._as_text({"one": STEADY, "two": SHAKY})
    steady, shaky = capsys.readouterr().out.splitlines()[1:]
    assert "unstable" not in steady
    assert shaky.endswith("may be unstable")


@pytest.mark.parametrize("name", sorted({*bench._QUICK, *bench._FULL} - {"512 MiB", "128 MiB"}))
def test_every_row_has_an_object(name):
    assert bench.object_named(name) is not None
