"""What is done on the workers: the results of a chunk are made and folded, two partials are joined.

**What.** `fold` calls `func` for each piece of a chunk and merges each result into the total at
once; `join` merges two partial results. `Job` is what both have to know.

**How it works.** A result is sent when its chunk is done, so the fewer chunks the better; but
workers that have nothing left to do wait for those that have. So a call that may ends when half of
its chunk is done, if by then it has lasted long enough for sending not to matter: `Part` is what it
returns, and the rest is handed out anew.

The left operand is always one's own: what `func` has returned, what `op` has, or what came through
a pickle. If somebody else refers to the first result of a chunk too, such as a
cache that `func` keeps, it is copied before an operator in place changes it.

**Lifetime.** One total and one result at a time: a piece is dropped before its result is made.

**When it cannot.** What lies *inside* a result and is kept elsewhere is not seen to be: `func`
gives away what it returns. An operator that returns ``None`` is refused.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple, Protocol

from oobpickle._foreign import annotate
from oobpickle._merge.writing import private, writable

NOTE: Final = "oobpickle.merge: "
_NOTHING: Final = object()

#: A call that ends early has lasted so many times as long as its operator. To copy a total into
#: fresh memory, and to merge it elsewhere, takes about ten times as long.
_TIMES_OP: Final = 100

#: What has to be done before an object that an engine delivered may be changed.
OWNING: Final[dict[str, Callable[[Any], Any]]] = {
    "": lambda obj: obj,
    "writable": writable,
    "private": private,
}


class Stopping(Protocol):
    """What says whether the rest is called off."""

    def is_set(self) -> bool: ...


class Span(NamedTuple):
    """Of which pieces a partial result is, and after how many joins in a row."""

    start: int
    stop: int
    level: int = 0

    def __str__(self) -> str:
        if self.stop - self.start == 1:
            return f"piece {self.start}"
        return f"pieces {self.start} to {self.stop - 1}"

    def before(self, other: Span) -> Span:
        """Return the span of both together."""
        start, stop = min(self.start, other.start), max(self.stop, other.stop)
        return Span(start, stop, 1 + max(self.level, other.level))


class Part(NamedTuple):
    """The total of the first pieces of a chunk, of a call that has ended early."""

    total: Any
    n_pieces: int


class Job:
    """What each call has to know.

    Parameters
    ----------
    func, op : callable
        As for `merge`.
    owning : {"", "writable", "private"}
        What has to be done before an object that an engine delivered may be changed.
    stop : Stop, optional
        Says whether the rest is called off.
    least_s : float, optional
        How long a call lasts at least that ends before its chunk is done; ``None`` if none may.
    """

    __slots__ = ("func", "least_s", "op", "owning", "stop")

    def __init__(
        self,
        func: Callable[..., Any],
        op: Any,
        owning: str = "",
        stop: Stopping | None = None,
        least_s: float | None = None,
    ) -> None:
        self.func = func
        self.op = op
        self.owning = owning
        self.stop = stop
        self.least_s = least_s

    def __reduce__(self) -> tuple[Any, ...]:
        return Job, (self.func, self.op, self.owning, self.stop, self.least_s)

    @property
    def is_off(self) -> bool:
        """Whether nobody wants the result any more."""
        return self.stop is not None and self.stop.is_set()


def fold(job: Job, start: int, pieces: list[tuple[Any, ...]], initial: tuple[Any, ...] = ()) -> Any:
    """Return the total of a chunk, which is emptied; or a `Part`.

    Parameters
    ----------
    job : Job
        What to do.
    start : int
        The number of the first piece.
    pieces : list of tuple
        The arguments of each call of `func`; at least one.
    initial : tuple
        Of what comes before the first result, if anything does.
    """
    n_pieces, clock = len(pieces), Clock()

    def is_enough() -> bool:
        return len(pieces) <= n_pieces // 2 and clock.is_late(job.least_s)

    total = fold_boxes(job, start, _emptied(pieces, is_enough), initial, clock)
    return Part(total, n_pieces - len(pieces)) if pieces and not job.is_off else total


def fold_flat(job: Job, start: int, width: int, initial: tuple[Any, ...], *flat: Any) -> Any:
    """Do the same with the arguments one after the other, `width` for each call."""
    pieces = [flat[at : at + width] for at in range(0, len(flat), width)]
    del flat
    return fold(job, start, pieces, initial)


def _emptied(
    pieces: list[tuple[Any, ...]], is_enough: Callable[[], bool]
) -> Iterator[list[tuple[Any, ...]]]:
    pieces.reverse()
    while pieces and not is_enough():
        yield [pieces.pop()]


class Clock:
    """How long a call has lasted, and its operator the last time."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.op_s: float | None = None

    def is_late(self, least_s: float | None) -> bool:
        """Tell whether it costs little to send what there is."""
        if least_s is None or self.op_s is None:
            return False
        return time.monotonic() - self._begin >= max(least_s, _TIMES_OP * self.op_s)


def fold_boxes(
    job: Job,
    start: int,
    boxes: Iterable[list[tuple[Any, ...]]],
    initial: tuple[Any, ...],
    clock: Clock,
) -> Any:
    """Do the work of `fold`; each box has the arguments of one call, and is emptied."""
    total = _NOTHING
    with _Noting() as where:
        if initial:
            where.doing = "making the initial value one's own"
            total = OWNING[job.owning](initial[0])
            where.doing, initial = "", ()
        for number, box in enumerate(boxes, start):
            if job.is_off:
                return None
            where.doing = f"func, piece {number}"
            result, n_references = _call(job.func, box)
            where.doing = f"op, piece {number} into its chunk (level 0)"
            if total is _NOTHING:
                total = OWNING[job.owning](result)
            else:
                begin = time.monotonic()
                total = _apply(job.op, total, result)
                clock.op_s = time.monotonic() - begin
            if total is result and n_references > _ALONE:
                total = copied(total)
            where.doing, result = "", None
    return total


def join(job: Job, left: Any, right: Any, spans: tuple[Span, Span]) -> Any:
    """Return two neighbours merged."""
    if job.is_off:
        return None
    with _Noting() as where:
        level = spans[0].before(spans[1]).level
        where.doing = f"op, {spans[0]} with {spans[1]} (level {level})"
        return _apply(job.op, OWNING[job.owning](left), right)


class _Noting:
    """Notes on an error what was being done, if anything was."""

    doing = ""

    def __enter__(self) -> _Noting:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and self.doing:
            annotate(error, f"{NOTE}raised in {self.doing}")


def _call(func: Callable[..., Any], box: list[tuple[Any, ...]]) -> tuple[Any, int]:
    result = func(*box.pop())
    return result, sys.getrefcount(result)


#: The references to a result that only `_call` has, which differ with the version of Python.
_ALONE: Final = _call(object, [()])[1]


def copied(obj: Any) -> Any:
    """Return a copy, or the object itself where it cannot be copied."""
    try:
        return copy.deepcopy(obj)
    except Exception:  # whatever a class of a program raises
        return obj


def _apply(op: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    result = op(left, right)
    if result is None and not (left is None and right is None):
        raise TypeError(
            f"op {_name_of(op)} returned None for a {type(left).__qualname__} and a "
            f"{type(right).__qualname__}. It has to return what both are together; one that "
            "changes its left operand returns that, as operator.iadd and operator.ior do."
        )
    if result is NotImplemented:
        raise TypeError(
            f"op {_name_of(op)} returned NotImplemented for a {type(left).__qualname__} and a "
            f"{type(right).__qualname__}. Use the function of the operator module in its place, "
            "such as operator.iadd."
        )
    return result


def _name_of(op: object) -> str:
    return str(getattr(op, "__qualname__", None) or repr(op))
