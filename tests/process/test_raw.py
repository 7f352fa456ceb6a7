"""Readers without a connection, and those who never load: nothing is lost, and nothing stays."""

import pytest

from conftest import by_start_method
from process.harness import PROGRAMS, cases_of, run_program


def _takes_a_start_method(case):
    return f"def {case}(method)" in (PROGRAMS / "raw.py").read_text()


CASES = cases_of("raw")


@pytest.mark.parametrize(
    ("case", "start_method"), by_start_method([c for c in CASES if _takes_a_start_method(c)])
)
def test_raw_with(case, start_method):
    run_program("raw", case, start_method)


@pytest.mark.parametrize("case", [case for case in CASES if not _takes_a_start_method(case)])
def test_raw(case):
    run_program("raw", case)
