"""Working multiprocessing code inside ``enabled()`` does what it did, with less copying."""

import os

import pytest

from conftest import by_start_method
from process.harness import PROGRAMS, cases_of, environment, run_program

PRELOADING_PATH = os.pathsep.join([environment()["PYTHONPATH"], str(PROGRAMS)])


def _takes_a_start_method(case):
    return f"def {case}(method)" in (PROGRAMS / "pool.py").read_text()


CASES = cases_of("pool")


@pytest.mark.parametrize(
    ("case", "start_method"), by_start_method([c for c in CASES if _takes_a_start_method(c)])
)
def test_pool_with(case, start_method):
    run_program("pool", case, start_method)


@pytest.mark.parametrize("case", [case for case in CASES if not _takes_a_start_method(case)])
def test_pool(case):
    run_program("pool", case)


def test_install_at_the_top_level_of_the_main_module(start_method):
    run_program("top_level", start_method)


def test_install_in_a_module_that_the_fork_server_preloads():
    run_program("top_level", "forkserver", "preload", env={"PYTHONPATH": PRELOADING_PATH})
