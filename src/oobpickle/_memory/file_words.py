"""The words of a file that is not mapped: what is left to a process without address space.

**What.** `FileWords` stands in for the memoryview of 64-bit words that a mapping would give.

**How it works.** Each item is read or written by a system call. That is enough to load messages,
and not to join: a store is not atomic for those who have the file mapped.

**Lifetime.** As long as the file is open.

**When it cannot.** If somebody has closed the descriptor, they are those of an arena that is
closed: so this process sends and receives as without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol

from oobpickle._foreign import ignoring
from oobpickle._memory.descriptors import ClosedDescriptorError
from oobpickle._memory.layout import H_CLOSED

WORD_NBYTES: Final = 8


class _File(Protocol):
    def read_into(self, offset: int, destination: memoryview) -> None: ...

    def write(self, offset: int, source: memoryview) -> None: ...


class FileWords:
    """Some of the words of a file.

    Parameters
    ----------
    file : Segment
        Where they are.
    positions : range
        Which of its words.
    """

    def __init__(self, file: _File, positions: range) -> None:
        self._file = file
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, key: int | slice) -> Any:
        where = self._positions[key]
        if isinstance(where, range):
            return FileWords(self._file, where)
        word = memoryview(bytearray(WORD_NBYTES))
        try:
            self._file.read_into(WORD_NBYTES * where, word)
        except ClosedDescriptorError:
            return int(where == H_CLOSED)
        return word.cast("Q")[0]

    def __setitem__(self, key: int, value: int) -> None:
        word = memoryview(bytearray(WORD_NBYTES))
        word.cast("Q")[0] = value
        with ignoring(ClosedDescriptorError):
            self._file.write(WORD_NBYTES * self._positions[key], word)

    def __iter__(self) -> Iterator[int]:
        return (self[position] for position in range(len(self)))

    def __bytes__(self) -> bytes:
        return b"".join(word.to_bytes(WORD_NBYTES, "little") for word in self)

    def release(self) -> None:
        """Do nothing: there is no mapping to let go of."""
