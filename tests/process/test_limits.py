"""Under every limit of the system the data arrives, and at most one warning says how."""

import os
import signal
import subprocess

import pytest

from process.harness import cases_of, memory_cgroup, run_program

WITH_ARGUMENTS = {
    "address_space_of_a_worker",
    "another_user",
    "backing",
    "backing_none",
    "core_dump",
    "descriptors_closed_by_the_user",
    "in_the_middle",
    "memory_cgroup",
}


@pytest.mark.parametrize("case", [c for c in cases_of("limits") if c not in WITH_ARGUMENTS])
def test_limit(case):
    run_program("limits", case)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_limited_address_space_of_a_worker(method):
    run_program("limits", "address_space_of_a_worker", method)


@pytest.mark.parametrize("which", ["all", "data"])
def test_descriptors_closed_by_the_user(which):
    run_program("limits", "descriptors_closed_by_the_user", which)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_worker_of_another_user():
    run_program("limits", "another_user")


@pytest.mark.parametrize("kind", ["memfd", "shm", "tmp"])
def test_backing(kind):
    run_program("limits", "backing", kind, env={"OOBPICKLE_BACKING": kind})


def test_no_backing_at_all():
    run_program("limits", "backing_none", env={"OOBPICKLE_BACKING": "none"})


@pytest.mark.parametrize("what", ["full", "table", "damaged", "memory", "allocate", "unsupported"])
def test_a_refusal_in_the_middle_of_many_buffers(what):
    run_program("limits", "in_the_middle", what)


def test_a_mount_that_is_full_in_the_middle_of_many_buffers():
    """64 MB of /dev/shm, as a container has it."""
    mount = 'mount -t tmpfs -o size=64m none /dev/shm && exec "$@"'
    for prefix in (
        ("unshare", "--mount", "sh", "-c", mount, "sh"),
        ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"),
    ):
        done = subprocess.run([*prefix, "true"], capture_output=True, timeout=20, check=False)
        if done.returncode == 0:
            env = {"OOBPICKLE_BACKING": "shm"}
            run_program("limits", "in_the_middle", "shm", env=env, prefix=prefix)
            return
    pytest.skip(f"no mount of our own: {done.stderr.decode().strip()}")


def test_a_core_dump_is_small(tmp_path):
    """If the system writes one; that the mappings are left out is looked at in any case."""
    printed = run_program("limits", "core_dump", tmp_path, exit_code=-signal.SIGABRT)

    assert printed == "ready\n"
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 100 * 10**6


@pytest.mark.parametrize("nbytes", [1_000_000, 10_000_000])
def test_a_memory_cgroup_kills_nobody(nbytes):
    with memory_cgroup(200 * 10**6) as group:
        assert run_program("limits", "memory_cgroup", group / "cgroup.procs", nbytes) == "done"
