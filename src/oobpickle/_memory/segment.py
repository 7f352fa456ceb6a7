"""One mapped, nameless, sparse file: the memory under an arena.

**What.** A `Segment` is a file without a name (a memfd, or a file unlinked before its first use),
mapped once as a whole. It gives out views, reserves pages, gives pages back (punch), and turns a
range of its mapping into ordinary private memory at the same address and back (privatize /
share).

**How it works.** The file is far larger than what is ever used: address space is free, so ranges
never move and never need to be merged. Pages exist only where something was written or reserved::

    file      0 ........ [pages][pages]....hole....[pages] ................ nbytes
    mapping   address .. shared ................... private (after a fork) ..

Nothing of it is accessible until it is used (`access`). Access is by numpy arrays over one
``memoryview`` of the mapping, because an exact ndarray whose base is not an ndarray stays the base
of every view that is made of it.

**Lifetime.** No name, so the kernel frees the pages when the last descriptor and mapping are gone,
however the processes die. Nobody unmaps while arrays may be alive: `close` is for the arena only,
which knows. A forked child inherits the mapping; private ranges are copy-on-write between both.

**When it cannot.** Creating raises `ArenaError` where there is no file to be had, where the
process locks all its memory, or where limits leave no room. Attaching without address space gives
a segment that is not ``mapped``; `read_into` works there, and `words` slowly. After someone closed
our descriptor, and perhaps opened another file on its number, what can be done with the mapping
alone is done so (`remap`); what cannot is refused (`ArenaError`) instead of touching a stranger's
file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from oobpickle import _faults, _system
from oobpickle._errors import ArenaError
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._memory import huge_pages, remap
from oobpickle._memory.access import Access
from oobpickle._memory.backing import open_nameless, seal
from oobpickle._memory.descriptors import ClosedDescriptorError, close_if, file_of, is_file
from oobpickle._memory.file_words import WORD_NBYTES, FileWords

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STEP_NBYTES: Final = 64 << 20


def page_round(nbytes: int) -> int:
    """Round up to whole pages."""
    page = _system.PAGE_NBYTES
    return -(-nbytes // page) * page


class NoMappingError(OSError):
    """The system allows no further mapping; nothing has changed but the first `n_done` bytes."""

    def __init__(self, number: int | None, text: str | None, n_done: int = 0) -> None:
        super().__init__(number, text)
        self.n_done = n_done


class Segment:
    """One nameless sparse file and this process's mapping of it.

    Attributes
    ----------
    fd : int
        The descriptor; close-on-exec.
    nbytes : int
        Size of the file and of the mapping, bytes.
    mapped : bool
        Whether the file is mapped here.
    kept : bool
        Whether it stays open and mapped if the segment is dropped without `close`. At first it does
        not, if this process has created the file: an interrupt must not leave it behind.
    """

    __slots__ = (
        *("_access", "_address", "_first", "_identity", "_view"),
        *("backing", "fd", "kept", "nbytes"),
    )

    def __init__(
        self, fd: int, nbytes: int, backing: str, *, map_it: bool = True, kept: bool = True
    ) -> None:
        self.kept = True
        self._address = self._first = 0
        self._view: memoryview | None = None
        self.fd = fd
        self.nbytes = nbytes
        self.backing = backing
        self._identity = file_of(fd)
        self.kept = kept  # from here on `close` has what it needs
        if map_it:
            self._map()

    @classmethod
    def create(cls, nbytes: int, name: str, *, map_it: bool = True) -> Segment:
        """Create a file of `nbytes` bytes, all holes, and map it.

        Raises
        ------
        ArenaError
            If the system has no file, size or address space for it; the text says which.
        """
        fd, backing = open_nameless(name)
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, nbytes)
            if backing == "memfd":
                seal(fd)
            return cls(fd, nbytes, backing, map_it=map_it, kept=False)
        except BaseException as error:
            os.close(fd)
            pass_on_foreign(error)
            if not isinstance(error, OSError):
                raise
            raise ArenaError(
                error.errno,
                f"cannot create the {name} file of {nbytes} bytes ({backing}): {error.strerror}. "
                "Check ulimit -v and ulimit -f, or pass a smaller capacity.",
            ) from error

    @classmethod
    def attach(cls, fd: int, *, map_it: bool = True) -> Segment:
        """Map the file behind an inherited descriptor; not ``mapped`` if address space is short."""
        os.set_inheritable(fd, False)
        nbytes = os.fstat(fd).st_size
        try:
            return cls(fd, nbytes, "inherited", map_it=map_it)
        except OSError as error:
            pass_on_foreign(error)
            return cls(fd, nbytes, "inherited", map_it=False)

    @property
    def mapped(self) -> bool:
        return self._view is not None

    def _map(self) -> None:
        flags = _system.MAP_SHARED | _system.MAP_NORESERVE
        self._address = address = _system.map_memory(
            self.fd, 0, self.nbytes, flags=flags, protection=_system.PROT_NONE
        )
        self._access = Access(address, self.nbytes)
        self._advise(0, self.nbytes)
        with ignoring(OSError):  # only in the place of a descriptor that somebody may close
            self._first = _system.map_memory(
                self.fd, 0, _system.PAGE_NBYTES, flags=flags, protection=_system.PROT_NONE
            )
            _system.advise(self._first, _system.PAGE_NBYTES, _system.MADV_DONTDUMP)
        array = (ctypes.c_ubyte * self.nbytes).from_address(address)
        self._view = memoryview(array).cast("B")

    def _advise(self, offset: int, nbytes: int) -> None:
        # A core dump would fault every hole in; and MAP_FIXED loses both advices, so that the
        # ranges would never merge into one again.
        _system.advise(self._address + offset, nbytes, _system.MADV_DONTDUMP)
        _system.advise(self._address + offset, nbytes, _system.MADV_HUGEPAGE)

    def view(self) -> memoryview:
        """Return the whole mapping as writable bytes, all of it accessible."""
        view = self._mapping()
        self._access.open_everything()
        return view

    def _mapping(self) -> memoryview:
        if self._view is None:
            raise ArenaError("the segment is not mapped in this process: not enough address space")
        return self._view

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """Return a range of the mapping as writable bytes."""
        view = self._mapping()
        self._access.open(offset, nbytes)
        return view[offset : offset + nbytes]

    def array(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return an exact, writable ``uint8`` array of shape ``(nbytes,)`` over the range.

        Its base is not an ndarray, so every view made of it keeps *it* alive.
        """
        import numpy as np

        view = self._mapping()
        self._access.open(offset, nbytes)
        return np.ndarray((nbytes,), np.uint8, view, offset)

    def words(self) -> memoryview:
        """Return the whole file as aligned 64-bit words.

        An item assignment is one store; ``struct.pack_into`` would write zeros first. Where the
        file is not mapped they are `FileWords`: good enough to load messages with.
        """
        if self._view is None:
            return cast("memoryview", FileWords(self, range(self.nbytes // WORD_NBYTES)))
        return self.view().cast("Q")

    def reserve(self, offset: int, nbytes: int) -> None:
        """Give the range its pages, in steps of 64 MiB.

        Raises
        ------
        OSError
            ENOSPC where the mount is full; pages of earlier steps stay.
        """
        self._check_identity()
        for start in range(offset, offset + nbytes, STEP_NBYTES):
            _system.allocate(self.fd, start, min(STEP_NBYTES, offset + nbytes - start))

    def populate(self, offset: int, nbytes: int, *, write: bool) -> None:
        """Enter the range in this process's page tables at once: 2-4 times cheaper than by faults.

        ``write=True`` for pages that hold nothing yet. An old kernel refuses: then faults do it.
        """
        page = _system.PAGE_NBYTES
        start = offset // page * page
        self._access.open(offset, nbytes)
        advice = _system.MADV_POPULATE_WRITE if write else _system.MADV_POPULATE_READ
        _system.advise(self._address + start, page_round(offset + nbytes - start), advice)

    def punch(self, offset: int, nbytes: int) -> None:
        """Give the pages of the range back to the system."""
        if self.is_ours():
            _system.punch_hole(self.fd, offset, page_round(nbytes))
        else:
            self._remove(offset, page_round(nbytes))

    def _remove(self, offset: int, nbytes: int) -> None:
        if not self.mapped:
            raise self._closed()
        with self._file_again(offset, nbytes) as address:
            if not _system.advise(address, nbytes, _system.MADV_REMOVE):
                raise self._closed()

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` from the *file*, whatever this process has mapped over the range."""
        if not self.is_ours() and self.mapped:
            start = offset % _system.PAGE_NBYTES
            with self._file_again(offset - start, start + destination.nbytes) as address:
                found = (ctypes.c_ubyte * destination.nbytes).from_address(address + start)
                destination[:] = memoryview(found).cast("B")
            return
        self._check_identity()
        done, total = 0, destination.nbytes
        while done < total:
            n = os.preadv(self.fd, [destination[done : done + STEP_NBYTES]], offset + done)
            if n == 0:
                raise ArenaError(f"end of file at {offset + done} of {self.nbytes} bytes")
            done += n

    def write(self, offset: int, source: memoryview) -> None:
        """Write `source` to the *file*, whatever this process has mapped over the range."""
        self._check_identity()
        done, total = 0, source.nbytes
        while done < total:
            done += os.pwrite(self.fd, source[done : done + STEP_NBYTES], offset + done)

    def privatize(
        self, offset: int, nbytes: int, *, resume: bool = False, keep_file: bool = False
    ) -> None:
        """Turn the range into ordinary private memory of this process, at its address.

        Writes of other threads, even without the GIL, are not lost: until its page is copied a read
        sees the file, and a write copies the page first. (If somebody has closed the descriptor,
        writes without the GIL can be lost.) The file's pages are punched step by step, so the peak
        is one step above the range.

        Parameters
        ----------
        offset, nbytes : int
            The range, bytes.
        resume : bool
            An earlier call for this range was interrupted: to map it a second time would lose
            what it copied.
        keep_file : bool
            The file's pages are another process's: leave them.

        Raises
        ------
        NoMappingError
            If no further mapping is allowed. The range is then shared as before, but for what its
            ``n_done`` says.
        """
        nbytes = page_round(nbytes)
        resume = resume and self.is_private(offset)
        is_mapped = resume or self._map_privately(offset, nbytes)
        if is_mapped:
            self._advise(offset, nbytes)
        for start in range(0, nbytes, STEP_NBYTES):
            n = min(STEP_NBYTES, nbytes - start)
            # What was interrupted may have gone by copies.
            if is_mapped and not (resume and start and not self.is_private(offset + start)):
                self._copy_pages(offset + start, n)
            else:
                self._replace_by_copy(offset + start, n, start)
            _faults.reach("segment.populated")
            if not keep_file:
                with ignoring(OSError):  # the range is private, whatever becomes of the file
                    self._free_pages(offset, start, n)

    def _map_privately(self, offset: int, nbytes: int) -> bool:
        """Map the file privately over the range; return ``False`` if there is no descriptor."""
        if not self.is_ours():
            return False
        flags = _system.MAP_PRIVATE | _system.MAP_FIXED | _system.MAP_NORESERVE
        address = self._address + offset
        try:
            _system.map_memory(self.fd, offset, nbytes, flags=flags, address=address)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise NoMappingError(error.errno, error.strerror) from error
        if self.is_ours():
            return True
        self._share_again(offset, nbytes)  # perhaps it was a strange file that was mapped
        return False

    def _copy_pages(self, offset: int, nbytes: int) -> None:
        if not _system.advise(self._address + offset, nbytes, _system.MADV_POPULATE_WRITE):
            _touch(self._mapping()[offset : offset + nbytes])

    def _replace_by_copy(self, offset: int, nbytes: int, n_done: int) -> None:
        try:
            remap.make_private(self._address + offset, nbytes)
        except OSError as error:
            pass_on_foreign(error)
            raise NoMappingError(error.errno, error.strerror, n_done) from error
        self._advise(offset, nbytes)

    def _free_pages(self, block: int, start: int, nbytes: int) -> None:
        if self.is_ours():
            _system.punch_hole(self.fd, block + start, nbytes)
            return
        # Only the page before the whole block is certain to be shared.
        with self._file_again(block, start + nbytes) as address:
            _system.advise(address + start, nbytes, _system.MADV_REMOVE)

    def _file_again(self, offset: int, nbytes: int) -> contextlib.AbstractContextManager[int]:
        return remap.file_again(*self._before(offset), nbytes)

    def _before(self, offset: int) -> tuple[int, int]:
        """Return the address of a shared page, and how far behind it in the file `offset` is."""
        if offset:
            return self._address + offset - _system.PAGE_NBYTES, _system.PAGE_NBYTES
        if not self._first:
            raise self._closed()
        return self._first, 0

    def is_private(self, offset: int) -> bool:
        """Tell whether the page at `offset` is private memory of this process."""
        address = self._address + offset
        with open("/proc/self/maps") as file:
            for line in file:
                span, permissions, _ = line.split(" ", 2)
                start, end = (int(part, 16) for part in span.split("-"))
                if start <= address < end:
                    return permissions.endswith("p")
        return False

    def isolate(self) -> None:
        """Map the whole file so that nobody sees what this process writes from now on."""
        flags = _system.MAP_PRIVATE | _system.MAP_FIXED | _system.MAP_NORESERVE
        _system.map_memory(self.fd, 0, self.nbytes, flags=flags, address=self._address)
        self._advise(0, self.nbytes)

    def share(self, offset: int, nbytes: int) -> None:
        """Map a privatized range from the file again; its private pages are gone."""
        nbytes, address = page_round(nbytes), self._address + offset
        self._access.forget(offset)
        if self.is_ours():
            flags = _system.MAP_SHARED | _system.MAP_FIXED | _system.MAP_NORESERVE
            protection = self._access.protection
            _system.map_memory(
                self.fd, offset, nbytes, flags=flags, address=address, protection=protection
            )
        if not self.is_ours():  # or not any more, and another file was mapped
            self._share_again(offset, nbytes)
        self._advise(offset, nbytes)
        self._access.open(offset, nbytes)  # one that is made so would be locked, holes and all

    def _share_again(self, offset: int, nbytes: int) -> None:
        if not self.mapped:
            raise self._closed()
        remap.share(*self._before(offset), nbytes, self._address + offset)

    def freeing_calls(self, offset: int, nbytes: int) -> list[Callable[..., object]]:
        """Return calls that give the pages of a range back; weakref callbacks of C alone.

        A callback in Python would be a frame in which a pending Ctrl-C is raised, printed and
        lost. Of the two the one does nothing unless the range is shared, the other unless private.
        """
        address, rounded = self._address + offset, page_round(nbytes)
        return [
            partial(_system.advise_ignoring, address, rounded, advice)
            for advice in (_system.MADV_REMOVE, _system.MADV_DONTNEED)
        ]

    def closing_call(self, offset: int, nbytes: int) -> Callable[..., object]:
        """Return a call, like those, that makes all that belongs to a range inaccessible.

        The last of them to be made, since nothing else can be done to the range then; `forget` when
        it was called.
        """
        return self._access.closing_call(offset, nbytes)

    def forget(self, offset: int) -> None:
        """A range that begins there may have become inaccessible."""
        self._access.forget(offset)

    def close_range(self, offset: int, nbytes: int) -> None:
        """Make all that belongs to a range inaccessible until it is used again."""
        if self.mapped:
            self._access.close(offset, nbytes)

    def leave(self, offset: int, nbytes: int) -> None:
        """Take a range that is shared out of this process's page tables; its pages stay."""
        _system.advise(self._address + offset, page_round(nbytes), _system.MADV_DONTNEED)

    def resident_nbytes(self) -> int:
        """Bytes of the file that have pages (or blocks on disk)."""
        self._check_identity()
        return os.fstat(self.fd).st_blocks * 512

    def huge_nbytes(self) -> int:
        """Bytes of the mapping that this process has in huge pages."""
        return huge_pages.mapped_nbytes(self._address, self.nbytes) if self.mapped else 0

    def close(self) -> None:
        """Unmap and close. Nobody may hold an array of this segment."""
        if self._view is not None:
            self._view.release()
            self._view = None
            _system.unmap_memory(self._address, self.nbytes)
        if self._first:
            first, self._first = self._first, 0
            _system.unmap_memory(first, _system.PAGE_NBYTES)
        close_if(self.fd, self._identity)
        self.fd = -1

    def __del__(self) -> None:
        if not self.kept:
            self.close()

    def is_ours(self) -> bool:
        """Tell whether the descriptor is still this file's: others may have closed it."""
        return is_file(self.fd, self._identity)

    def _check_identity(self) -> None:
        if not self.is_ours():
            raise self._closed()

    def _closed(self) -> ArenaError:
        return ClosedDescriptorError.of(self.fd, "the arena")


def _touch(view: memoryview) -> None:
    # Kernels before 5.14 have no MADV_POPULATE_WRITE. Writing what was read could undo another
    # thread's store between both, so this is the only path that needs such threads to be idle.
    for start in range(0, len(view), _system.PAGE_NBYTES):
        view[start] = view[start]
