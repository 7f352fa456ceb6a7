"""The notebook of the examples, executed without a browser."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import oobpickle

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def outputs_of(notebook):
    """Return what each cell with code has shown, by type: its text, or what it is."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = []
    for cell in cells:
        texts = ["".join(one["text"]) for one in cell["outputs"] if one["output_type"] == "stream"]
        kinds = [kind for one in cell["outputs"] for kind in one.get("data", {})]
        shown.append(("".join(texts), sorted(kinds)))
    return shown


def test_nothing_in_it_was_executed_by_hand():
    assert {(text, *kinds) for text, kinds in outputs_of(json.loads(NOTEBOOK.read_text()))} == {
        ("",)
    }


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))),
    reason="needs nbclient and ipykernel",
)
def test_every_cell_runs(tmp_path):
    done = tmp_path / "done.ipynb"
    path = [str(Path(oobpickle.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-c", EXECUTE, NOTEBOOK, done],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert child.returncode == 0, child.stderr

    assert outputs_of(json.loads(done.read_text())) == [
        ("", []),
        ("True\n", []),
        ("", ["text/html", "text/plain"]),
        ("True 0\n", []),
        ("0\n", []),
    ]
