"""After a fork parent and child have ordinary memory, whatever either does next."""

import pytest

from process.harness import cases_of, run_program


@pytest.mark.parametrize("case", cases_of("fork"))
def test_fork(case):
    run_program("fork", case)
