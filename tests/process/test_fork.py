"""After a fork parent and child have ordinary memory, whatever either does next."""

import os
import subprocess
import sys

import pytest

from process.harness import SOURCE, cases_of, run_program


@pytest.mark.parametrize("case", cases_of("fork"))
def test_fork(case):
    run_program("fork", case)


@pytest.mark.parametrize("case", cases_of("fork_limits"))
def test_fork_with_more_blocks_than_mappings(case):
    run_program("fork_limits", case)


@pytest.mark.parametrize("case", cases_of("fork_from_c"))
def test_fork_from_c(case):
    run_program("fork_from_c", case)


@pytest.mark.parametrize("case", cases_of("births"))
def test_a_child(case):
    run_program("births", case)


IN_SUBINTERPRETERS = """
import os
import _xxsubinterpreters as subinterpreters

for _ in range(2):
    code = "try: import oobpickle._core\\nexcept ImportError: pass"
    subinterpreters.run_string(subinterpreters.create(), code)
pid = os.fork()
if pid == 0:
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="CPython aborts there, also without us")
def test_a_fork_after_subinterpreters_have_made_the_module_again():
    command = [sys.executable, "-c", IN_SUBINTERPRETERS]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    assert done.stdout == "0\n", done.stderr
