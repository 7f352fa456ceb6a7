"""The rows of the ledger: where each block lies, and of which size class it is.

**What.** `Rows` makes rows, counts them, and says where a block lies.

**How it works.** The place and class of a row never change. So each process reads a row once,
compares it with its check and with the size of the data file, and from then on believes only its
own copy: nothing that is written over the ledger later can move a block. The number of rows is
written twice, one of them with a check; and it only grows.

**Lifetime.** A row is made when it is first needed, and never destroyed.

**When it cannot.** A row that is damaged has no place (``None``): nobody leases, reads or frees
it. If the number of rows is not known for certain, or the last row is damaged, no row is made any
more (a `Shortage` with the reason ``damaged``); the others are used as ever."""

from __future__ import annotations

from typing import NamedTuple

from oobpickle import _faults
from oobpickle._errors import ArenaError
from oobpickle._memory.huge_pages import HUGE_NBYTES
from oobpickle._memory.layout import (
    BLOCKS_AT,
    C_CHECK,
    C_CLASS,
    C_GENERATION,
    C_OFFSET,
    C_RESIDENT,
    C_WORD,
    FREE,
    H_DATA_NBYTES,
    H_N_BLOCKS,
    H_ROWS,
    LOW_MASK,
    MAX_BLOCKS,
    N_CLASSES,
    class_nbytes,
    class_stride,
    commit_word,
    resident_word,
    row_check,
    rows_word,
)
from oobpickle._system import PAGE_NBYTES


class Shortage(NamedTuple):
    """Why blocks could not be leased: a reason of `_fallback.REASONS`, and the numbers."""

    reason: str
    need_nbytes: int
    room_nbytes: int


class Row(NamedTuple):
    """Where a block lies, its size class, and how many bytes it holds."""

    offset: int
    size_class: int
    nbytes: int

    @property
    def end(self) -> int:
        """Where the hole behind the block ends."""
        return self.offset + class_stride(self.size_class)


class Rows:
    """What this process knows of the rows.

    Attributes
    ----------
    known : dict of int to Row
        The rows that were read, and were in order.
    """

    def __init__(self, words: memoryview) -> None:
        self.known: dict[int, Row] = {}
        self._words = words
        self._data_nbytes = words[H_DATA_NBYTES]
        self._n_rows = 0
        self._word = 0
        self._is_certain = False
        self._count()

    # --- how many

    @property
    def n_rows(self) -> int:
        """How many rows there are, as far as is known."""
        if self._words[H_ROWS] != self._word:
            self._count()
        return self._n_rows

    def _count(self) -> None:
        # Read first: another thread may count meanwhile, and find more.
        least = self._n_rows
        word, plain = self._words[H_ROWS], self._words[H_N_BLOCKS]
        n_rows = word & LOW_MASK
        is_certain = word == rows_word(n_rows) and least <= n_rows <= MAX_BLOCKS
        if not is_certain:
            # The other copy, if it is the number of a last row.
            n_rows = plain
            is_certain = least <= n_rows < MAX_BLOCKS and self._ends_at(n_rows)
            word = rows_word(n_rows)
        if not is_certain:
            self._is_certain, self._word = False, -1  # so each use counts again
        elif n_rows >= self._n_rows:
            self._is_certain, self._word, self._n_rows = True, word, n_rows

    def _ends_at(self, n_rows: int) -> bool:
        is_last = n_rows == 0 or self._read(n_rows - 1) is not None
        return is_last and self._cell(C_CHECK, n_rows) == 0

    def recount(self) -> None:
        """Step: write the number again where it was overwritten."""
        self._count()
        if self._is_certain:
            self._words[H_ROWS], self._words[H_N_BLOCKS] = self._word, self._n_rows

    # --- where

    def get(self, index: int) -> Row | None:
        """Return a row; ``None`` if there is none, or it is damaged."""
        row = self.known.get(index)
        if row is None and index < self.n_rows:
            row = self._read(index)
            if row is not None:
                self.known[index] = row
        return row

    def offset(self, index: int) -> int:
        """Return where a block of this process lies.

        Raises
        ------
        ArenaError
            If its row is damaged.
        """
        row = self.known.get(index) or self.get(index)
        if row is None:
            raise ArenaError(f"the ledger's entry of block {index} is damaged")
        return row.offset

    def _read(self, index: int) -> Row | None:
        offset, size_class = self._cell(C_OFFSET, index), self._cell(C_CLASS, index)
        if size_class >= N_CLASSES or self._cell(C_CHECK, index) != row_check(
            index, offset, size_class
        ):
            return None
        row = Row(offset, size_class, class_nbytes(size_class))
        return row if row.end <= self._data_nbytes and offset % PAGE_NBYTES == 0 else None

    def _cell(self, column: int, index: int) -> int:
        return int(self._words[BLOCKS_AT + column * MAX_BLOCKS + index])

    # --- more

    def make(self, size_class: int, nbytes: int) -> int | Shortage:
        """Step: make a row, free and without pages; return its index."""
        index, offset = self.n_rows, 0
        if index >= MAX_BLOCKS:
            return Shortage("table", nbytes, 0)
        last = self.get(index - 1) if index else None
        if not self._is_certain or (index and last is None):
            return Shortage("damaged", nbytes, 0)
        if last is not None:
            offset = last.end
        block_nbytes = class_nbytes(size_class)
        if block_nbytes >= HUGE_NBYTES:
            offset = -(-offset // HUGE_NBYTES) * HUGE_NBYTES
        row = Row(offset, size_class, block_nbytes)
        if row.end > self._data_nbytes:
            return Shortage("table", nbytes, 0)
        for column, value in (
            (C_OFFSET, offset),
            (C_CLASS, size_class),
            (C_GENERATION, 0),
            (C_RESIDENT, resident_word(index, 0)),
            (C_WORD, commit_word(index, FREE, 0, 0)),
            (C_CHECK, row_check(index, offset, size_class)),
        ):
            self._words[BLOCKS_AT + column * MAX_BLOCKS + index] = value
        _faults.reach("ledger.row.written")
        self._words[H_N_BLOCKS] = index + 1
        _faults.reach("ledger.row.numbered")
        self._words[H_ROWS] = rows_word(index + 1)
        _faults.reach("ledger.row.counted")
        # Not before: after an interrupt up to here somebody else may make another row of it.
        self.known[index] = row
        return index
