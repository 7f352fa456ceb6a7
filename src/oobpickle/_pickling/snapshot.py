"""Snapshots: memory into which everything is copied at one moment.

**What.** `taken` copies parts, one after the other, as they are when it is called; if they are
large, into a `Snapshot`.

**How it works.** Plain pickle copies an array in one call that keeps the GIL: no thread and no
signal handler writes to the array meanwhile, so what arrives is what it held at one moment. Here
one such call copies all parts: ``map`` in C assigns one after the other to its place, and no
bytecode runs until the last is done. Strided arrays are copied by NumPy, which gives up the GIL in
those versions in which it also does so when it pickles them.

`Snapshot.write_to` gives the pages of each step back to the system as soon as they are written:
while the memory of the receiver grows, that of the sender shrinks.

**Lifetime.** It is unmapped with the last view of it, and refers to no other memory.

**When it cannot.** `MemoryError` if there is no memory, `ResizedError` if a part changed its size;
both while it is made."""

from __future__ import annotations

import mmap
import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from oobpickle._errors import ResizedError
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._pickling.resizable import Resizable

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_ORDINARY: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
#: What is written at a time, and then given back. Less is copied into memory of malloc, which has
#: its pages already: fresh ones take longer than the copy.
_STEP_NBYTES: Final = 16 << 20
#: The first version whose ``tobytes`` gives up the GIL for strided arrays.
_NUMPY_GIVES_UP_GIL: Final = (2, 4)


def taken(parts: Iterable[Any]) -> memoryview:
    """Copy parts, one after the other, at one moment.

    Parameters
    ----------
    parts : iterable
        ``bytes``, memory of bytes, `Resizable`, or strided arrays without Python objects.

    Raises
    ------
    MemoryError
        If there is no memory for it.
    ResizedError
        If a part has another size than when it was taken apart.
    """
    parts = [part for part in parts if _nbytes_of(part)]
    nbytes = sum(map(_nbytes_of, parts))
    if nbytes > _STEP_NBYTES:
        memory = Snapshot.fresh(nbytes)
        view = memoryview(memory)
        _copy(parts, view, memory)
        return view
    import numpy as np

    view = memoryview(np.empty(nbytes, np.uint8))
    _copy([_settled(part) for part in parts], view)
    return view


class Snapshot(mmap.mmap):
    """Ordinary memory of which the system has back what is written.

    Attributes
    ----------
    is_for_one : bool
        Whether `write_to` is all that reads it, and does so once.
    """

    is_for_one = False

    @classmethod
    def fresh(cls, nbytes: int) -> Snapshot:
        """Return so much memory.

        Raises
        ------
        MemoryError
            If there is none.
        """
        # Not by malloc, which keeps what is freed below something that is not.
        try:
            memory = cls(-1, nbytes, flags=_ORDINARY)
        except OSError as error:
            pass_on_foreign(error)
            raise MemoryError(f"no memory to copy {nbytes} bytes of a message") from error
        with ignoring(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def write_to(self, send: Callable[[Any], None]) -> None:
        """Write all of it, as `multiprocessing` frames a message, and give back what is written.

        Parameters
        ----------
        send : callable
            ``Connection._send``: writes all that it is given.
        """
        nbytes = len(self)
        send(_framing(nbytes))
        with memoryview(self) as view:
            for at in range(0, nbytes, _STEP_NBYTES):
                with view[at : at + _STEP_NBYTES] as step:
                    send(step)  # what is left of it is sliced off again and again
                    n = len(step)
                with ignoring(OSError):  # the pages may be locked
                    self.madvise(mmap.MADV_DONTNEED, at, n)


def _framing(nbytes: int) -> bytes:
    return struct.pack("!i", nbytes) if nbytes <= 0x7FFFFFFF else struct.pack("!iQ", -1, nbytes)


def _nbytes_of(part: Any) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes


def _settled(part: Any) -> Any:
    """Return a copy of what can be resized."""
    if not isinstance(part, Resizable):
        return part
    content = b"".join((part.owner,))
    if len(content) != part.nbytes:
        raise _resized([part])
    return content


def _copy(parts: Sequence[Any], view: memoryview, file: mmap.mmap | None = None) -> None:
    """Copy parts one after the other; `file` is the memory too, if one of them can be resized."""
    calls: list[Callable[[Any], Any]] = []
    arguments: list[Any] = []
    expected: list[int | None] = []  # of what can be resized
    at = 0
    for part in parts:
        nbytes = _nbytes_of(part)
        if file is not None and isinstance(part, Resizable):
            # Not even the buffer of such a part is held before: its owner could not resize it.
            calls += file.seek, file.write
            arguments += at, part.owner
            expected += None, nbytes
        else:
            calls.append(_assignment(view, slice(at, at + nbytes), part))
            arguments.append(part)
            expected.append(None)
        at += nbytes
    try:
        # No bytecode, and so no other thread and no signal handler, runs in between.
        found = list(map(operator.call, calls, arguments))
    except ValueError:  # beyond the end
        raise _resized(parts) from None
    if any(n not in (None, m) for n, m in zip(expected, found, strict=True)):
        raise _resized(parts)


def _assignment(view: memoryview, place: slice, part: Any) -> Callable[[Any], Any]:
    """Return a function in C that copies a part to its place."""
    if isinstance(part, (bytes, memoryview)):
        return partial(operator.setitem, view, place)
    import numpy as np

    destination = np.ndarray(part.shape, part.dtype, view[place])
    if tuple(map(int, np.__version__.split(".")[:2])) < _NUMPY_GIVES_UP_GIL:
        # As slow as ``tobytes`` there, and for the same reason.
        return partial(setattr, destination, "flat")
    return partial(operator.setitem, destination, ...)


def _resized(parts: Iterable[Any]) -> ResizedError:
    for part in parts:
        if isinstance(part, Resizable):
            try:
                part.raw()
            except ResizedError as error:
                return error
    return ResizedError("what is in a message changed its size while it was copied, and back")
