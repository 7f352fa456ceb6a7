"""Count a text with a pool of workers, plainly and with oobpickle, side by side.

The model is a character Markov model of order k over 64 symbols: how often did each
symbol follow each run of k symbols? Its counts are one dense array of ``uint32`` with the
shape ``(64,) * (k + 1)``, so that every order needs 64 times the memory of the one before:
1 MB at order 2, 67 MB at order 3, 4.3 GB at order 4.

The files of a directory are dealt into pieces, the workers of a ``multiprocessing.Pool``
turn each piece into a model, and the parent adds the models up. What a worker sends is far
bigger than what it has read, so most of the time goes into sending. With
``oobpickle.enabled()`` around the same code, the counts travel through shared memory
instead of a pipe::

    python markov_model.py                          # Python's own standard library
    python markov_model.py ~/notes --glob "*.txt" --order 2
    python markov_model.py --merge                  # where the models are added up

With ``--merge`` both runs use oobpickle: in one the parent adds up all models, in the other
``oobpickle.merge`` has the workers add up theirs, and only their sums are sent.

The parts to copy are `MarkovModel`, which knows nothing of oobpickle, `merge_pieces`, which
doesn't either, `merge_at_workers`, which is the same in one call, and `run`, which turns
oobpickle on. The rest measures, checks and prints.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import heapq
import importlib.util
import math
import multiprocessing
import operator
import os
import shlex
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Codes = npt.NDArray[np.int64]
Counts = npt.NDArray[np.uint32]

# ----------------------------------------------------------------------------- the model

# Symbol 0 is "any other byte". The 63 others are what source code and English are made of:
# newline, space, letters (upper case counts as lower case), digits and the commoner half of
# punctuation. With a power of two, a run of symbols is a number of six bits for each.
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789\"#%&'()*+,-./:<=>@[\\]_{|}"
N_BITS = 6
N_SYMBOLS = 2**N_BITS

# How many bytes to count at once. It bounds the temporary arrays, to about 20 MB.
CHUNK_SIZE = 2**20


def make_symbol_table() -> npt.NDArray[np.uint8]:
    """Return the symbol, 0 to 63, of each of the 256 bytes."""
    table = np.zeros(256, np.uint8)
    for symbol, character in enumerate(ALPHABET, start=1):
        table[ord(character)] = table[ord(character.upper())] = symbol
    return table


SYMBOL_OF_BYTE = make_symbol_table()


def iterate_codes(stream: BinaryIO, order: int) -> Iterator[Codes]:
    """Read a stream and number each run of ``order + 1`` symbols in it.

    Parameters
    ----------
    stream : binary file
        What to read, to its end, a chunk at a time.
    order : int
        How many symbols come before the last one of a run; at least 1.

    Yields
    ------
    ndarray of int64
        For each run that ends in the chunk, its place in the flattened table of counts.
    """
    tail = b""
    while chunk := stream.read(CHUNK_SIZE):
        text = tail + chunk
        symbols = SYMBOL_OF_BYTE[np.frombuffer(text, np.uint8)]
        n_runs = max(len(symbols) - order, 0)
        codes = np.zeros(n_runs, np.int64)
        for i in range(order + 1):
            codes <<= N_BITS
            codes |= symbols[i : i + n_runs]
        yield codes
        tail = text[-order:]


class MarkovModel:
    """How often each symbol follows each run of `order` symbols.

    Parameters
    ----------
    order : int
        How many symbols the next one depends on; at least 1.

    Attributes
    ----------
    counts : ndarray of uint32, of shape ``(64,) * (order + 1)``
        The last axis is the symbol that follows, the others are the ones before it.
    """

    def __init__(self, order: int) -> None:
        self.counts: Counts = np.zeros((N_SYMBOLS,) * (order + 1), np.uint32)

    @property
    def order(self) -> int:
        """How many symbols the next one depends on."""
        return self.counts.ndim - 1

    def add_text(self, stream: BinaryIO) -> None:
        """Count a text, in place.

        The first symbols, which have fewer than `order` before them, are only context.
        Nothing carries over from one text to the next, so texts can be counted in any
        sequence, by any number of models.

        Parameters
        ----------
        stream : binary file
            The text, of any length.
        """
        flat = self.counts.reshape(-1)
        for codes in iterate_codes(stream, self.order):
            np.add.at(flat, codes, np.uint32(1))

    def __iadd__(self, other: MarkovModel) -> MarkovModel:
        """Add the counts of another model of the same order to this one's."""
        if not isinstance(other, MarkovModel) or other.order != self.order:
            return NotImplemented
        self.counts += other.counts
        return self

    def __add__(self, other: MarkovModel) -> MarkovModel:
        """Return a new model with the counts of both."""
        if not isinstance(other, MarkovModel) or other.order != self.order:
            return NotImplemented
        total = MarkovModel(self.order)
        np.add(self.counts, other.counts, out=total.counts)
        return total


# -------------------------------------------------------------- the workers and the parent


class Stamped(Generic[T]):
    """A value that notes when it was ready, and when it was unpickled elsewhere.

    A pool unpickles results in a thread of its own, so the time that the main thread is
    busy with the results before does not count.

    Parameters
    ----------
    value : object
        What to send.

    Attributes
    ----------
    ready, arrived : float
        By ``time.monotonic()``, a clock that the processes of a machine share.
    """

    def __init__(self, value: T) -> None:
        self.value = value
        self.ready = time.monotonic()
        self.arrived = math.nan

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrived = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Job:
    """What to count, and with what: the same for the plain run and the other one."""

    order: int
    pieces: list[list[Path]]
    n_workers: int
    start_method: str


@dataclasses.dataclass(frozen=True)
class Merged:
    """The sum of the models of all pieces.

    Attributes
    ----------
    total : MarkovModel
        The sum.
    transfers : list of float
        For each piece, the seconds from "the worker has the model" to "the parent has it"; none
        where the workers have added them up.
    nbytes : int or None
        The size of the models that were sent, together, if the parent has seen each.
    finished : float
        When it was complete, by ``time.monotonic()``.
    """

    total: MarkovModel
    transfers: list[float]
    nbytes: int | None
    finished: float


def count_files(order: int, paths: Sequence[Path]) -> MarkovModel:
    """Count files, each by itself, with one model.

    Parameters
    ----------
    order : int
        The order of the model.
    paths : sequence of Path
        The files.

    Returns
    -------
    MarkovModel
        The counts of all of them together.
    """
    model = MarkovModel(order)
    for path in paths:
        with path.open("rb") as stream:
            model.add_text(stream)
    return model


def count_piece(order: int, paths: Sequence[Path]) -> Stamped[MarkovModel]:
    """Do a worker's part; for the parameters see `count_files`."""
    return Stamped(count_files(order, paths))


@contextlib.contextmanager
def open_pool(job: Job) -> Iterator[Pool]:
    """Make a pool, and at the end wait for the calls under way and end the workers.

    Parameters
    ----------
    job : Job
        How many workers, and how to start them.

    Yields
    ------
    Pool
        The pool.
    """
    context = multiprocessing.get_context(job.start_method)
    # Ctrl-C is for the parent only, so that no worker dies halfway through a message:
    # ``Pool.terminate`` can wait forever for the rest of it.
    with context.Pool(job.n_workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield pool
        finally:
            pool.close()
            pool.join()


def map_bounded(
    pool: Pool, limit: int, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]
) -> Iterator[T]:
    """Call a function in a pool, with few calls under way at once.

    ``Pool.imap`` and its like start every call at once and keep the results until they are
    taken. Where the workers are faster than the parent, that can be all of them: too much
    for models of 4.3 GB.

    Parameters
    ----------
    pool : Pool
        Where to call the function.
    limit : int
        How many calls to have under way, counting those whose result is waiting.
    function : callable
        What to call.
    calls : sequence of tuple
        The arguments of each call.

    Yields
    ------
    object
        The results, in the sequence of `calls`.
    """
    under_way: collections.deque[AsyncResult[T]] = collections.deque()
    for arguments in calls:
        if len(under_way) == limit:
            yield under_way.popleft().get()
        under_way.append(pool.apply_async(function, arguments))
    while under_way:
        yield under_way.popleft().get()


def merge_pieces(job: Job, label: str, memory: PeakMemory) -> Merged:
    """Count the pieces of a text in a pool and add up the models.

    Parameters
    ----------
    job : Job
        What to count.
    label : str
        The name of this run, for the progress bar.
    memory : PeakMemory
        What watches the memory in the meantime.

    Returns
    -------
    Merged
        The sum, and how it went.
    """
    total = MarkovModel(job.order)
    transfers = []
    nbytes = 0
    calls = [(job.order, piece) for piece in job.pieces]
    # The thread of `memory` starts after the workers: forking and threads don't mix.
    with open_pool(job) as pool, memory:
        show_progress(label, 0, len(calls))
        for result in map_bounded(pool, job.n_workers, count_piece, calls):
            total += result.value
            transfers.append(result.arrived - result.ready)
            nbytes += result.value.counts.nbytes
            # Otherwise this model would be kept until the next one is here.
            del result
            show_progress(label, len(transfers), len(calls))
        return Merged(total, transfers, nbytes, finished=time.monotonic())


def merge_at_workers(job: Job, label: str, memory: PeakMemory) -> Merged:
    """Count the pieces of a text in a pool, whose workers add up the models.

    Parameters
    ----------
    job, label, memory
        As for `merge_pieces`.

    Returns
    -------
    Merged
        The sum. How often a model was sent is not seen here.
    """
    import oobpickle  # only here, so that the plain run does without

    with open_pool(job) as pool, memory:
        total = oobpickle.merge(
            pool,
            functools.partial(count_files, job.order),
            job.pieces,
            op=operator.iadd,
            progress=lambda n_done, n_all: show_progress(label, n_done, n_all or len(job.pieces)),
        )
        return Merged(total, [], None, finished=time.monotonic())


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one run has cost, and the checksum of what came out.

    Attributes
    ----------
    wall : float
        Seconds from before the pool is made until the table is complete.
    transfers : list of float
        As in `Merged`.
    nbytes : int or None
        As in `Merged`.
    nbytes_out_of_band, n_fallbacks : int or None
        From oobpickle's statistics, if it was in use.
    peak_memory : int or None
        As in `PeakMemory`.
    crc32 : int
        Of the table.
    problem : str or None
        What is wrong with the table.
    """

    wall: float
    transfers: list[float]
    nbytes: int | None
    nbytes_out_of_band: int | None
    n_fallbacks: int | None
    peak_memory: int | None
    crc32: int
    problem: str | None


def run(mode: str, job: Job, reference: Reference) -> Measurement:
    """Merge the pieces of a text, plainly or with oobpickle, and measure it.

    Parameters
    ----------
    mode : {"plain", "oobpickle", "merge"}
        Whether to use oobpickle, and who adds up the models.
    job : Job
        What to count.
    reference : Reference
        What should come out.

    Returns
    -------
    Measurement
        What it has cost, and whether the table is right.
    """
    memory = PeakMemory()
    nbytes_out_of_band = n_fallbacks = None
    if mode == "plain":
        start = time.monotonic()
        merged = merge_pieces(job, mode, memory)
    else:
        import oobpickle  # only here, so that the plain run does without

        add_up = merge_at_workers if mode == "merge" else merge_pieces
        start = time.monotonic()
        with oobpickle.enabled() as arena:
            merged = add_up(job, mode, memory)
            if arena is not None:  # None: this system has no shared memory
                arena_statistics = arena.statistics()
                nbytes_out_of_band = arena_statistics.nbytes_out_of_band
                n_fallbacks = arena_statistics.n_fallbacks
    crc32 = zlib.crc32(merged.total.counts)
    return Measurement(
        wall=merged.finished - start,
        transfers=merged.transfers,
        nbytes=merged.nbytes,
        nbytes_out_of_band=nbytes_out_of_band,
        n_fallbacks=n_fallbacks,
        peak_memory=memory.peak,
        crc32=crc32,
        problem=reference.find_problem(merged.total, crc32),
    )


# -------------------------------------------------------------------------- the right table


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the merged table should be, counted without any other process.

    Attributes
    ----------
    crc32 : int or None
        Of the whole table; None where a second table would be too much.
    cells : ndarray of int64
        Cells of the flattened table to look at instead, ascending.
    counts : ndarray of uint32
        What should be in them.
    """

    crc32: int | None
    cells: Codes
    counts: Counts

    def find_problem(self, total: MarkovModel, crc32: int) -> str | None:
        """Compare a table with what it should be.

        Parameters
        ----------
        total : MarkovModel
            The table.
        crc32 : int
            Its checksum.

        Returns
        -------
        str or None
            What is wrong, if anything.
        """
        if self.crc32 is not None and crc32 != self.crc32:
            return f"its crc32 is {crc32:08x}, that of a serial count is {self.crc32:08x}"
        n_wrong = np.count_nonzero(total.counts.reshape(-1)[self.cells] != self.counts)
        if n_wrong:
            return f"{n_wrong:,} of {len(self.cells):,} recounted cells are different"
        return None

    def __str__(self) -> str:
        if self.crc32 is not None:
            return f"crc32 {self.crc32:08x} by a serial count"
        n_used = np.count_nonzero(self.counts)
        return f"{len(self.cells):,} recounted cells, {n_used:,} of them not 0"


def make_reference(order: int, paths: Sequence[Path]) -> Reference:
    """Count a text serially; from order 4 on only 10,000 cells of the table.

    Parameters
    ----------
    order : int
        The order of the model.
    paths : sequence of Path
        The files of the text.

    Returns
    -------
    Reference
        What a merged table should be.
    """
    if order < 4:
        crc32 = zlib.crc32(count_files(order, paths).counts)
        return Reference(crc32, np.zeros(0, np.int64), np.zeros(0, np.uint32))
    cells = pick_cells(order, paths)
    return Reference(None, cells, count_cells(order, paths, cells))


def pick_cells(order: int, paths: Sequence[Path], n_cells: int = 10_000) -> Codes:
    """Pick cells of the table at random, half of them from runs that the text has.

    Nearly all cells are 0: among cells picked without regard to the text, an empty table
    would hardly be told from the right one.

    Parameters
    ----------
    order : int
        The order of the model.
    paths : sequence of Path
        The files of the text.
    n_cells : int, optional
        How many to pick; those picked twice count twice.

    Returns
    -------
    ndarray of int64
        The cells, ascending.
    """
    generator = np.random.default_rng(0)
    n_files = min(len(paths), 250)
    picked = [np.zeros(0, np.int64)]
    for i in generator.choice(len(paths), n_files, replace=False):
        with paths[i].open("rb") as stream:
            codes = next(iterate_codes(stream, order), np.zeros(0, np.int64))
        if len(codes):
            picked.append(generator.choice(codes, 4 * n_cells // n_files))
    used = generator.permutation(np.unique(np.concatenate(picked)))[: n_cells // 2]
    others = generator.integers(N_SYMBOLS ** (order + 1), size=n_cells - len(used))
    return np.unique(np.concatenate([used, others]))


def count_cells(order: int, paths: Sequence[Path], cells: Codes) -> Counts:
    """Count only some cells of the table.

    Parameters
    ----------
    order : int
        The order of the model.
    paths : sequence of Path
        The files of the text.
    cells : ndarray of int64
        The cells of the flattened table, ascending.

    Returns
    -------
    ndarray of uint32
        The counts of these cells.
    """
    counts = np.zeros(len(cells), np.uint32)
    for path in paths:
        with path.open("rb") as stream:
            for codes in iterate_codes(stream, order):
                places = np.searchsorted(cells, codes).clip(max=len(cells) - 1)
                np.add.at(counts, places[cells[places] == codes], np.uint32(1))
    return counts


# ------------------------------------------------------------------------------- the memory


class PeakMemory:
    """The most memory that this process and its descendants have had at once.

    It is sampled by a thread, inside a ``with`` block, and is the sum of the private memory
    of each process (``RssAnon``) and of the growth of the machine's shared memory (``Shmem``)
    since this object was made. Memory that others share in the meantime counts too, and so
    does, once for each process, what a forked process has not changed since.

    Attributes
    ----------
    peak : int or None
        In bytes; None before the first sample and where there is no ``/proc``.
    """

    INTERVAL = 0.02

    def __init__(self) -> None:
        self.peak: int | None = None
        self._shared_before = read_kilobytes("/proc/meminfo", "Shmem")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._shared_before is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self._sample()
            if self._stop.wait(self.INTERVAL):
                return

    def _sample(self) -> None:
        private = sum(
            read_kilobytes(f"/proc/{process}/status", "RssAnon") or 0
            for process in find_process_tree(os.getpid())
        )
        shared = read_kilobytes("/proc/meminfo", "Shmem") or 0
        grown = max(shared - (self._shared_before or 0), 0)
        self.peak = max(self.peak or 0, (private + grown) * 1024)


def read_kilobytes(path: str, key: str) -> int | None:
    """Read a line like ``Shmem:  1234 kB`` of a file in ``/proc``.

    Parameters
    ----------
    path : str
        The file.
    key : str
        What stands before the colon.

    Returns
    -------
    int or None
        The number; None if the file or the line is not there.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith(key + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


def find_process_tree(root: int) -> list[int]:
    """List a process and its descendants.

    Parameters
    ----------
    root : int
        The id of the process.

    Returns
    -------
    list of int
        The ids, that of the process first.
    """
    # Some kernels are built without this file, which spares reading about every process.
    has_children_file = Path(f"/proc/{root}/task/{root}/children").exists()
    everyone = None if has_children_file else read_all_parents()
    tree = [root]
    for process in tree:
        tree += read_children(process) if everyone is None else everyone.get(process, [])
    return tree


def read_children(process: int) -> list[int]:
    """List the children of a process, from those of each of its threads."""
    children: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children += map(int, path.read_text(encoding="utf-8").split())
        except OSError:  # it has ended
            continue
    return children


def read_all_parents() -> dict[int, list[int]]:
    """Return the children of every process of the machine that has any."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_bytes()
        except OSError:  # it has ended
            continue
        # The second field, in brackets, is the command's name and may contain anything.
        parent = int(stat.rpartition(b")")[2].split()[1])
        children.setdefault(parent, []).append(int(name))
    return children


# ------------------------------------------------------------------------- input and output


def find_texts(directory: Path, pattern: str) -> list[Path]:
    """List the files of a text, sorted, but not those of installed packages.

    Parameters
    ----------
    directory : Path
        Where to look, at all depths.
    pattern : str
        What the names look like, such as ``*.py``.

    Returns
    -------
    list of Path
        The files.
    """
    return sorted(
        path
        for path in directory.rglob(pattern)
        if "site-packages" not in path.relative_to(directory).parts and path.is_file()
    )


def split_texts(paths: Sequence[Path], n_pieces: int) -> list[list[Path]]:
    """Deal files into pieces of about the same number of bytes.

    Parameters
    ----------
    paths : sequence of Path
        The files. Each goes into one piece as a whole.
    n_pieces : int
        How many pieces to make; there are fewer if there are fewer files.

    Returns
    -------
    list of list of Path
        The pieces, none of them empty.
    """
    pieces: list[list[Path]] = [[] for _ in range(n_pieces)]
    smallest_first = [(0, i) for i in range(n_pieces)]
    sizes = {path: path.stat().st_size for path in paths}
    for path in sorted(paths, key=lambda path: -sizes[path]):
        size, i = smallest_first[0]
        pieces[i].append(path)
        # An empty file counts as a byte, so that it does not keep others from the piece.
        heapq.heapreplace(smallest_first, (size + max(sizes[path], 1), i))
    return [piece for piece in pieces if piece]


def show_progress(label: str, n_done: int, n_all: int) -> None:
    """Draw a progress bar if standard error is a terminal; the last step removes it.

    Parameters
    ----------
    label : str
        What is going on.
    n_done, n_all : int
        How many steps are done, and of how many.
    """
    if not sys.stderr.isatty():
        return
    width = 30
    bar = "#" * (width * n_done // n_all)
    line = f"{label:>10} [{bar:<{width}}] {n_done}/{n_all}" if n_done < n_all else ""
    print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Write a time for the table."""
    return f"{seconds:.3f} s"


def format_bytes(nbytes: float) -> str:
    """Write a size for the table, in the units that fit."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes:,.0f} B"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: what to take from a measurement and how to write it."""

    label: str
    get: Callable[[Measurement], float | None]
    write: Callable[[float], str]
    has_ratio: bool = False

    def cells(self, measurements: Sequence[Measurement]) -> list[str]:
        """Return the row's text, column by column.

        Parameters
        ----------
        measurements : sequence of Measurement
            The runs: one, or the plain one and the one with oobpickle.

        Returns
        -------
        list of str
            The label, a column for each run and, if there are two, how many times the
            second's number goes into the first's.
        """
        values = [self.get(measurement) for measurement in measurements]
        cells = [self.label, *("n/a" if v is None else self.write(v) for v in values)]
        if len(values) == 2:
            plain, other = values
            cells.append(f"{plain / other:.1f}x" if self.has_ratio and plain and other else "")
        return cells


ROWS = (
    Row("wall time", lambda m: m.wall, format_seconds, has_ratio=True),
    Row(
        "transfer of a model, median",
        lambda m: median(m.transfers) if m.transfers else None,
        format_seconds,
        True,
    ),
    Row("transfer of a model, sum", lambda m: sum(m.transfers) or None, format_seconds, True),
    Row("bytes moved", lambda m: m.nbytes, format_bytes),
    Row("bytes moved out of band", lambda m: m.nbytes_out_of_band, format_bytes),
    Row("fallbacks", lambda m: m.n_fallbacks, "{:,}".format),
    Row("peak memory", lambda m: m.peak_memory, format_bytes, has_ratio=True),
    Row("crc32 of the table", lambda m: m.crc32, lambda crc32: f"{int(crc32):08x}"),
)


def print_table(measurements: dict[str, Measurement]) -> None:
    """Print runs side by side.

    Parameters
    ----------
    measurements : dict of str to Measurement
        The runs, by the name of their mode.
    """
    titles = ["", *measurements, *(["ratio"] if len(measurements) == 2 else [])]
    for cells in [titles, *(row.cells(list(measurements.values())) for row in ROWS)]:
        label, *columns = cells
        line = f"{label:<27}" + "".join(f"{column:>12}" for column in columns)
        print(line.rstrip())


def print_job(job: Job, nbytes: int) -> None:
    """Print what is counted, and the command to count it again.

    Parameters
    ----------
    job : Job
        What is counted.
    nbytes : int
        The size of the text.
    """
    print("$", shlex.join(["python", *sys.argv]))
    n_files = sum(map(len, job.pieces))
    model = format_bytes(4 * N_SYMBOLS ** (job.order + 1))
    print(f"text: {n_files:,} files, {format_bytes(nbytes)}, in {len(job.pieces)} pieces")
    print(f"model: order {job.order}, {model}")
    print(f"workers: {job.n_workers}, started by {job.start_method}", end="\n\n")


def positive_int(text: str) -> int:
    """Read an option's value."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Returns
    -------
    Namespace
        The options, with those that were not given filled in.
    """
    parser = argparse.ArgumentParser(
        description="Count a text with a pool of workers, plainly and with oobpickle."
    )
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    methods = multiprocessing.get_all_start_methods()
    add = parser.add_argument
    add("text", nargs="?", type=Path, default=stdlib, help="a directory (Python's own library)")
    add("--glob", default="*.py", help="the names of its files (%(default)s)")
    add("--order", type=int, choices=range(1, 6), default=3, help="of the model (%(default)s)")
    add("--workers", type=positive_int, default=os.cpu_count() or 1, help="(%(default)s)")
    add("--pieces", type=positive_int, default=8, help="(%(default)s)")
    add("--start-method", choices=methods, help="of the workers (Python's default)")
    add("--merge", action="store_true", help="compare who adds up the models, with oobpickle")
    add("--only", choices=["plain", "oobpickle", "merge"], help="one of the runs (two)")
    options = parser.parse_args()
    both = ["oobpickle", "merge"] if options.merge else ["plain", "oobpickle"]
    options.modes = [options.only] if options.only else both
    options.start_method = options.start_method or multiprocessing.get_context().get_start_method()
    if options.modes != ["plain"] and not importlib.util.find_spec("oobpickle"):
        parser.error("oobpickle is not installed; with --only plain, this does without")
    options.paths = find_texts(options.text, options.glob)
    if not options.paths:
        parser.error(f"there are no files {options.glob} in {options.text}")
    return options


def main() -> int:
    """Do what the command line says.

    Returns
    -------
    int
        0, or 1 if a table is wrong.
    """
    options = parse_arguments()
    pieces = split_texts(options.paths, options.pieces)
    n_workers = min(options.workers, len(pieces))
    job = Job(options.order, pieces, n_workers, options.start_method)
    print_job(job, sum(path.stat().st_size for path in options.paths))
    reference = make_reference(job.order, options.paths)
    measurements = {mode: run(mode, job, reference) for mode in options.modes}
    print_table(measurements)
    problems = [f"{mode}: {m.problem}" for mode, m in measurements.items() if m.problem]
    if problems:
        print("The table is wrong:", *problems, sep="\n", file=sys.stderr)
        return 1
    print(f"\nThe table is right: {reference}.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
