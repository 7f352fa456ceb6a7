"""What arrays, workers and locked processes leave of the memory."""

import uuid

import pytest

from conftest import by_start_method
from process.harness import cases_of, eventually, run_program
from process.test_limits import CGROUPS, _own_cgroup

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


@pytest.fixture
def cgroup():
    """A memory cgroup of our own with 480 MB; only programs of the test go into it."""
    parent = CGROUPS / _own_cgroup()
    group = parent / f"oobpickle-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (version 1) can be made below {parent}: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(480 * 10**6))
        yield group
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_what_was_dropped_makes_room_in_a_memory_cgroup(cgroup):
    run_program("memory", "in_a_small_cgroup", cgroup / "cgroup.procs")

    assert "oom_kill 0" in (cgroup / "memory.oom_control").read_text()


@pytest.mark.parametrize(("flags", "when"), [(1, "after"), (3, "before"), (7, "after")])
def test_locked_memory_kills_nobody(cgroup, flags, when):
    run_program("memory", "locked", cgroup / "cgroup.procs", flags, when)

    assert "oom_kill 0" in (cgroup / "memory.oom_control").read_text()
