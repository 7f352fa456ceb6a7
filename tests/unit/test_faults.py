"""Fault points: nothing happens unless one is armed."""

import os
import signal
import subprocess
import sys

import pytest

from oobpickle import _faults


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_reaching_a_point_that_is_not_armed_does_nothing():
    _faults.reach("no such point")

    assert _faults._armed is None


def test_the_variable_kills_at_the_named_hit():
    code = "from oobpickle._faults import reach\nfor i in range(9): print(i, flush=1); reach('x')"

    result = run(code, OOBPICKLE_FAULT="x:3")

    assert -signal.SIGKILL == result.returncode
    assert b"0\n1\n2\n" == result.stdout


def test_another_point_does_not_kill():
    result = run("from oobpickle._faults import reach\nreach('y')", OOBPICKLE_FAULT="x")

    assert (0, b"") == (result.returncode, result.stderr)


def test_arming_none_disarms():
    result = run(
        "from oobpickle import _faults\n_faults.arm('x'); _faults.arm(None)\n_faults.reach('x')"
    )

    assert 0 == result.returncode


@pytest.mark.parametrize("name", ["TERM", "SEGV", "KILL"])
def test_the_variable_names_the_signal(name):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "from oobpickle._faults import reach\nfor i in range(9): print(i, flush=1); reach('x')"
    )

    result = run(code, OOBPICKLE_FAULT=f"x:2:{name}")

    assert -signal.Signals[f"SIG{name}"] == result.returncode
    assert b"0\n1\n" == result.stdout
