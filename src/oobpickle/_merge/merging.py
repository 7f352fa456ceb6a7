"""Map and reduce: the results of workers are merged by the workers.

**What.** `merge`.

**How it works.** Each call folds one chunk of pieces, and a worker has one chunk if that does not
keep others waiting: then no more results are sent than there are workers. When the results of two
chunks are there that may be merged, they are: by this process, which has nothing else to do, and
if there are more such pairs by the workers, before further chunks. The engine says who is ready
(`engine`), `pieces` what is to do, `partials` which two may be merged, and `work` is what is done.

**Lifetime.** Whatever ends the merge, calls off what is under way. The engine stays the user's.

**When it cannot.** Calls under way cannot be interrupted: they end after the piece in hand, on
other machines (but for Ray's) when their chunk is done.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from typing import Any, Final

from oobpickle._foreign import annotate
from oobpickle._merge.choice import engine_for
from oobpickle._merge.engine import Engine, Ready
from oobpickle._merge.partials import Ordered, Partial, Unordered
from oobpickle._merge.pieces import Chunk, Pieces, check_size
from oobpickle._merge.progress import Reporter, reporter
from oobpickle._merge.work import NOTE, Clock, Job, Part, Span, fold_boxes, join

#: What stands in the signature for an `initial` that was not given.
_MISSING: Final[Any] = ...

#: How many chunks each worker has, where a call cannot end before its chunk is done.
_CHUNKS_A_WORKER: Final = 2

#: How long a call lasts at least that ends before. A worker without work waits about as long.
_LEAST_S: Final = 1.0


def merge(
    engine: Any,
    func: Callable[..., Any],
    *iterables: Iterable[Any],
    op: Callable[[Any, Any], Any] = operator.add,
    initial: Any = _MISSING,
    ordered: bool = True,
    chunksize: int | None = None,
    buffersize: int | None = None,
    progress: bool | Callable[[int, int | None], object] | None = None,
) -> Any:
    """Map and reduce on the workers of an engine: ``reduce(op, map(func, *iterables))``.

    Workers merge their own results, so few of them are sent. (This is not a *merge* of pandas,
    which is a join.)

    Parameters
    ----------
    engine : object
        Who does the work: a ``multiprocessing`` ``Pool`` or ``ThreadPool``, any
        ``concurrent.futures.Executor``, a ``distributed.Client``, the module ``ray``, a
        ``joblib.Parallel``, or ``None`` for this process. It is left as it was.
    func : callable
        Called with one item of each iterable. It gives away what it returns: an operator in place
        changes that.
    *iterables : iterable
        The pieces. The shortest ends it, as with ``map``.
    op : callable, optional
        ``op(left, right)`` returns what both are together; default ``operator.add``. It may change
        `left` and return it, as ``operator.iadd`` does: that saves an object of the total's size
        for each call. It leaves `right` alone, which others may have. It has to be associative.
    initial : object, optional
        The leftmost operand. It is used once, and never changed.
    ordered : bool, optional
        Whether operands keep the order of the pieces. If false, any two are merged as soon as they
        are there, so `op` has to be commutative too.
    chunksize : int, optional
        How many pieces a call folds before its result travels. Default: if all iterables have a
        length, each worker gets an equal share of the pieces, and returns half of it for others
        to help if that takes longer than a second and 100 times as long as `op`; Dask, Ray and
        joblib get two chunks for each worker. Else 1.
    buffersize : int, optional
        How many pieces may be taken from the iterables and not be done, at least 1. Default: 2 x
        workers x `chunksize`. No chunk is larger.
    progress : bool or callable, optional
        True shows a bar of ``tqdm``, if that is installed, or else a line on stderr. A callable
        is called in this thread with two positional arguments: the number of pieces that are done,
        and the number of all or ``None`` while that is not known. First with 0, then whenever
        a chunk is done, and once more at the end, when the total is complete.

    Returns
    -------
    object
        The total, private and writable; `initial` itself if there are no pieces.

    Raises
    ------
    TypeError
        If there are no pieces and no `initial`, as from ``functools.reduce``; if `op` returns
        ``None`` or ``NotImplemented``; if `engine` is something else.
    ValueError
        If `chunksize` or `buffersize` is below 1.
    concurrent.futures.process.BrokenProcessPool
        If a worker of a ``Pool`` dies, which alone would wait for ever. If it had waited for work
        at that moment, ``Pool.terminate`` waits for ever: see Notes. For a worker of another
        engine, what that engine raises.
    Exception
        The first error of `func`, `op` or an iterable, unchanged, with a note that names the piece
        and the level: 0 within a chunk, above it the joins in a row. The rest is called off.

    See Also
    --------
    writable : makes what Dask and Ray deliver one's own.

    Notes
    -----
    Works with and without `enabled`; inside, results travel through shared memory.

    Memory: workers x (total + one piece), since each folds its chunk, and the partial results that
    are on their way or wait in this process for a neighbour. Those are no more than 2 x workers +
    1, or ``buffersize // chunksize + 1`` if that is more, and two while a pair is sent to a
    worker; as a rule one or two wait.

    A ``Pool`` whose worker is killed while it waits for work cannot be terminated, nor its ``with``
    block be left: nobody gets the lock that the worker had. An executor can.

    Sums of floats are put together in another order than by ``reduce``, which may depend on which
    worker is ready first; with `engine` ``None`` it is the order of ``reduce``.

    Prior art: ``toolz.sandbox.fold``, ``dask.bag.Bag.fold``, ``treeReduce`` of Spark.

    Examples
    --------
    >>> import collections, multiprocessing, operator, oobpickle
    >>> words = ["abra", "cad", "abra"]
    >>> with multiprocessing.get_context("fork").Pool(2) as pool:
    ...     counts = oobpickle.merge(pool, collections.Counter, words, op=operator.iadd)
    >>> counts.most_common(2)
    [('a', 5), ('b', 2)]
    """
    check_size("chunksize", chunksize)
    check_size("buffersize", buffersize)
    for name, value in (("func", func), ("op", op)):
        if not callable(value):
            raise TypeError(f"{name} must be callable, not {value!r}")
    if not iterables:
        raise TypeError("merge() takes one iterable or more after func, as map() does")
    first = () if initial is _MISSING else (initial,)
    with reporter(progress) as report:
        if engine is None:
            here = Pieces(iterables, 1, 1, chunksize, buffersize)
            return _merge_here(func, op, here, first, report)
        with engine_for(engine) as runs:
            n_shares = runs.n_workers * (1 if runs.ends_early else _CHUNKS_A_WORKER)
            pieces = Pieces(iterables, n_shares, runs.n_workers, chunksize, buffersize)
            least_s = _LEAST_S if runs.ends_early and chunksize is None else None
            job = Job(func, op, runs.owning, runs.stop, least_s)
            partials = Ordered() if ordered else Unordered()
            run = _Run(runs, job, pieces, partials, report)
            try:
                return run.total(first)
            finally:
                run.forget()  # an error that is kept keeps no results


def _merge_here(
    func: Callable[..., Any], op: Any, pieces: Pieces, initial: tuple[Any, ...], report: Reporter
) -> Any:
    report.tell(0, pieces.n_all)
    total = fold_boxes(
        Job(func, op),
        0,
        pieces.boxes(lambda n_done: report.tell(n_done, pieces.n_all)),
        copy.deepcopy(initial),
        Clock(),
    )
    if not pieces.n_taken:
        return _of_nothing(initial)
    report.tell(pieces.n_taken, pieces.n_all)
    return total


def _of_nothing(initial: tuple[Any, ...]) -> Any:
    if not initial:
        raise TypeError("merge() of no pieces with no initial value")
    return initial[0]


class _Run:
    """One merge on an engine."""

    def __init__(
        self, engine: Engine, job: Job, pieces: Pieces, partials: Unordered, report: Reporter
    ) -> None:
        self._engine = engine
        self._job = job
        self._job_here = Job(job.func, job.op, engine.owning_here)
        self._pieces = pieces
        self._partials = partials
        self._report = report
        # Of the calls that may end early, by their first pieces.
        self._chunks: dict[int, list[tuple[Any, ...]]] = {}
        # Results that are here or on their way. Between two that wait there is always a call, or
        # what one has given back; so the limit stops nothing but results that are faster than they
        # can be joined. (Without a call it stops nothing: nobody else would go on.)
        self._most = max(2 * engine.n_workers, pieces.n_chunks_ahead)
        self._n_results = 0
        self._n_calls = 0
        self._n_done = 0

    def total(self, initial: tuple[Any, ...]) -> Any:
        """Do all of it."""
        self._tell()
        first = initial if self._engine.is_sending else copy.deepcopy(initial)
        while not self._is_complete():
            while ready := self._engine.take(wait=False):
                self._accept(ready)
            # Of several pairs one is for this process, which has them already; the others are for
            # workers that have nothing to do.
            here = None if self._engine.is_remote else self._partials.take_pair()
            is_idle = not self._joins_there() and here is None
            if self._feed(first):
                first, is_idle = (), False
            if here:
                self._join_here(*here)
                here = None
            if is_idle and self._n_calls and (ready := self._engine.take(wait=True)):
                self._accept(ready)
        if not self._n_done:
            return _of_nothing(initial)
        total = self._engine.fetch(self._partials.pop()[1])
        self._tell()
        return total

    def forget(self) -> None:
        """Refer to no result and no piece any more."""
        self._partials.clear()
        self._chunks.clear()

    def _is_complete(self) -> bool:
        return self._pieces.is_exhausted and not self._n_calls and len(self._partials) < 2

    def _tell(self) -> None:
        self._report.tell(self._n_done, self._pieces.n_all)

    def _joins_there(self) -> bool:
        is_any = False
        while self._engine.wants(len(self._partials), self._n_calls):
            pair = self._partials.take_pair()
            if pair is None:
                break
            is_any = True
            self._join_there(*pair)
            pair = None
        return is_any

    def _feed(self, initial: tuple[Any, ...]) -> bool:
        if self._n_results > self._most and self._n_calls:
            return False
        n_idle = self._engine.n_workers - self._n_calls
        chunk = self._pieces.take(self._pieces.n_taken - self._n_done, n_idle)
        if chunk is None:
            return False
        start, pieces = chunk
        self._n_results += 1
        self._n_calls += 1
        if self._job.least_s is not None:
            self._chunks[start] = pieces[:]  # a thread empties the other
        self._engine.submit_fold(Span(start, start + len(pieces)), self._job, pieces, initial)
        return True

    def _join_there(self, left: Partial, right: Partial) -> None:
        spans = left[0], right[0]
        self._n_calls += 1
        self._engine.submit(left[0].before(right[0]), join, self._job, left[1], right[1], spans)

    def _join_here(self, left: Partial, right: Partial) -> None:
        spans = left[0], right[0]
        self._n_results -= 1
        self._partials.add(left[0].before(right[0]), join(self._job_here, left[1], right[1], spans))

    def _accept(self, ready: Ready) -> None:
        span, result = ready
        if span is None:
            result()
            return
        try:
            value = result()
        except Exception as error:
            if not any(note.startswith(NOTE) for note in getattr(error, "__notes__", ())):
                annotate(error, f"{NOTE}raised for {span} (level {span.level})")
            raise
        self._n_calls -= 1
        if span.level == 0:
            pieces = self._chunks.pop(span.start, [])
            if isinstance(value, Part):
                value, n_pieces = value
                span = Span(span.start, span.start + n_pieces)
                self._pieces.give_back(Chunk(span.stop, pieces[n_pieces:]))
            self._n_done += span.stop - span.start
            self._partials.add(span, value)
            self._tell()
        else:
            self._n_results -= 1
            self._partials.add(span, value)
