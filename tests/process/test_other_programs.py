"""Programs that are started without `subprocess`: they load what comes by the ends they inherit."""

import pytest

from conftest import by_start_method
from process.harness import PROGRAMS, cases_of, run_program


def _takes_a_start_method(case):
    return f"def {case}(method)" in (PROGRAMS / "other_programs.py").read_text()


CASES = cases_of("other_programs")


@pytest.mark.parametrize(
    ("case", "start_method"), by_start_method([c for c in CASES if _takes_a_start_method(c)])
)
def test_other_programs_with(case, start_method):
    run_program("other_programs", case, start_method)


@pytest.mark.parametrize("case", [case for case in CASES if not _takes_a_start_method(case)])
def test_other_programs(case):
    run_program("other_programs", case)
