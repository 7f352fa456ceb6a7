"""Arrays of loaded files between processes: as their place in the file, or by value."""

import os
import sys

import pytest

from conftest import by_turns_of_start_methods
from process.harness import cases_of, run_program

AS_ROOT = {"another_user", "another_root", "another_mount", "who_cannot_open_it_sends_the_bytes"}


@pytest.mark.parametrize(("_", "start_method"), by_turns_of_start_methods([""]))
def test_everywhere(_, start_method):
    run_program("in_files", "everywhere", start_method)


@pytest.mark.parametrize("case", [c for c in cases_of("in_files") if c != "everywhere"])
def test_in_files(case):
    if case in AS_ROOT and os.geteuid() != 0:
        pytest.skip("only root can")
    if case == "another_mount" and sys.version_info < (3, 12):
        pytest.skip("os.unshare is new in 3.12")
    run_program("in_files", case)
