"""merge with processes: the results, the errors, the deaths, and what is left behind."""

import pytest

from conftest import by_turns_of_start_methods
from process.harness import cases_of, run_program


@pytest.mark.parametrize(("case", "start_method"), by_turns_of_start_methods(cases_of("merging")))
def test_merging_with(case, start_method):
    # The workers of a pool whose parent was killed complain of their pipes.
    complaints = "..." if case == "the_parent_is_killed" else ""
    run_program("merging", case, start_method, stderr=complaints)
