"""What memory has no room for lies on disk, whole, for as long as somebody has it and no longer."""

import subprocess

import pytest

from conftest import by_turns, by_turns_of_start_methods
from process.harness import PROGRAMS, cases_of, memory_cgroup, run_program

CASES = cases_of("spilling")
SOURCE = (PROGRAMS / "spilling.py").read_text()
WITH_METHOD = [case for case in CASES if f"def {case}(folder, method)" in SOURCE]
ALONE = [case for case in CASES if f"def {case}(folder)" in SOURCE]
POINTS = ("block.reserved:4", "block.spilled", "lease.sealed", "connections.written")


@pytest.mark.parametrize(("case", "method"), by_turns_of_start_methods(WITH_METHOD))
def test_with(disk_folder, case, method):
    run_program("spilling", case, disk_folder, method)


@pytest.mark.parametrize("case", [case for case in ALONE if "mount" not in case])
def test_one(disk_folder, case):
    run_program("spilling", case, disk_folder)


@pytest.mark.parametrize("what", ["reserve", "write", "damaged"])
def test_a_full_disk(disk_folder, what):
    run_program("spilling", "a_full_disk", disk_folder, what)


@pytest.mark.parametrize("point", by_turns(POINTS))
def test_a_sender_killed(disk_folder, point):
    run_program("spilling", "a_sender_killed", disk_folder, point)


@pytest.mark.parametrize("what", ["view", "lock"])
def test_a_fork_that_has_to_copy(disk_folder, what):
    run_program("spilling", "a_fork_that_has_to_copy", disk_folder, what)


def test_more_than_a_memory_cgroup_has(disk_folder):
    with memory_cgroup(200 * 10**6) as group:
        run_program("spilling", "in_a_memory_cgroup", disk_folder, group / "cgroup.procs")


@pytest.mark.parametrize("kind", ["full", "read_only"])
def test_a_mount(tmp_path, kind):
    mount = f"mount -t tmpfs -o size=16m none {tmp_path}"
    if kind == "read_only":
        mount += f" && mount -o remount,ro {tmp_path}"
    for rights in ((), ("--user", "--map-root-user")):
        prefix = ("unshare", *rights, "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
        done = subprocess.run([*prefix, "true"], capture_output=True, timeout=20, check=False)
        if done.returncode == 0:
            run_program("spilling", f"a_mount_that_is_{kind}", tmp_path, prefix=prefix)
            return
    pytest.skip(f"no mount of our own: {done.stderr.decode().strip()}")
