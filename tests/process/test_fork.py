"""After a fork parent and child have ordinary memory, whatever either does next."""

import pytest

from process.harness import cases_of, run_program


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
