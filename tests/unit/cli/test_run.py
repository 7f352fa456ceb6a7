"""``oobpickle run``: the program sees what it sees with ``python PROGRAM``."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import multiprocessing, os, sys, threading
    import numpy as np

    class Model:
        def __init__(self, n):
            self.array = np.full(n, 2.0)

    def make(n):
        return Model(n)

    def total(model):
        return float(model.array.sum())

    if __name__ == "__main__":
        import oobpickle
        with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
            models = pool.map(make, [50_000] * 3)
            print(sum(pool.map(total, models)), type(models[0]) is Model)
        print(oobpickle.statistics().n_messages_out_of_band > 2)
"""
SEEN = """
    import __main__, sys, os
    print(__name__, os.path.basename(__file__), sys.argv, sys.path[0], __spec__, __package__)
    with open(__file__) as file:
        print(file.readline() == "import __main__, sys, os\\n", __doc__, __builtins__)
    print(vars(__main__) is globals(), sorted(globals()), __loader__.get_filename())
    import argparse
    print(argparse.ArgumentParser().prog)
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="program.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(textwrap.dedent(text).lstrip())
        return path

    return write


def plainly(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["program.py", "folder/program.py"])
def test_functions_and_classes_of_the_program_under_each_start_method(
    command, written, start_method, name
):
    written(PROGRAM, name)
    child = command("run", "--capacity", "256MiB", name, start_method, python=["-W", "error"])

    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "300000.0 True\nTrue\n"


def test_a_module_with_relative_imports(command, written, start_method):
    written("", "package/__init__.py")
    written("N = 50_000\n", "package/numbers_of_it.py")
    program = textwrap.dedent(PROGRAM).replace("50_000", "N")
    written("from .numbers_of_it import N\n" + program, "package/program.py")
    child = command("run", "-m", "package.program", start_method, python=["-W", "error"])

    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "300000.0 True\nTrue\n"


def test_a_package_with_a_main_module(command, written, tmp_path):
    written("", "package/__init__.py")
    written(
        "import sys\nprint(__name__, __package__, __spec__.name, sys.argv)", "package/__main__.py"
    )
    child = command("run", "-m", "package", "a", "-b")

    assert child.stdout == plainly(tmp_path, "-m", "package", "a", "-b").stdout
    assert child.stderr == ""


@pytest.mark.parametrize("name", ["program.py", "folder/program.py"])
def test_what_a_script_sees_of_itself(command, written, tmp_path, name):
    written(SEEN, name)
    child = command("run", name, "-x", "--capacity", "y", "-m")
    expected = plainly(tmp_path, name, "-x", "--capacity", "y", "-m")

    assert (child.stdout, child.stderr) == (expected.stdout, "")


ENDS = {
    "it ends": "print('end')",
    "exit": "import sys; sys.exit(3)",
    "exit without a number": "import sys; sys.exit()",
    "exit with a text": "import sys; sys.exit('no more')",
    "an error": "def f():\n    return 1 / 0\nf()",
    "a chain": "try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError('x') from e",
    "a group": "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])",
    "a syntax error": "print(1\n",
    "a note": "e = ValueError('x'); e.add_note('noted'); raise e",
    "a hook of its own": "import sys, traceback\n"
    "sys.excepthook = lambda *e: print('mine', traceback.format_exception(*e))\n1 / 0",
    "at exit": "import atexit; atexit.register(print, 'last'); raise SystemExit(5)",
    "at once": "import os; os._exit(4)",
    "interrupted": "raise KeyboardInterrupt",
    "interrupted by the signal": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    "while 1:\n    0",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "a thread that goes on": "import threading, time\n"
    "threading.Timer(0.2, print, ['late']).start(); print('early')",
}


@pytest.mark.parametrize("name", ENDS)
def test_it_ends_as_with_python(command, written, tmp_path, name):
    written(ENDS[name])
    child, expected = command("run", "program.py"), plainly(tmp_path, "program.py")

    assert child.returncode == expected.returncode
    assert child.stdout == expected.stdout
    assert child.stderr == expected.stderr


def test_a_report(command, written, tmp_path):
    written(PROGRAM)
    child = command("run", "--report", "report.html", "program.py", "fork")
    text = (tmp_path / "report.html").read_text()

    assert (child.returncode, child.stderr) == (0, "")
    assert "large messages out of band" in text
    assert "<polyline" in text


def test_a_report_of_a_program_that_fails_or_forks(command, written, tmp_path):
    written("import os\nif os.fork() == 0:\n    raise SystemExit\nos.wait()\n1 / 0")
    child = command("run", "--report", "report.html", "program.py")

    assert child.returncode == 1
    assert child.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "no message was large enough" in (tmp_path / "report.html").read_text()


def test_a_nested_block_is_the_same_arena(command, written):
    written(
        "import oobpickle\nwith oobpickle.enabled() as arena:\n    print(arena.options.capacity)"
    )

    assert command("run", "--capacity", "64MiB", "program.py").stdout == f"{64 << 20}\n"


def test_without_an_arena_the_program_runs(command, written):
    written("print('done')")
    os.environ["OOBPICKLE_BACKING"] = "nothing"
    try:
        child = command("run", "program.py")
    finally:
        del os.environ["OOBPICKLE_BACKING"]

    assert (child.returncode, child.stdout) == (0, "done\n")
    assert "oobpickle is not in use" in child.stderr


def test_the_signal_is_what_whoever_waits_sees(command, written):
    written("raise KeyboardInterrupt")

    assert command("run", "program.py").returncode == -signal.SIGINT
