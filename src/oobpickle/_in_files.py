"""Arrays in files: what lies in a file that `load` has mapped is sent as its place there.

**What.** `describe` says where buffers of a message lie, for its receiver; `fill` has them there;
`Kept` keeps their files in the meantime.

**How it works.** What has to be known stands behind the end of the stream, where no unpickler
looks: of each buffer its offset and size, and the file's path, identity (device, inode, size, time
of the last change), and descriptor in the sender. Which buffers these are, is decided in
``_core/message.c`` and ``mapped.c``. The receiver maps the file to which the path leads if it is
that very file, else that of the descriptor. There is one mapping of a file for all messages, so
what arrives cannot be written to.

**Lifetime.** A mapping lives as long as the arrays over it, and in a sender until its messages have
been loaded: whether that is so, is asked with each later message, and at the end of the block it is
dropped.

**When it cannot.** A file that was changed, or is gone from its path and with its sender, is an
`EnvelopeError`. One for which there is no address space is read."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from typing import Any, Final

from oobpickle._errors import EnvelopeError
from oobpickle._foreign import pass_on_foreign
from oobpickle._native import core

_Identity = tuple[int, int, int, int]
_Named = tuple[bytes, _Identity, int]  # path, and descriptor in the sender
_PLACE: Final = struct.Struct("<3QI")  # number of the buffer, offset, bytes, number of the file
_FILE: Final = struct.Struct("<3QqiI")  # identity, descriptor, bytes of the path that follows
_END: Final = struct.Struct("<i2IQ")  # pid, how many places and files, bytes of all before
_MOST_LOOKED_AT: Final = 64
#: Without O_NONBLOCK the open of a FIFO waits for its other end.
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Kept:
    """Files of messages that may not have been loaded yet: what keeps their descriptors open.

    Attributes
    ----------
    messages : list of (tuple, list)
        Index and generation of a message's first block, and its files.
    """

    def __init__(self, blocks: core.Blocks) -> None:
        self._blocks = blocks
        self.messages: list[tuple[tuple[int, int], list[core.MappedFile]]] = []

    def note(self, block: tuple[int, int], files: list[core.MappedFile]) -> None:
        """Keep the files of a message; drop those of the oldest ones that were loaded."""
        for message in self.messages[:_MOST_LOOKED_AT]:
            if not self._blocks.is_in_use(*message[0]):
                with contextlib.suppress(ValueError):  # another thread has
                    self.messages.remove(message)
        if files:
            self.messages.append((block, files))


def describe(places: list[tuple[int, int, int, core.MappedFile]]) -> bytes:
    """Return what is put behind the stream of a message, whose `Message.places` these are."""
    numbers = {file: n for n, file in enumerate(dict.fromkeys(file for *_, file in places))}
    told = [_PLACE.pack(*place, numbers[file]) for *place, file in places]
    for file in numbers:
        path, identity, fd = file.name
        told += _FILE.pack(*identity, fd, len(path)), path
    body = b"".join(told)
    return body + _END.pack(os.getpid(), len(places), len(numbers), len(body))


def fill(buffers: list[Any], stream: memoryview) -> None:
    """Put the buffers that lie in files into the list of all buffers of a message.

    Parameters
    ----------
    buffers : list
        The others, and anything in the place of these.
    stream : memoryview
        That of the message, with what `describe` returned behind it.

    Raises
    ------
    EnvelopeError
        If a file cannot be had as it was, or what `describe` returned is damaged.
    """
    try:
        sender, places, files = _told(stream)
        for number, at, nbytes, n in places:
            if number >= len(buffers) or n >= len(files) or at + nbytes > files[n][1][2]:
                raise _damaged()
            path, identity, fd = files[n]
            mapped = core.mapped_as(identity)
            if mapped is not None:
                buffers[number] = memoryview(mapped)[at : at + nbytes]
            else:
                names = path, f"/proc/{sender}/fd/{fd}"
                buffers[number] = _found(names, identity, at, nbytes)
    finally:
        del buffers, stream  # an error refers to this frame


def _told(stream: memoryview) -> tuple[int, list[tuple[int, int, int, int]], list[_Named]]:
    """Return the sender's pid, places with the number of their file, and the files."""
    try:
        sender, n_places, n_files, n_told = _END.unpack(stream[-_END.size :])
        told = bytes(stream[-_END.size - n_told : -_END.size])
        at, files = n_places * _PLACE.size, []
        places = list(_PLACE.iter_unpack(told[:at]))
        for _ in range(n_files):
            device, inode, nbytes, mtime_ns, fd, n = _FILE.unpack_from(told, at)
            at += _FILE.size + n
            files.append((told[at - n : at], (device, inode, nbytes, mtime_ns), fd))
    except struct.error as error:
        raise _damaged() from error
    finally:
        del stream  # an error refers to this frame
    if at != n_told or len(places) != n_places:
        raise _damaged()
    return sender, places, files


def _damaged() -> EnvelopeError:
    return EnvelopeError(
        "arrays of this message lie in files, and what it says of them is damaged: some process "
        "has written where it should not. The message is lost."
    )


def _found(names: tuple[bytes, str], identity: _Identity, at: int, nbytes: int) -> memoryview:
    """Return part of a file; `names` are its path, and its descriptor in the sender."""
    reasons = []
    for name in names:
        try:
            fd = os.open(name, _FLAGS)
            try:
                _check(os.fstat(fd), identity)
                return _part(fd, names[0], identity[2], at, nbytes)
            finally:
                os.close(fd)
        except OSError as error:
            pass_on_foreign(error)
            reasons.append(error.strerror)
        except ValueError as error:  # no path at all
            reasons.append(str(error))
    path, in_sender = names
    raise EnvelopeError(
        f"arrays of this message lie in the file {os.fsdecode(path)}, which process {os.getpid()} "
        f"cannot open as it was when they were sent: expected {_described(identity)}; found "
        f"{reasons[0]}; and through its sender, {in_sender}: {reasons[1]}. The message is lost. "
        "If a file may be deleted, replaced or written before its arrays have arrived, or may not "
        "be opened by their receiver, send copies: load it without mmap_mode, or copy the arrays."
    )


def _check(found: os.stat_result, identity: _Identity) -> None:
    there = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    if there != identity:
        raise OSError(errno.ESTALE, _described(there))


def _described(identity: _Identity) -> str:
    device, inode, nbytes, mtime_ns = identity
    seconds, ns = divmod(mtime_ns, 10**9)
    return f"{nbytes} bytes, written at {seconds}.{ns:09} (inode {inode}, device {device:#x})"


def _part(fd: int, path: bytes, nbytes_of_file: int, at: int, nbytes: int) -> memoryview:
    try:
        mapped: Any = core.MappedFile(fd, nbytes_of_file, "r", path)
        return memoryview(mapped)[at : at + nbytes]
    except (OSError, ValueError) as error:  # no address space for all of it; or it was cut off now
        pass_on_foreign(error)
    memory, done = memoryview(bytearray(nbytes)), 0
    while done < nbytes:
        n = os.preadv(fd, [memory[done:]], at + done)
        if n == 0:
            raise OSError(errno.ESTALE, f"cut off at {at + done} bytes while it was read")
        done += n
    return memory.toreadonly()
