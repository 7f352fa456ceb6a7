"""What is done on the workers: chunks, joins, what they note on errors, and whose memory it is."""

import operator
import pickle

import numpy as np
import pytest

from oobpickle._merge import work
from oobpickle._merge.stopping import Stop
from oobpickle._merge.work import Job, Part, Span, copied, fold, fold_flat, join

KEPT = [[0], [1], [2]]


def listed(*items):
    return list(items)


def args(*items):
    return [(item,) for item in items]


def test_a_chunk_is_folded_from_the_left_and_emptied():
    pieces = args("a", "b", "c")

    assert fold(Job(str.upper, operator.add), 0, pieces) == "ABC"
    assert pieces == []


@pytest.mark.parametrize(("n", "n_folded"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (9, 5)])
def test_a_call_that_lasts_ends_when_half_is_done(monkeypatch, n, n_folded):
    monkeypatch.setattr(work, "_TIMES_OP", 0)
    pieces = args(*range(n))
    total = fold(Job(listed, operator.iadd, least_s=0), 0, pieces)
    if n_folded == n:
        assert total == [*range(n)]
    else:
        assert total == Part([*range(n_folded)], n_folded)


def test_a_call_does_not_end_early_that_has_not_lasted_long_enough(monkeypatch):
    now = 0.0

    def func(n):
        nonlocal now
        now += 1
        return [n]

    def op(left, right):
        nonlocal now
        now += op_s
        return left + right

    monkeypatch.setattr(work.time, "monotonic", lambda: now)
    found = {}
    for least_s in (None, 6.5, 90):
        for op_s in (0.001, 0.07):
            total = fold(Job(func, op, least_s=least_s), 0, args(*range(10)))
            found[least_s, op_s] = len(total.total) if isinstance(total, Part) else len(total)

    # 100 operators of 0.07 are 7; when seven pieces are done 7.42 have passed.
    assert found == {
        **{(least_s, op_s): 10 for least_s in (None, 90) for op_s in (0.001, 0.07)},
        (6.5, 0.001): 7,
        (6.5, 0.07): 7,
    }


def test_initial_comes_first():

    assert fold(Job(listed, operator.iadd), 0, args(1, 2), ([0],)) == [0, 1, 2]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_flat_arguments_are_those_of_each_call(width):
    flat = range(6)
    expected = [*zip(*[iter(flat)] * width, strict=True)]

    assert fold_flat(Job(lambda *x: [x], operator.add), 0, width, (), *flat) == expected


def test_a_result_that_func_keeps_is_not_changed():
    before = [list(one) for one in KEPT]

    assert fold(Job(KEPT.__getitem__, operator.iadd), 0, args(0, 1, 2)) == [0, 1, 2]
    assert fold(Job(KEPT.__getitem__, operator.iadd), 0, args(0)) is not KEPT[0]
    assert before == KEPT


def test_a_right_operand_that_op_returns_is_not_changed():
    def last(left, right):
        if not left:
            return right
        left += right
        return left

    before = [list(one) for one in KEPT]
    total = fold(Job(lambda n: KEPT[n] if n else [], last), 0, args(0, 1, 2))

    assert total == [1, 2]
    assert before == KEPT


def test_a_result_of_ones_own_is_not_copied():
    made = []

    def make(n):
        result = np.full(3, n)
        made.append(id(result))
        return result

    total = fold(Job(make, operator.iadd), 0, args(1, 2))

    assert total.tolist() == [3, 3, 3]
    assert id(total) == made[0]
    assert fold(Job(lambda x: x, operator.iadd), 0, args([1], [2])) == [1, 2]


def test_what_cannot_be_copied_is_taken_as_it_is():
    class Single:
        def __deepcopy__(self, memo):
            raise TypeError("no")

    single = Single()

    assert copied(single) is single


@pytest.mark.parametrize("owning", ["", "writable", "private"])
def test_the_left_operand_is_made_ones_own(owning):
    left, right = np.zeros(3), np.ones(3)
    if owning:
        left.flags.writeable = False
    total = join(Job(None, operator.iadd, owning), left, right, (Span(0, 1), Span(1, 2)))

    assert total.tolist() == [1, 1, 1]
    assert (total is left) == (owning == "")
    assert left.tolist() == ([1, 1, 1] if owning == "" else [0, 0, 0])


def test_errors_are_noted_with_piece_and_level():
    def fails(n):
        return 1 // (n - 2)

    with pytest.raises(ZeroDivisionError) as raised:
        fold(Job(fails, operator.add), 10, args(0, 1, 2))
    assert raised.value.__notes__ == ["oobpickle.merge: raised in func, piece 12"]
    with pytest.raises(TypeError) as raised:
        fold(Job(str, operator.sub), 10, args(0, 1))
    assert raised.value.__notes__ == [
        "oobpickle.merge: raised in op, piece 11 into its chunk (level 0)"
    ]
    with pytest.raises(TypeError) as raised:
        join(Job(None, operator.sub), "a", "b", (Span(0, 4), Span(4, 5, 1)))
    assert raised.value.__notes__ == [
        "oobpickle.merge: raised in op, pieces 0 to 3 with piece 4 (level 2)"
    ]


def test_errors_of_the_boxes_are_not_those_of_func():
    from oobpickle._merge.work import Clock, fold_boxes

    def boxes():
        yield [("a",)]
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as raised:
        fold_boxes(Job(str, operator.add), 0, boxes(), (), Clock())

    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (list.extend, "op list.extend returned None for a list and a list"),
        (list.__lt__, None),
        (lambda a, b: NotImplemented, "returned NotImplemented"),
    ],
)
def test_an_op_has_to_return_something(op, said):
    job = Job(listed, op)
    if said is None:
        assert fold(job, 0, args(1, 2)) is True
        return
    with pytest.raises(TypeError, match=said):
        fold(job, 0, args(1, 2))


def test_none_is_a_result_where_both_are_none():

    assert fold(Job(lambda _: None, lambda a, b: a), 0, args(1, 2)) is None


def test_nothing_is_done_when_it_is_called_off():
    stop, called = Stop(), []

    def func(n):
        called.append(n)
        if n == 1:
            stop.set()
        return n

    job = Job(func, operator.add, "", stop)
    assert fold(job, 0, args(0, 1, 2, 3)) is None
    assert called == [0, 1]
    assert join(job, 1, 2, (Span(0, 1), Span(1, 2))) is None


def test_a_job_survives_pickling():
    job = pickle.loads(pickle.dumps(Job(listed, operator.iadd, "private", None, 2.5)))
    found = job.func, job.op, job.owning, job.stop, job.least_s

    assert found == (listed, operator.iadd, "private", None, 2.5)
