"""An object in a file: `dump` writes it, `load` makes it again, `verify` looks at the file only.

**What.** The three public functions.

**How it works.** `dump` is one pass of the pickler, into a file without a name (`writing`), which
then takes the place of the old one (`placing`). `load` reads and checks the layout, has memory for
the buffers, mapped or read, and gives both to ``pickle.loads``.

**Lifetime.** Arrays that were mapped keep the mapping, and that keeps what the file was: also if it
is replaced or deleted. It ends with the last of them.

**When it cannot.** A file that somebody *shortens* while it is mapped kills whoever reads what was
cut off (SIGBUS): replace files, as `dump` does. No class of the main module is written."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import stat
import sys
import zlib
from collections.abc import Iterator
from typing import Any, Final

from oobpickle._errors import FileFormatError
from oobpickle._files.layout import FileLayout, check_data, read, read_into, type_name
from oobpickle._files.main_names import refuse_main
from oobpickle._files.placing import NewFile, Path
from oobpickle._files.writing import FileSink, WriteFailedError, Writer
from oobpickle._foreign import pass_on_foreign
from oobpickle._native import core
from oobpickle._pickling.payload import fresh_destinations
from oobpickle._pickling.serializer import take_apart

_BOTH: Final = mmap.PROT_READ | mmap.PROT_WRITE
#: A private mapping of more than the memory is refused without it; only what is written takes any.
_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
#: Flags and protection of the mapping.
_MODES: Final = {
    "r": (mmap.MAP_SHARED, mmap.PROT_READ),
    "c": (mmap.MAP_PRIVATE | _NORESERVE, _BOTH),
    "r+": (mmap.MAP_SHARED, _BOTH),
}
#: From 3.13 on a mapping need not keep a descriptor.
_UNTRACKED: Final[dict[str, Any]] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def dump(obj: object, path: Path, *, fsync: bool = False, checksum: bool = False) -> None:
    """Write `obj` to a file, which takes the place of what was there in one step.

    Parameters
    ----------
    obj : object
        Anything that ``pickle`` takes, but for classes and functions of the main module.
    path : str, bytes or path-like
        A symbolic link is followed. Its directory must be writable.
    fsync : bool, default False
        Whether to return only when the file and its name are on the disk. Without it a crash of
        the *machine* may lose the file.
    checksum : bool, default False
        Whether to store checksums of the buffers: `verify` looks at them, and `load` if it does
        not map. Header, table and stream always have them.

    Raises
    ------
    OSError
        As ``open(path, "wb")`` and writing raise it; what was there is unchanged.
    pickle.PicklingError
        If `obj` refers to a class or function of the main module, which no other program finds.
    Exception
        Whatever ``pickle.dumps(obj, protocol=5)`` raises.

    See Also
    --------
    load : the reverse.
    dumps : the same without a file.

    Notes
    -----
    Each buffer is written once, from the memory of `obj`, when the pickler reaches it; other
    threads must not change it meanwhile. A process that is killed leaves the old file or the new.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np, oobpickle
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "model.oob")
    >>> oobpickle.dump({"weights": np.arange(1000.0), "name": "a"}, path)
    >>> model = oobpickle.load(path, mmap_mode="r")
    >>> model["weights"][-1], model["weights"].flags.writeable
    (np.float64(999.0), False)
    >>> folder.cleanup()
    """
    with NewFile(path, fsync=fsync) as file:
        writer = Writer(file.fd, has_checksums=checksum, reserves=file.is_nameless)
        sink = FileSink(writer)
        try:
            take_apart(obj, sink)
            refuse_main(sink.pieces)
            writer.finish(sink.pieces)
        except WriteFailedError as failed:
            with file.explaining():
                raise failed.error from None
        file.place()


def load(path: Path, mmap_mode: str | None = None) -> Any:
    """Load the object of a file. Loading runs code, as with pickle: load only what you trust.

    Parameters
    ----------
    path : str, bytes or path-like
        What `dump` has written.
    mmap_mode : {None, "r", "c", "r+"}, optional
        How arrays get their memory. ``None`` reads it: ordinary arrays. The others map the file,
        which is read as it is used, and whose pages all processes share. ``"r"``: arrays that NumPy
        refuses to write. ``"c"``: copy on write, the file never changes. ``"r+"``: what is written
        to the memory of arrays goes to the file, and nothing else does.

    Returns
    -------
    object
        Arrays begin at a multiple of 64 bytes.

    Raises
    ------
    FileFormatError
        If the file is truncated, altered, of a newer version, or not from `dump`; or has checksums
        of its data, and `mmap_mode` is ``"r+"``.
    OSError
        As ``open(path, "rb")`` raises it.
    ValueError
        If `mmap_mode` is another one.

    Notes
    -----
    What cannot be mapped is copied in all modes: ``bytes``, ``bytearray``, ``array.array``, arrays
    of Python objects, arrays of classes with an ``__array_finalize__``. A mapped file must not be
    shortened: replace it, as `dump` does.

    Inside `enabled` contiguous arrays that were loaded with ``"r"`` are sent as their place in the
    file, and arrive read-only. Keep the file until then.

    Examples
    --------
    See `dump`.
    """
    if mmap_mode is not None and mmap_mode not in _MODES:
        raise ValueError(f"mmap_mode must be None, 'r', 'c' or 'r+', not {mmap_mode!r}")
    with _opened(path, for_writing=mmap_mode == "r+") as (fd, name):
        layout, stream = read(fd, name)
        if not layout.sizes:
            buffers = []
        elif mmap_mode is None:
            buffers = _read_buffers(fd, name, layout)
        else:
            buffers = _map_buffers(fd, name, layout, mmap_mode)
    return pickle.loads(stream, buffers=buffers)


def verify(path: Path) -> FileLayout:
    """Check a file that `dump` has written, without loading anything of it: no code is run.

    Parameters
    ----------
    path : str, bytes or path-like
        The file.

    Returns
    -------
    FileLayout
        Its sizes and offsets. ``checksums`` is ``None`` if the file has none of its data, which
        could then not be checked.

    Raises
    ------
    FileFormatError
        If the file is truncated, altered, of a newer version, or not from `dump`.
    OSError
        As ``open(path, "rb")`` raises it.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np, oobpickle
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "model.oob")
    >>> oobpickle.dump(np.arange(1000.0), path, checksum=True)
    >>> oobpickle.verify(path).sizes
    [8000]
    >>> folder.cleanup()
    """
    with _opened(path, for_writing=False) as (fd, name):
        layout, _ = read(fd, name)
        for position, expected in enumerate(layout.checksums or ()):
            found = 0
            for piece in _pieces(fd, name, layout.offsets[position], layout.sizes[position]):
                found = zlib.crc32(piece, found)
            check_data(name, position, expected, found)
    return layout


_PIECE_NBYTES: Final = 1 << 20


def _pieces(fd: int, name: str, at: int, nbytes: int) -> Iterator[memoryview]:
    memory = memoryview(bytearray(min(nbytes, _PIECE_NBYTES)))
    for done in range(0, nbytes, _PIECE_NBYTES):
        piece = memory[: min(nbytes - done, _PIECE_NBYTES)]
        read_into(fd, name, piece, at + done)
        yield piece


@contextlib.contextmanager
def _opened(path: Path, *, for_writing: bool) -> Iterator[tuple[int, str]]:
    """Open a file; yield its descriptor, and what to call it in errors."""
    path = os.fspath(path)
    name = os.fsdecode(path)
    # Without O_NONBLOCK the open of a FIFO waits for its other end.
    flags = os.O_RDWR if for_writing else os.O_RDONLY
    if for_writing and not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise FileFormatError(f"{name}: {type_name(mode)}, not a regular file.")
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        yield fd, name
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise
    finally:
        os.close(fd)


def _read_buffers(fd: int, name: str, layout: FileLayout) -> list[memoryview]:
    buffers = fresh_destinations(layout.sizes)
    for position, (memory, at) in enumerate(zip(buffers, layout.offsets, strict=True)):
        read_into(fd, name, memory, at)
        if layout.checksums is not None:
            check_data(name, position, layout.checksums[position], zlib.crc32(memory))
    return buffers


def _map_buffers(fd: int, name: str, layout: FileLayout, mode: str) -> list[memoryview]:
    if mode == "r+" and layout.checksums is not None:
        raise FileFormatError(
            f"{name}: it has checksums of its data, which writing would make wrong. Use "
            "mmap_mode='c', or write it with checksum=False."
        )
    flags, protection = _MODES[mode]
    mapped: Any
    try:
        if core is not None:
            mapped = core.MappedFile(fd, layout.nbytes, mode, _path_of(fd, name))
        else:
            mapped = mmap.mmap(fd, layout.nbytes, flags=flags, prot=protection, **_UNTRACKED)
    except ValueError as error:  # the file is shorter than that
        raise FileFormatError(f"{name}: truncated while it was read: {error}.") from None
    view = memoryview(mapped)
    return [view[at : at + n] for at, n in zip(layout.offsets, layout.sizes, strict=True)]


def _path_of(fd: int, name: str) -> bytes:
    """Return the absolute path of an open file, without symbolic links where the system says it."""
    try:
        return os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError as error:
        pass_on_foreign(error)
        return os.path.abspath(os.fsencode(name))
