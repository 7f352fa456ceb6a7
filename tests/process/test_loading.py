"""What cannot be loaded does not end a pool, and what cannot be pickled is not sent."""

import pytest

from process.harness import PROGRAMS, cases_of, run_program

CASES = cases_of("loading")
BY_METHOD = [c for c in CASES if f"def {c}(method)" in (PROGRAMS / "loading.py").read_text()]
#: The others have little to do with how a process is started.
EACH = ("pools_go_on",)


@pytest.mark.parametrize("case", EACH)
def test_loading_with(case, start_method):
    run_program("loading", case, start_method)


@pytest.mark.parametrize("case", [case for case in BY_METHOD if case not in EACH])
def test_loading_under_fork(case):
    run_program("loading", case, "fork")


@pytest.mark.parametrize("case", [case for case in CASES if case not in BY_METHOD])
def test_loading(case):
    run_program("loading", case)
