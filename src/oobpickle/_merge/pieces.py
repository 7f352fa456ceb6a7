"""The pieces: what the iterables hold, in chunks, read no further ahead than was said.

**What.** `Pieces` gives the arguments of `func`, one chunk after the other.

**How it works.** Where every iterable has a length, a chunk is as large as two for each worker
need; else it is one piece. The shortest iterable ends it, as with ``map``.

**Lifetime.** A piece is referred to until its call was sent.

**When it cannot.** A length that is wrong costs nothing but unequal chunks: the end is where the
iterables end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Final

from oobpickle._foreign import annotate
from oobpickle._merge.work import NOTE

CHUNKS_A_WORKER: Final = 2


def check_size(name: str, value: object) -> None:
    """Raise unless it is ``None`` or a number of pieces."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (pieces) or None, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 piece or more, not {value}")


class Pieces:
    """The arguments of each call of `func`, in chunks.

    Attributes
    ----------
    n_taken : int
        How many pieces were read.
    n_all : int or None
        How many there are; ``None`` while that is not known.
    is_exhausted : bool
        Whether the end was met.
    n_chunks_ahead : int
        How many chunks may be under way.
    """

    def __init__(
        self,
        iterables: tuple[Iterable[Any], ...],
        n_workers: int,
        chunksize: int | None,
        buffersize: int | None,
    ) -> None:
        lengths = [len(one) for one in iterables if isinstance(one, Sized)]
        self.n_all = min(lengths) if len(lengths) == len(iterables) else None
        if chunksize is None:
            chunksize = -(-(self.n_all or 1) // (CHUNKS_A_WORKER * n_workers))
        self._chunksize = max(chunksize, 1)
        self._buffersize = buffersize or 2 * n_workers * self._chunksize
        self._chunksize = min(self._chunksize, self._buffersize)
        self.n_chunks_ahead = self._buffersize // self._chunksize
        self._zipped: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        self.n_taken = 0
        self.is_exhausted = False

    def take(self, n_under_way: int) -> list[tuple[Any, ...]]:
        """Return the next chunk; nothing at the end, and while too many are under way."""
        chunk: list[tuple[Any, ...]] = []
        if not self.is_exhausted and n_under_way + self._chunksize <= self._buffersize:
            while len(chunk) < self._chunksize and (box := self._next()):
                chunk += box
        return chunk

    def boxes(self, tell: Callable[[int], None]) -> Iterator[list[tuple[Any, ...]]]:
        """Yield each piece in a list of its own; `tell` is told how many are done."""
        while box := self._next():
            yield box
            tell(self.n_taken)

    def _next(self) -> list[tuple[Any, ...]]:
        try:
            box = [next(self._zipped)]
        except StopIteration:
            self.is_exhausted = True
            self.n_all = self.n_taken
            return []
        except Exception as error:
            annotate(error, f"{NOTE}raised by an iterable, after piece {self.n_taken - 1}")
            raise
        self.n_taken += 1
        return box
