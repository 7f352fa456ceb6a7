"""Files that peers forget in ``/dev/shm``.

What
    `Leftovers` removes those that came after it was made and that no process maps.

How it works
    Only files that are named as a peer names its own. First they are listed, then the mappings of
    all processes: what somebody makes meanwhile is not in the list. Mappings are compared by inode,
    for the path of a semaphore in ``/proc/PID/maps`` is the one it was created under.

Lifetime
    Called after each peer, and at the end.

When it cannot
    A file of a process whose mappings cannot be read may be removed under it; that is one of
    another user, and those are left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

SHM = Path("/dev/shm")
_NAMES = (
    *("psm_*", "npshmex_*", "joblib_memmapping_folder_*", "torch_*", "plasma*", "mpich_*"),
    *("peers-file-*", "sem.*", "ray_*"),
)

Inode = tuple[int, int]  # device and number


class Leftovers:
    """What peers leave behind from now on."""

    def __init__(self) -> None:
        self._before = set(_named())

    def remove(self) -> None:
        """Remove those that no process has mapped."""
        found = [path for path in _named() if path not in self._before]
        mapped = set(_mapped())
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_uid != os.getuid() or (status.st_dev, status.st_ino) in mapped:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _named() -> Iterator[Path]:
    for name in _NAMES:
        yield from SHM.glob(name)


def _mapped() -> Iterator[Inode]:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in maps.read_text().splitlines():
                words = line.split(maxsplit=5)  # span, permissions, offset, device, inode, path
                if len(words) == 6 and words[5].startswith(str(SHM)):
                    major, minor = (int(number, 16) for number in words[3].split(":"))
                    yield os.makedev(major, minor), int(words[4])
