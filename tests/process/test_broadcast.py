"""One object for many: where it arrives, what it is there, and when its memory is free."""

import pytest

from conftest import by_start_method
from process.harness import PROGRAMS, cases_of, run_program

CASES = cases_of("broadcast")
SOURCE = (PROGRAMS / "broadcast.py").read_text()
WITH_METHOD = [case for case in CASES if f"def {case}(method)" in SOURCE]


@pytest.mark.parametrize(("case", "start_method"), by_start_method(WITH_METHOD))
def test_broadcast_with(case, start_method):
    run_program("broadcast", case, start_method)


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITH_METHOD])
def test_broadcast(case):
    run_program("broadcast", case)


@pytest.mark.parametrize("case", cases_of("early_hooks"))
def test_broadcast_where_others_have_hooks(case):
    run_program("early_hooks", case, fresh=True)
