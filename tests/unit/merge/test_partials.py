"""Which two partial results may be merged."""

import pytest

from oobpickle._merge.partials import Ordered, Unordered
from oobpickle._merge.work import Span


def spans_of(pair):
    return pair and tuple((span.start, span.stop) for span, _ in pair)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_neighbours_meet_left_one_first(order):
    partials = Ordered()
    for n in order:
        partials.add(Span(2 * n, 2 * n + 2), n)

    assert spans_of(partials.take_pair()) == ((0, 2), (2, 4))
    assert len(partials) == 1
    assert partials.take_pair() is None
    assert partials.pop() == (Span(4, 6), 2)


def test_what_has_something_between_it_waits():
    partials = Ordered()
    partials.add(Span(0, 2), "a")
    partials.add(Span(3, 4), "c")

    assert partials.take_pair() is None
    partials.add(Span(2, 3), "b")
    assert spans_of(partials.take_pair()) == ((0, 2), (2, 3))
    assert len(partials) == 1


def test_values_are_not_compared():
    partials = Ordered()
    for start in (4, 0, 2):
        partials.add(Span(start, start + 1), object())

    assert partials.take_pair() is None


def test_any_two_meet_if_order_does_not_matter():
    partials = Unordered()
    partials.add(Span(7, 9), "b")
    assert partials.take_pair() is None
    partials.add(Span(0, 2), "a")

    assert sorted(value for _, value in partials.take_pair()) == ["a", "b"]
    assert len(partials) == 0


def test_spans_together_and_their_level():
    joined = Span(0, 2, 1).before(Span(2, 5, 3))

    assert joined == Span(0, 5, 4)
    assert [str(joined), str(Span(3, 4))] == ["pieces 0 to 4", "piece 3"]
