"""The tables of measured figures: each is what the script makes of a benchmark's file.

What a benchmark writes, and what the script expects of it, are compared where that takes a second.
"""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import oobpickle

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "docs" / "figures"
BENCHMARKS = PROJECT / "benchmarks"
FILES = sorted(FOLDER.glob("*.json"))


def load(path, monkeypatch):
    """Return a module that is in no package."""
    monkeypatch.syspath_prepend(str(path.parent))
    return importlib.import_module(path.stem)


@pytest.fixture
def tables(monkeypatch):
    return load(FOLDER / "tables.py", monkeypatch)


@pytest.fixture
def figures(monkeypatch):
    return load(BENCHMARKS / "_figures.py", monkeypatch)


def test_every_table_is_what_the_script_makes(tables):
    stale = [
        path.name
        for path in tables.documents()
        if tables.filled(path.read_text()) != path.read_text()
    ]

    assert stale == [], "run: python docs/figures/tables.py"


def test_every_table_stands_in_a_document(tables):
    texts = [path.read_text() for path in tables.documents()]
    found = [name for text in texts for name in tables.marked(text)]

    assert set(found) == set(tables.TABLES)
    # Every line that begins a table was understood: none has lost its end.
    assert sum(len(re.findall("^<!-- figures: ", text, re.MULTILINE)) for text in texts) == len(
        found
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| 2,000 small tasks | 0.98", "| 2,000 small tasks | 1.98"),
        ("2 cores", "4 cores"),
    ],
)
def test_a_table_that_was_edited_by_hand_is_noticed(tables, old, new):
    text = f"# Title\n\n<!-- figures: joblib -->\n{tables.TABLES['joblib']()}\n\n<!-- end -->\n"
    assert tables.filled(text) == text
    assert old in text

    assert tables.filled(text.replace(old, new)) == text


def test_an_unknown_table_is_an_error(tables):
    with pytest.raises(ValueError, match="no table is called 'jobs'"):
        tables.filled("<!-- figures: jobs -->\n<!-- end -->\n")


def test_figures_of_another_command_are_an_error(tables, monkeypatch, tmp_path):
    found = json.loads((FOLDER / "joblib.json").read_text())
    found["command"] += " --passes 1"
    (tmp_path / "joblib.json").write_text(json.dumps(found))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)

    with pytest.raises(ValueError, match="passes 1"):
        tables.with_joblib()


def test_a_plot_is_of_the_run_of_its_figures(tables):
    for name, folder in tables.PLOTS.items():
        plots = sorted((PROJECT / folder).glob(f"{name}-*.svg"))
        wanted = f"<dc:source>{tables.stamp(tables.load(name))}</dc:source>"

        assert plots
        assert [path.name for path in plots if wanted not in path.read_text()] == []


def test_a_plot_says_what_the_figures_say(tables, figures, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--plots", "here"])
    figures.write(tmp_path / "own.json", {})

    assert figures.stamp() == tables.stamp(json.loads((tmp_path / "own.json").read_text()))


def test_every_file_has_a_command_and_every_command_a_file(tables):
    assert {path.stem for path in FILES} == set(tables.SOURCES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_has_the_shape_that_a_benchmark_writes(path, figures, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["transfer.py"])
    figures.write(tmp_path / "own.json", {})
    own = json.loads((tmp_path / "own.json").read_text())
    found = json.loads(path.read_text())

    assert list(own) == list(found)
    assert set(own["machine"]) == set(found["machine"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["rows"]
    assert all(row for row in found["rows"].values())
    # What was measured can be looked up: the sources were those of a commit.
    assert re.fullmatch(r"[0-9a-f]{9}", found["commit"])
    assert figures.text_of(found) == path.read_text()


def test_every_command_is_one_of_a_benchmark_with_its_options(tables):
    for command in tables.SOURCES.values():
        words = shlex.split(command)
        text = (PROJECT / words[1]).read_text()
        text += (BENCHMARKS / "_peer_run.py").read_text() if "peers" in words[1] else ""

        assert words[0] == "python"
        assert [word for word in words if word[:2] == "--" and f'"{word}"' not in text] == []


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_writes_its_figures(path):
    text = path.read_text() + (BENCHMARKS / "_peer_run.py").read_text() * (path.stem == "peers")

    assert "_figures.add_option(parser)" in text
    assert "_figures.write(" in text


def test_what_a_benchmark_writes_is_what_the_script_reads(tables, monkeypatch, tmp_path):
    path = tmp_path / "steps.json"
    command = [sys.executable, str(BENCHMARKS / "steps.py"), "--passes", "1", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(oobpickle.__file__).parents[1])}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=100)
    found = json.loads(path.read_text())

    assert found["command"] == "python benchmarks/steps.py --passes 1"
    assert found["version"] == oobpickle.__version__
    assert set(tables._STEPS) <= set(found["rows"])


def test_a_command_has_no_names_of_files(figures):
    words = ["/somewhere/peers.py", "--rows", "a b", "--json", "a.json", "--plots=x", "--quick"]

    assert figures.command_of(words) == "python benchmarks/peers.py --rows 'a b' --quick"


@pytest.mark.parametrize("name", ["transfer", "with_joblib"])
def test_the_plain_side_of_a_comparison_has_no_oobpickle(name):
    code = f"import {name}, sys; sys.exit('oobpickle' in sys.modules)"
    path = os.pathsep.join([str(BENCHMARKS), str(Path(oobpickle.__file__).parents[1])])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False, timeout=100)

    assert done.returncode == 0


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_sources_that_are_not_as_committed_are_said_so(figures, monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    package = tmp_path / "src" / "oobpickle" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    monkeypatch.setattr(figures, "PROJECT", tmp_path)
    clean = figures._commit(package)
    package.write_text("changed = True\n")

    assert re.fullmatch(r"[0-9a-f]{9}", clean)
    assert figures._commit(package) == f"{clean}+changes"
    assert figures._commit(Path("/elsewhere/oobpickle/__init__.py")) == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.000875, "0.000875"),
        (1.0, "1"),
        (12.345, "12.3"),
        (999.6, "1,000"),
        (12345, "12,300"),
    ],
)
def test_numbers_have_three_digits(tables, number, text):
    assert tables.three(number) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(1.5, "1.5 s"), (0.9996, "1 s"), (0.0123, "12.3 ms"), (9.09e-5, "90.9 us"), (75.8, "75.8 s")],
)
def test_durations_have_a_unit(tables, duration_s, text):
    assert tables.seconds(duration_s) == text
