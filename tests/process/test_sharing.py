"""One memory for all, in real processes: see ``programs/sharing.py``."""

import pytest

from conftest import by_turns_of_start_methods
from process.harness import PROGRAMS, cases_of, run_program

CASES = cases_of("sharing")


def _takes_a_start_method(case):
    return f"def {case}(method)" in (PROGRAMS / "sharing.py").read_text()


@pytest.mark.parametrize(
    ("case", "start_method"),
    by_turns_of_start_methods([case for case in CASES if _takes_a_start_method(case)]),
)
def test_sharing_with(case, start_method):
    run_program("sharing", case, start_method, within_s=100)


@pytest.mark.parametrize("case", [case for case in CASES if not _takes_a_start_method(case)])
def test_sharing(case):
    run_program("sharing", case)
