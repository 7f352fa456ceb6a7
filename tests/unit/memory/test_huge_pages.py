"""Huge pages for shared memory: what the system's settings mean, and what /proc says of a range."""

import pytest

from oobpickle._memory import huge_pages
from oobpickle._memory.huge_pages import ALWAYS, BY_FAULT, NEVER, mapped_nbytes, policy

SMAPS = """\
7f0000000000-7f0000400000 rw-s 00000000 00:01 12 /memfd:oobpickle-data (deleted)
Size:               4096 kB
ShmemPmdMapped:     2048 kB
VmFlags: rd wr sh
7f0000400000-7f0000600000 rw-p 00400000 00:01 12 /memfd:oobpickle-data (deleted)
ShmemPmdMapped:        0 kB
7f0000600000-7f0000e00000 rw-s 00600000 00:01 12 /memfd:oobpickle-data (deleted)
ShmemPmdMapped:     4096 kB
7f0000e00000-7f0001000000 rw-s 00000000 00:01 13 /dev/shm/another
ShmemPmdMapped:     2048 kB
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Write what the system's two files say; ``None`` for a file that is not there."""
    monkeypatch.setattr(huge_pages, "_FOLDER", f"{tmp_path}/")

    def write(general, of_size):
        (tmp_path / "hugepages-2048kB").mkdir()
        for name, chosen in (
            ("shmem_enabled", general),
            ("hugepages-2048kB/shmem_enabled", of_size),
        ):
            if chosen is not None:
                words = ["always", "inherit", "within_size", "advise", "never", "deny", "force"]
                text = " ".join(f"[{word}]" if word == chosen else word for word in words)
                (tmp_path / name).write_text(text + "\n")

    return write


@pytest.mark.parametrize(
    ("general", "of_size", "expected"),
    [
        ("never", "inherit", NEVER),
        ("never", None, NEVER),
        ("advise", None, BY_FAULT),
        ("advise", "inherit", BY_FAULT),
        ("within_size", "inherit", ALWAYS),
        ("always", "inherit", ALWAYS),
        ("never", "advise", BY_FAULT),
        ("always", "never", NEVER),
        ("deny", "always", NEVER),
        ("force", "never", ALWAYS),
        (None, None, NEVER),
        ("a word of a later kernel", None, NEVER),
    ],
)
def test_the_setting_for_the_size_wins_unless_it_is_left_to_the_general_one(
    settings, general, of_size, expected
):
    settings(general, of_size)

    assert expected == policy()


def test_only_the_parts_of_the_file_count():
    lines = SMAPS.splitlines(keepends=True)

    assert 6 << 20 == huge_pages._sum(lines, ["00:01", "12"])
    assert 2 << 20 == huge_pages._sum(lines, ["00:01", "13"])
    assert huge_pages._sum(lines, ["00:02", "12"]) == 0


def test_the_list_of_a_real_process_is_understood():
    with open("/proc/self/smaps") as file:
        names = {line.split()[3:5][0] for line in file if "-" in line.split()[0]}

    assert "00:00" in names
    assert mapped_nbytes(0, 0) == 0
