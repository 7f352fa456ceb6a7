"""joblib and loky inside a block: unchanged programs, and what goes out of band."""

import os

import pytest

from conftest import by_turns
from process.harness import HERE, cases_of, environment, run_program

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


WITH_OTHERS = ("memory_maps", "both_are_imported", "another_release")
ALONE = set(cases_of("loky_and_joblib")) - {*WITH_EACH, *WITH_OTHERS}


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


LOKY = "externals.loky"
#: By what is missing: where it is used, by which backend, and whether it is served all the same.
OTHER_RELEASES = {
    "dumps": ([f"{LOKY}.backend.queues", f"{LOKY}.backend.reduction"], "loky", "said"),
    "_LokyPickler": ([f"{LOKY}.backend.reduction"], "loky", "said"),
    "CustomizablePickler": (["pool"], "multiprocessing", "said"),
    "dump": ([f"{LOKY}.backend.reduction", f"{LOKY}.backend.popen_loky_posix"], "loky", "served"),
    "LokyProcess": ([f"{LOKY}.backend.process", f"{LOKY}.backend.context"], "loky", "served"),
    "_ReusablePoolExecutor": ([f"{LOKY}.reusable_executor", "executor"], "loky", "served"),
    "_get_memory_usage": ([f"{LOKY}.process_executor"], "loky", "served"),
    "_get_backing_memmap": (["_memmapping_reducer"], "loky", "served"),
    "JOBLIB_MMAPS": (["_memmapping_reducer", "numpy_pickle"], "loky", "served"),
}


@pytest.mark.parametrize("name", by_turns(sorted(OTHER_RELEASES)))
def test_a_release_in_which_a_place_is_missing(name):
    modules, backend, is_said = OTHER_RELEASES[name]
    path = environment()["PYTHONPATH"]
    env = {
        "PYTHONPATH": os.pathsep.join([path, str(HERE / "other_release")]),
        "OTHER_NAMES": " ".join(f"{module}:{name}" for module in modules),
    }
    run_program("loky_and_joblib", "another_release", backend, is_said, env=env)
