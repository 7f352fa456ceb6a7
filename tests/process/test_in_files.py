"""Arrays of loaded files between processes: as their place in the file, or by value."""

import os

import pytest

from conftest import by_turns_of_start_methods
from process.harness import cases_of, run_program

AS_ROOT = {"another_user", "another_root", "another_mount", "who_cannot_open_it_sends_the_bytes"}


def _is_root_mounted():
    with open("/proc/self/mountinfo") as file:
        return any(line.split()[4] == "/" for line in file)


@pytest.mark.parametrize(("_", "start_method"), by_turns_of_start_methods([""]))
def test_everywhere(_, start_method):
    run_program("in_files", "everywhere", start_method)


@pytest.mark.parametrize("case", [c for c in cases_of("in_files") if c != "everywhere"])
def test_in_files(case):
    if case in AS_ROOT and os.geteuid() != 0:
        pytest.skip("only root can")
    if case == "another_mount" and not _is_root_mounted():
        pytest.skip("below a root directory that is no mount, what is mounted cannot be private")
    run_program("in_files", case)
