"""Others that have the same hooks: libraries with pools of their own, other picklers, reducers."""

import importlib.util

import pytest

from process.harness import run_program

LIBRARIES = (
    "multiprocess_with_fork",
    "multiprocess_with_spawn",
)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "case",
    [
        "library_used_before_inside_at_once_and_after",
        "library_first_used_inside",
        "what_is_not_served_is_said",
    ],
)
def test_with_another_library(case, library):
    name = library.split("_")[0]
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not here; for CPython 3.15 its dill has no release yet")
    run_program("owners", case, library)


def test_older_processes_are_counted(start_method):
    run_program("owners", "older_processes_are_counted_however_they_are_read", start_method)


@pytest.mark.parametrize("kind", ["pickler", "connection"])
def test_another_party_comes_and_goes(kind):
    run_program("owners", "another_party_comes_and_goes", kind)


@pytest.mark.parametrize(
    "case",
    [
        "pipe_to_a_process_of_loky",
        "queues_with_picklers_of_their_own",
        "picklers_that_are_not_the_standard_library_s",
        "reducers_of_others",
        "undone_in_any_order",
    ],
)
def test_beside_others(case):
    run_program("owners", case)
