"""joblib and loky inside a block: unchanged programs, and what goes out of band."""

import pytest

from process.harness import cases_of, run_program

LIBRARIES = ("joblib_loky", "joblib_multiprocessing", "loky_own", "loky_reusable")
WITH_EACH = (
    "descriptors",
    "errors_with_arrays",
    "first_used_inside",
    "imported_before",
    "older_than_the_block",
    "only_returns_and_is_older",
    "small_tasks",
)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("case", WITH_EACH)
def test_with(case, library):
    run_program("loky_and_joblib", case, library)


ALONE = set(cases_of("loky_and_joblib")) - {*WITH_EACH, "memory_maps", "both_are_imported"}


@pytest.mark.parametrize("case", sorted(ALONE))
def test_joblib(case):
    run_program("loky_and_joblib", case)


@pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
def test_what_joblib_keeps_in_files(backend):
    plain, inside = (
        run_program("loky_and_joblib", "memory_maps", backend, where)
        for where in ("plain", "inside")
    )

    assert plain == inside


@pytest.mark.parametrize("first", ["loky", "joblib"])
def test_both_lokys(first):
    run_program("loky_and_joblib", "both_are_imported", first)
