"""How a process knows the rows of the ledger while others make more."""

import pytest

from ledger_tools import make_words
from oobpickle import _faults
from oobpickle._memory import rows as rows_module
from oobpickle._memory.rows import Rows

SMALL, HUGE = 3, 40


def test_a_thread_that_is_overtaken_while_it_counts_damages_nothing(monkeypatch):
    """Else this process would make no row any more, and send all that is new in-band."""
    words = make_words()
    rows, elsewhere = Rows(words), Rows(words)
    elsewhere.make(SMALL, 1)
    rows_word, counted, begun = rows_module.rows_word, [], []

    def overtaken(n_rows):
        if not begun:
            begun.append(n_rows)
            elsewhere.make(SMALL, 1)
            counted.append(rows.n_rows)  # by another thread of this process
        return rows_word(n_rows)

    monkeypatch.setattr(rows_module, "rows_word", overtaken)
    counted.append(rows.n_rows)

    assert (begun, counted) == ([1], [2, 2])
    assert rows.make(SMALL, 1) == 2


@pytest.mark.parametrize("point", ["written", "numbered", "counted"])
def test_a_row_whose_making_was_interrupted_is_what_the_next_one_makes_of_it(monkeypatch, point):
    """Else two processes would have different memory for one block."""
    words = make_words()
    rows, elsewhere = Rows(words), Rows(words)

    def interrupt(name):
        if name == f"ledger.row.{point}":
            raise KeyboardInterrupt

    rows.make(SMALL, 1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_faults, "reach", interrupt)
        rows.make(HUGE, 1)
    elsewhere.recount()
    elsewhere.make(SMALL, 1)

    assert [rows.get(i) for i in range(3)] == [elsewhere.get(i) for i in range(3)]
    assert rows.get(1) is not None
