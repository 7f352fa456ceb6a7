"""multiprocess (dill) inside a block: unchanged programs, and what goes out of band."""

import importlib.util

import pytest

from conftest import by_start_method
from process.harness import PROGRAMS, cases_of, run_program

if importlib.util.find_spec("multiprocess") is None:
    pytest.skip(
        "multiprocess is not here; for CPython 3.15 its dill has no release yet",
        allow_module_level=True,
    )


def _takes_a_start_method(case):
    return f"def {case}(method)" in (PROGRAMS / "multiprocess_library.py").read_text()


CASES = cases_of("multiprocess_library")


@pytest.mark.parametrize(
    ("case", "start_method"), by_start_method([c for c in CASES if _takes_a_start_method(c)])
)
def test_multiprocess_with(case, start_method):
    run_program("multiprocess_library", case, start_method)


@pytest.mark.parametrize("case", [case for case in CASES if not _takes_a_start_method(case)])
def test_multiprocess(case):
    run_program("multiprocess_library", case)
