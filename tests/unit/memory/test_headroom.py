"""Headroom: the tightest of all limits that apply, and what cannot be read does not limit."""

import os
from pathlib import Path

import pytest

from oobpickle._memory import headroom
from oobpickle._memory.headroom import available_nbytes, limit_nbytes

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"
V2_MOUNT = "30 20 0:26 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "40 20 0:31 {root} {point} rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
OTHER_MOUNTS = (
    "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
    "41 20 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
)


class System:
    """A made-up /proc and cgroup file system below a directory."""

    def __init__(self, directory):
        self.directory = directory
        self.mount = directory / "cgroup"
        self.mounts = OTHER_MOUNTS
        self.write("/proc/meminfo", MEMINFO)
        self.write("/proc/self/mountinfo", self.mounts)
        self.write("/proc/self/cgroup", "")

    def path(self, path):
        """Return where a path of the made-up system really is."""
        path = os.fspath(path)
        return Path(f"{self.directory}{path}" if path.startswith("/proc/") else path)

    def write(self, path, text):
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def join(self, group, *, mount=V2_MOUNT, root="/", line="0::{group}\n"):
        """Make the process a member of a group."""
        self.mounts += mount.format(root=root, point=self.mount)
        self.write("/proc/self/mountinfo", self.mounts)
        self.write("/proc/self/cgroup", line.format(group=group))

    def limit(self, group, files):
        directory = self.mount / group.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(content if name == "memory.stat" else f"{content}\n")


def v2(limit, usage, **cache):
    stat = "".join(f"{key} {value}\n" for key, value in {"anon": GIB, "shmem": 5, **cache}.items())
    return {"memory.max": limit, "memory.current": usage, "memory.stat": stat}


def v1(limit, usage, **cache):
    stat = "".join(f"{key} {value}\n" for key, value in {"inactive_file": 77, **cache}.items())
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": usage,
        "memory.stat": stat,
    }


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system of 16 GiB, 8 of them available, without cgroups."""
    made_up = System(tmp_path)
    monkeypatch.setattr(headroom, "Path", made_up.path)
    monkeypatch.setattr(headroom, "open", lambda path: made_up.path(path).open(), raising=False)
    return made_up


def test_without_cgroups_the_machine_is_the_limit(system):

    assert available_nbytes() == 8 * GIB
    assert limit_nbytes() == 16 * GIB


def test_a_group_with_less_room_is_the_limit(system):
    system.join("/job")
    system.limit("/job", v2(2 * GIB, GIB // 2))

    assert available_nbytes() == 3 * GIB // 2
    assert limit_nbytes() == 2 * GIB


def test_page_cache_that_can_be_dropped_is_room(system):
    system.join("/job")
    system.limit("/job", v2(2 * GIB, 2 * GIB, inactive_file=1000, active_file=200, file=77777))

    assert available_nbytes() == 1200


def test_colons_in_the_name_of_a_group_are_no_error(system):
    system.join("/job:5")
    system.limit("/job:5", v2(2 * GIB, GIB))

    assert available_nbytes() == GIB


def test_shared_memory_is_no_cache(system):
    system.join("/job")
    system.limit("/job", v2(2 * GIB, 2 * GIB, shmem=GIB, file=GIB))

    assert available_nbytes() == 0


@pytest.mark.parametrize("tight", ["/", "/a", "/a/b", "/a/b/c"])
def test_the_tightest_of_all_groups_above_counts(system, tight):
    system.join("/a/b/c")
    for group in ("/", "/a", "/a/b", "/a/b/c"):
        system.limit(group, v2(4 * GIB, GIB if group == tight else 0))

    assert available_nbytes() == 3 * GIB


def test_groups_beside_ours_do_not_limit(system):
    system.join("/a/b")
    system.limit("/a/b", v2(4 * GIB, 0))
    system.limit("/a/c", v2(1000, 0))
    system.limit("/a/b/d", v2(1000, 0))

    assert available_nbytes() == 4 * GIB


def test_a_group_without_limit_does_not_limit(system):
    system.join("/job")
    system.limit("/job", v2("max", GIB))

    assert available_nbytes() == 8 * GIB
    assert limit_nbytes() == 16 * GIB


def test_a_group_over_its_limit_has_no_room(system):
    system.join("/job")
    system.limit("/job", v2(GIB, 2 * GIB))

    assert available_nbytes() == 0


def test_a_roomy_group_leaves_the_limit_to_the_machine(system):
    system.join("/job")
    system.limit("/job", v2(100 * GIB, 0))

    assert available_nbytes() == 8 * GIB
    assert limit_nbytes() == 16 * GIB


V1_LINE = "12:cpu,cpuacct:/other\n5:memory:{group}\n2:devices:/other\n0::/elsewhere\n"


def test_the_first_version_of_groups_is_read(system):
    system.join("/job", mount=V1_MOUNT, line=V1_LINE)
    system.limit("/job", v1(2 * GIB, GIB, total_inactive_file=1000, total_active_file=200))

    assert available_nbytes() == GIB + 1200
    assert limit_nbytes() == 2 * GIB


def test_the_largest_number_of_the_first_version_means_no_limit(system):
    system.join("/job", mount=V1_MOUNT, line=V1_LINE)
    system.limit("/job", v1(9223372036854771712, GIB))

    assert limit_nbytes() == 16 * GIB


def test_both_versions_may_apply_at_once(system):
    system.join("/job", mount=V1_MOUNT, line=V1_LINE)
    system.limit("/job", v1(2 * GIB, 0))
    system.mount = system.directory / "unified"
    system.join("/job", line="5:memory:/job\n0::{group}\n")
    system.limit("/job", v2(GIB, 0))

    assert available_nbytes() == GIB


def test_inside_a_container_the_mount_begins_at_its_own_group(system):
    system.join("/docker/abc/job", root="/docker/abc")
    system.limit("/", v2(3 * GIB, 0))
    system.limit("/job", v2(5 * GIB, GIB * 3))

    assert available_nbytes() == 2 * GIB
    assert limit_nbytes() == 3 * GIB


def test_a_group_outside_the_mount_falls_back_to_what_the_mount_shows(system):
    system.join("/docker/xyz", root="/docker/abc")
    system.limit("/", v2(3 * GIB, 0))

    assert limit_nbytes() == 3 * GIB


def test_a_mount_of_a_group_with_a_similar_name_is_not_ours(system):
    system.join("/docker/abcdef", root="/docker/abc")
    system.limit("/", v2(3 * GIB, 0))

    assert limit_nbytes() == 3 * GIB


@pytest.mark.parametrize("missing", ["memory.current", "memory.max", "memory.stat"])
def test_files_that_are_missing_do_not_limit_and_are_no_error(system, missing):
    system.join("/job")
    system.limit("/job", v2(2 * GIB, GIB, inactive_file=5))
    (system.mount / "job" / missing).unlink()

    assert available_nbytes() == (GIB if missing == "memory.stat" else 8 * GIB)


@pytest.mark.parametrize("missing", ["/proc/self/cgroup", "/proc/self/mountinfo"])
def test_without_these_files_there_are_no_groups(system, missing):
    system.join("/job")
    system.limit("/job", v2(2 * GIB, GIB))
    system.path(missing).unlink()

    assert available_nbytes() == 8 * GIB


def test_without_meminfo_the_c_library_knows_the_machine(system, monkeypatch):
    numbers = {"SC_PHYS_PAGES": 1 << 20, "SC_AVPHYS_PAGES": 1 << 19, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", numbers.__getitem__)
    system.path("/proc/meminfo").unlink()

    assert available_nbytes() == 2 * GIB
    assert limit_nbytes() == 4 * GIB


def test_without_meminfo_the_groups_limit_all_the_same(system):
    system.join("/job")
    system.limit("/job", v2(GIB, GIB - 5000))
    system.path("/proc/meminfo").unlink()

    assert available_nbytes() == 5000
    assert limit_nbytes() == GIB


def test_spaces_in_the_path_of_a_mount_are_no_error(system):
    system.mount = system.directory / "c group"
    system.mounts += V2_MOUNT.format(root="/", point=str(system.mount).replace(" ", r"\040"))
    system.write("/proc/self/mountinfo", system.mounts)
    system.write("/proc/self/cgroup", "0::/job\n")
    system.limit("/job", v2(2 * GIB, GIB))

    assert available_nbytes() == GIB


def test_this_very_system_can_be_read():

    assert 0 < available_nbytes() <= limit_nbytes() < 1 << 50
