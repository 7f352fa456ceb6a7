"""The pieces: what the iterables hold, in chunks, read no further ahead than was said.

**What.** `Pieces` gives the arguments of `func`, one chunk after the other.

**How it works.** Where every iterable has a length, each worker gets an equal share of the pieces;
else a chunk is one piece. The shortest iterable ends it, as with ``map``. What a call has not come
to, is given back, and goes to the next workers that have nothing to do, in parts if they are more.

So what is given back is never more, in number, than workers: a part goes only to a worker without a
call, and between two partial results that wait there is a call or something that was given back.

**Lifetime.** A piece is referred to until its call was sent; by `merging`, until the call has ended
if it may end early.

**When it cannot.** A length that is wrong costs nothing but unequal chunks: the end is where the
iterables end.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

from oobpickle._foreign import annotate
from oobpickle._merge.work import NOTE


def check_size(name: str, value: object) -> None:
    """Raise unless it is ``None`` or a number of pieces."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (pieces) or None, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 piece or more, not {value}")


class Chunk(NamedTuple):
    """Pieces that follow each other, and the number of the first."""

    start: int
    pieces: list[tuple[Any, ...]]


class Pieces:
    """The arguments of each call of `func`, in chunks.

    Attributes
    ----------
    n_taken : int
        How many pieces were read.
    n_all : int or None
        How many there are; ``None`` while that is not known.
    is_exhausted : bool
        Whether nothing is left to take.
    n_chunks_ahead : int
        How many chunks may be under way.
    """

    def __init__(
        self,
        iterables: tuple[Iterable[Any], ...],
        n_shares: int,
        n_workers: int,
        chunksize: int | None,
        buffersize: int | None,
    ) -> None:
        lengths = [len(one) for one in iterables if isinstance(one, Sized)]
        self.n_all = min(lengths) if len(lengths) == len(iterables) else None
        if chunksize is None:
            chunksize = -(-(self.n_all or 1) // n_shares)
        self._chunksize = max(chunksize, 1)
        self._buffersize = buffersize or 2 * n_workers * self._chunksize
        self._chunksize = min(self._chunksize, self._buffersize)
        self.n_chunks_ahead = self._buffersize // self._chunksize
        self._zipped: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        self._is_at_end = False
        self._given_back: list[Chunk] = []
        self.n_taken = 0

    @property
    def is_exhausted(self) -> bool:
        return self._is_at_end and not self._given_back

    def take(self, n_under_way: int, n_idle: int) -> Chunk | None:
        """Return the next chunk; ``None`` at the end, and while too much is under way.

        Parameters
        ----------
        n_under_way : int
            How many pieces were taken and are not done.
        n_idle : int
            How many workers have no call.
        """
        if self._given_back:
            return self._take_back(n_idle) if n_idle > 0 else None
        pieces: list[tuple[Any, ...]] = []
        if not self._is_at_end and n_under_way + self._chunksize <= self._buffersize:
            while len(pieces) < self._chunksize and (box := self._next()):
                pieces += box
        return Chunk(self.n_taken - len(pieces), pieces) if pieces else None

    def give_back(self, chunk: Chunk) -> None:
        """Take back what a call has not come to."""
        insort(self._given_back, chunk)

    def _take_back(self, n_idle: int) -> Chunk:
        n_parts = max(n_idle // len(self._given_back), 1)
        start, pieces = self._given_back.pop(0)
        size = -(-len(pieces) // n_parts)
        if pieces[size:]:
            self._given_back.insert(0, Chunk(start + size, pieces[size:]))
        return Chunk(start, pieces[:size])

    def boxes(self, tell: Callable[[int], None]) -> Iterator[list[tuple[Any, ...]]]:
        """Yield each piece in a list of its own; `tell` is told how many are done."""
        while box := self._next():
            yield box
            tell(self.n_taken)

    def _next(self) -> list[tuple[Any, ...]]:
        try:
            box = [next(self._zipped)]
        except StopIteration:
            self._is_at_end = True
            self.n_all = self.n_taken
            return []
        except Exception as error:
            annotate(error, f"{NOTE}raised by an iterable, after piece {self.n_taken - 1}")
            raise
        self.n_taken += 1
        return box
