"""How much memory may still be taken before somebody is killed for it.

**What.** `available_nbytes`: the smallest of what the machine has available and what each memory
cgroup above this process still allows. `limits` says where that is read, for ``_core/headroom.c``,
which does the same in the middle of a message.

**How it works.** A memory cgroup at its limit kills on ``fallocate``, on ``pwrite`` and on a page
fault alike; none of them returns an error. So the arena asks *before* it reserves. For each
cgroup from this process's own to the root: limit - usage + page cache that can be dropped (files,
not shared memory). Both cgroup versions are read, through the mount points in
``/proc/self/mountinfo``.

**Lifetime.** Nothing is kept; a process can be moved at any time. A query costs 50-100 us.

**When it cannot.** What cannot be read does not limit. The answer is a snapshot: others may take
the memory a moment later, hence the margin that the arena keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from oobpickle._foreign import pass_on_foreign

_UNLIMITED: Final = 1 << 60


class _Files(NamedTuple):
    limit: str
    usage: str
    cache_keys: tuple[str, str]


_V1 = _Files(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_nbytes() -> int:
    """Return the bytes that can be taken now without meeting a limit."""
    return max(0, min([available_on_machine_nbytes(), *_cgroup_rooms()]))


def available_on_machine_nbytes() -> int:
    """Return the bytes that the machine has available, whatever the cgroups allow."""
    return _meminfo("MemAvailable", "SC_AVPHYS_PAGES")


def limit_nbytes() -> int:
    """Return the memory of the machine, or the lowest cgroup limit if that is smaller."""
    return min([_meminfo("MemTotal", "SC_PHYS_PAGES"), *(limit for _, _, limit in _cgroups())])


def limits() -> list[tuple[int, str, str, tuple[str, str]]]:
    """Return limit, path of the usage, path of the statistics and keys there, of each cgroup."""
    return [
        (limit, str(directory / files.usage), str(directory / "memory.stat"), files.cache_keys)
        for directory, files, limit in _cgroups()
    ]


def _meminfo(key: str, otherwise: str) -> int:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        pass_on_foreign(error)
    # What can be known without a descriptor.
    return os.sysconf(otherwise) * os.sysconf("SC_PAGE_SIZE")


def _cgroup_rooms() -> Iterator[int]:
    for directory, files, limit in _cgroups():
        usage = _read_number(directory / files.usage)
        if usage is not None:
            yield limit - usage + _cache_nbytes(directory, files)


def _cgroups() -> Iterator[tuple[Path, _Files, int]]:
    """Yield each cgroup above this process that has a memory limit."""
    for mount, group, files in _hierarchies():
        directory = mount / group
        while True:
            limit = _read_number(directory / files.limit)
            if limit is not None and limit < _UNLIMITED:
                yield directory, files, limit
            if directory == mount or mount not in directory.parents:
                break
            directory = directory.parent


def _hierarchies() -> list[tuple[Path, str, _Files]]:
    # Somebody who closes all descriptors gives our number to a file of his own: what was read of it
    # is no table of the kernel.
    try:
        return list(_parsed_hierarchies())
    except ValueError:
        return []


def _parsed_hierarchies() -> Iterator[tuple[Path, str, _Files]]:
    try:
        memberships = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError as error:
        pass_on_foreign(error)
        return
    groups = {}
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups["cgroup2"] = path
        elif "memory" in controllers.split(","):
            groups["cgroup"] = path
    for line in mounts:
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, point = left.split(" ")[3:5]
        if kind not in groups or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        # Inside a container the mount shows only the part below its own root.
        group = os.path.relpath(groups[kind], root) if groups[kind].startswith(root) else "."
        yield Path(point.replace(r"\040", " ")), group, _V1 if kind == "cgroup" else _V2


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:  # no such file; "max"
        pass_on_foreign(error)
        return None


def _cache_nbytes(directory: Path, files: _Files) -> int:
    try:
        pairs = [line.split() for line in (directory / "memory.stat").read_text().splitlines()]
        return sum(int(value) for key, value in pairs if key in files.cache_keys)
    except (OSError, ValueError) as error:
        pass_on_foreign(error)
        return 0
