"""How much memory a side and everything that belongs to it take together.

What
    `Tree` finds the processes of a side and adds their memory up; `shared_nbytes` is the shared
    memory of the machine.

How it works
    A side's processes are those that descend from it, and those that have its token in their
    environment, for daemons that another process has adopted. Of each, the proportional set size
    (PSS, where a page that n processes map counts 1/n in each) is taken without its part of shared
    memory. All shared memory of the machine (``Shmem``: files in ``/dev/shm``, mapped or not,
    memfds, shared anonymous memory) is counted once, as growth since before the side was there;
    that holds since one side works at a time.

Lifetime
    Nothing is kept but names of processes. What ends between two looks is not counted any more.

When it cannot
    Shared memory that others on the machine take or free meanwhile is taken for the side's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

TOKEN = "OOBPICKLE_PEERS_SIDE"
_FIELDS = re.compile(r"^(Pss|Pss_Shmem|Shmem|MemAvailable):\s+(\d+) kB", re.MULTILINE)


def _kibibytes(path: str) -> dict[str, int]:
    try:
        text = Path(path).read_text()
    except (OSError, ProcessLookupError):  # It has ended.
        return {}
    return {name: int(value) for name, value in _FIELDS.findall(text)}


def shared_nbytes() -> int:
    """All shared memory of this machine, bytes."""
    return _kibibytes("/proc/meminfo")["Shmem"] << 10


def available_nbytes() -> int:
    """Memory that this machine could still give, bytes."""
    return _kibibytes("/proc/meminfo")["MemAvailable"] << 10


class Tree:
    """The processes that belong to one side."""

    def __init__(self, pid: int, token: str) -> None:
        self._root = pid
        self._mark = f"{TOKEN}={token}\0".encode()
        self._known: dict[int, bool] = {}

    def pids(self) -> list[int]:
        """All of them that live, the root first."""
        parents = _parents()
        self._known = {pid: known for pid, known in self._known.items() if pid in parents}
        members = {self._root}
        for pid in parents:
            if pid not in self._known:
                self._known[pid] = self._is_marked(pid)
        members.update(pid for pid, is_marked in self._known.items() if is_marked)
        n_before = 0
        while n_before != len(members):
            n_before = len(members)
            members.update(pid for pid, parent in parents.items() if parent in members)
        return [self._root, *sorted(members - {self._root})]

    def private_nbytes(self) -> int:
        """The proportional set size of all of them, without shared memory, bytes."""
        kibibytes = 0
        for pid in self.pids():
            found = _kibibytes(f"/proc/{pid}/smaps_rollup")
            kibibytes += found.get("Pss", 0) - found.get("Pss_Shmem", 0)
        return kibibytes << 10

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False


def _parents() -> dict[int, int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                # proc_stat(5): pid (name) state ppid; the name may contain anything.
                parents[int(name)] = int(
                    Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
                )
            except (OSError, ProcessLookupError):
                continue
    return parents
