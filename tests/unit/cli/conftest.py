"""Commands as a user calls them, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import oobpickle

SOURCE = Path(oobpickle.__file__).parents[1]


@pytest.fixture
def command(tmp_path):
    """Call ``python -m oobpickle`` in a folder of its own; return what came of it."""

    def call(*arguments, source=SOURCE, python=(), timeout=120):
        return subprocess.run(
            [sys.executable, *python, "-m", "oobpickle", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call
