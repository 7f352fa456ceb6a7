"""Copies that two threads make: nothing is left of the second, and nothing is torn."""

import pytest

from process.harness import cases_of, run_program


@pytest.mark.parametrize("case", cases_of("copying"))
def test_copying(case):
    run_program("copying", case, flags=("-W", "error"))
