"""Mappings made from mappings: what is left of a file whose descriptor somebody has closed.

**What.** `file_again` maps a range of a file a second time, `share` puts the file back over a range
that had become private memory, and `make_private` does the reverse.

**How it works.** mremap(2) with an old size of zero maps the pages of a shared mapping once more,
and as many after them as are asked for. So a shared page *before* a range is as good as a
descriptor: one is behind each block (`layout`), and the segment keeps one for the first. ::

    file        ..... [page][range........]
    mapping     shared -'    private ......      page --mremap(old size 0)--> [page][range........]

What can only be had with a descriptor, a private mapping of the file in place, is made by a copy
that is moved over the range; the GIL is kept from the first byte to the move, as it is between the
bytecodes of any program that copies memory.

**Lifetime.** `file_again` unmaps what it has mapped; an interrupt between two lines can leave a
mapping, of address space only.

**When it cannot.** `OSError` where there is no address space, or no further mapping is allowed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from oobpickle import _system


@contextlib.contextmanager
def file_again(before: int, lead: int, nbytes: int) -> Iterator[int]:
    """Map a range of a file again for a while; yield its address.

    Parameters
    ----------
    before : int
        Address of a page that is mapped shared.
    lead : int
        How far behind it, in the file, the range begins; bytes.
    nbytes : int
        Size of the range.
    """
    first = _system.map_again(before, lead + nbytes)
    try:
        # The page may be one that nobody may touch.
        _system.protect(first, lead + nbytes, _system.PROT_READ_WRITE)
        yield first + lead
    finally:
        _system.unmap_memory(first, lead + nbytes)


def share(before: int, lead: int, nbytes: int, address: int) -> None:
    """Map a range of a file, described as for `file_again`, over the memory at `address`."""
    rest, first = lead + nbytes, _system.map_again(before, lead + nbytes)
    try:
        _system.protect(first, lead + nbytes, _system.PROT_READ_WRITE)
        _system.move_mapping(first + lead, nbytes, address)
        rest = lead  # what was behind it may be somebody else's by now
    finally:
        if rest:
            _system.unmap_memory(first, rest)


def make_private(address: int, nbytes: int) -> None:
    """Replace what is mapped at `address` by a copy in fresh private memory; all of it, or none."""
    copy = _system.map_anonymous(nbytes)
    try:
        _system.advise(copy, nbytes, _system.MADV_HUGEPAGE)
        _system.copy_and_move_mapping(copy, nbytes, address)
    except OSError:
        _system.unmap_memory(copy, nbytes)
        raise
