"""What arrays, workers and locked processes leave of the memory."""

import pytest

from conftest import by_start_method
from process.harness import cases_of, memory_cgroup, run_program

WITH_ARGUMENTS = {"in_a_small_cgroup", "locked"}
WITHOUT_METHOD = {
    *("address_space_and_trim", "address_space_of_blocks", "forks_meanwhile"),
    *("small_survivors", "in_band_of_many_arrays", "blocks_one_after_the_other"),
}
WITH_METHOD = sorted(set(cases_of("memory")) - WITH_ARGUMENTS - WITHOUT_METHOD)


@pytest.mark.parametrize(("case", "method"), by_start_method(WITH_METHOD))
def test_memory(case, method):
    run_program("memory", case, method)


@pytest.mark.parametrize("case", sorted(WITHOUT_METHOD))
def test_memory_of_one_process(case):
    run_program("memory", case)


def test_what_was_dropped_makes_room_in_a_memory_cgroup():
    with memory_cgroup(480 * 10**6) as group:
        run_program("memory", "in_a_small_cgroup", group / "cgroup.procs")


@pytest.mark.parametrize(("flags", "when"), [(1, "after"), (3, "before"), (7, "after")])
def test_locked_memory_kills_nobody(flags, when):
    with memory_cgroup(480 * 10**6) as group:
        run_program("memory", "locked", group / "cgroup.procs", flags, when)
