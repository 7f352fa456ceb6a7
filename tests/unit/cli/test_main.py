"""The command line: what is wrong with the arguments is said in a line."""

import pickle
import sys

import pytest

from oobpickle._cli.main import main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "oobpickle: error: the following arguments are required: COMMAND"),
        (["nothing"], "oobpickle: error: argument COMMAND: invalid choice: 'nothing'"),
        (["doctor", "--bad"], "oobpickle: error: unrecognized arguments: --bad"),
        (["doctor", "--pid", "none"], "oobpickle doctor: error: argument --pid: invalid int value"),
        (["doctor", "--pid", "0"], "oobpickle: error: there is no process 0"),
        (["explain"], "oobpickle explain: error: the following arguments are required"),
        (["explain", "nowhere.pkl"], "cannot read nowhere.pkl: No such file or directory"),
        (["explain", "nowhere:x"], "cannot import 'nowhere': ModuleNotFoundError"),
        (["explain", "os:nothing"], "module 'os' has no 'nothing'"),
        (["explain", __file__], "cannot be unpickled: "),
        (["run"], "oobpickle run: error: the following arguments are required: PROGRAM"),
        (["run", "nowhere.py"], "cannot read nowhere.py: No such file or directory"),
        (["run", "."], ". is a folder"),
        (["run", "-m", "nowhere"], "there is no module 'nowhere'"),
        (["run", "-m", "nowhere.at.all"], "cannot find module 'nowhere.at.all'"),
        (["run", "--capacity", "much", __file__], "capacity is no number of bytes: 'much'"),
        (["run", "--spill-dir", "no/where", __file__], "spill_dir cannot be used"),
        (["run", "--report", "no/where.html", __file__], "there is no folder no for the report"),
    ],
)
def test_one_clear_line_and_exit_2(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())  # `run -m` puts the current folder first
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()

    assert code == 2
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_python_m(command):
    child = command("--help")

    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith("usage: oobpickle ")
    assert all(name in child.stdout for name in ("doctor", "bench", "explain", "run"))


@pytest.mark.parametrize("n", [1, 500])  # all of it is in the buffer of stdout, or not
def test_a_reader_that_has_seen_enough(command, tmp_path, n):
    (tmp_path / "large.pkl").write_bytes(pickle.dumps(dict.fromkeys(range(n), "x" * 5000)))
    program = "import os, subprocess, sys; os.environ.pop('PYTHONUNBUFFERED', None); "
    program += "p = subprocess.Popen([sys.executable, '-m', 'oobpickle', 'explain', 'large.pkl'], "
    program += "stdout=subprocess.PIPE, stderr=subprocess.PIPE); "
    program += "p.stdout.close(); sys.exit(len(p.stderr.read()) or p.wait() not in (0, 1))"
    (tmp_path / "head.py").write_text(program)

    assert command("run", "head.py").returncode == 0
