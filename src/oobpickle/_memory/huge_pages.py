"""Huge pages for shared memory: how the system gives them, and whether they came.

**What.** `policy` says whether pages of 2 MiB can be had for a memfd, and how; `mapped_nbytes` how
much of a file is mapped in them. They are asked for in ``_core/mapping.c`` (`advise_always`,
`mapping_reserve`), and for ordinary memory in ``_core/message.c``.

**How it works.** ``shmem_enabled`` below ``/sys/kernel/mm/transparent_hugepage`` holds for all
shared memory, and the one below ``hugepages-2048kB`` for this size, unless it says ``inherit``.
With ``advise`` only a page fault in an advised mapping makes huge pages: ``fallocate(2)`` and
``pwrite(2)`` know no mapping, and make small ones. Source: the kernel's admin-guide/mm/transhuge.

**Lifetime.** No state. Whoever creates an arena asks once, and writes the answer into the table.

**When it cannot.** What cannot be read counts as ``NEVER``, and as no byte."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from oobpickle._foreign import pass_on_foreign

NEVER: Final = 0
BY_FAULT: Final = 1  # only by a fault in a mapping that asked for them
ALWAYS: Final = 2  # by whatever makes pages

_FOLDER: Final = "/sys/kernel/mm/transparent_hugepage/"
_OF_WORD: Final = {"advise": BY_FAULT, "always": ALWAYS, "within_size": ALWAYS, "force": ALWAYS}


def policy() -> int:
    """Return `NEVER`, `BY_FAULT` or `ALWAYS`, for a file of a memfd's kind."""
    general = _chosen(_FOLDER + "shmem_enabled")
    if general in ("deny", "force"):
        return _OF_WORD.get(general, NEVER)
    of_size = _chosen(_FOLDER + "hugepages-2048kB/shmem_enabled")  # Linux 6.11
    return _OF_WORD.get(general if of_size in ("", "inherit") else of_size, NEVER)


def _chosen(path: str) -> str:
    """Return the word in brackets."""
    try:
        with open(path) as file:
            text = file.read()
    except OSError as error:
        pass_on_foreign(error)
        return ""
    return text.partition("[")[2].partition("]")[0]


def mapped_nbytes(device: int, inode: int) -> int:
    """Return how many bytes of a file are mapped in huge pages by this process.

    Takes a walk over its page tables, milliseconds for each GB of small pages.
    """
    try:
        with open("/proc/self/smaps") as file:
            return _sum(file, [f"{os.major(device):02x}:{os.minor(device):02x}", str(inode)])
    except OSError as error:
        pass_on_foreign(error)
        return 0


def _sum(lines: Iterable[str], name: list[str]) -> int:
    total, is_inside = 0, False
    for line in lines:
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):  # address-address permissions offset device inode path
            is_inside = words[3:5] == name
        elif is_inside and words[0] == "ShmemPmdMapped:":
            total += int(words[1]) << 10
    return total
