"""merge against functools.reduce: any associative operation, any number of pieces and workers."""

import collections
import contextlib
import functools
import multiprocessing
import operator
from multiprocessing.pool import ThreadPool

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oobpickle
from exploring import examples
from oobpickle._merge import merging, work

few, some = examples(15), examples(60)


# --- operations, each with its pieces; none of them commutes but the first


def _added(left, right):
    left.update(right)  # of a Counter: adds
    return left


def _product(left, right):
    (a, b, c, d), (e, f, g, h) = left, right
    return ((a * e + b * g) % 7, (a * f + b * h) % 7, (c * e + d * g) % 7, (c * f + d * h) % 7)


def _composed(left, right):
    return tuple(right[i] for i in left)


def _first(left, _):
    return left


def _last(_, right):
    return right


_small = st.integers(0, 4)
OPERATIONS = {
    "counters": (collections.Counter, _added, st.lists(_small, max_size=4)),
    "lists": (list, operator.iadd, st.lists(_small, max_size=3)),
    "new lists": (list, operator.add, st.lists(_small, max_size=3)),
    "dicts": (dict, operator.ior, st.dictionaries(_small, _small, max_size=3)),
    "new dicts": (dict, operator.or_, st.dictionaries(_small, _small, max_size=3)),
    "matrices": (tuple, _product, st.tuples(*[st.integers(0, 6)] * 4)),
    "permutations": (tuple, _composed, st.permutations(range(4))),
    "first": (str, _first, st.integers()),
    "last": (str, _last, st.integers()),
    "sets": (frozenset, operator.or_, st.lists(_small, max_size=3)),
    "largest": (abs, max, st.integers()),
}
COMMUTING = ("counters", "sets", "largest")


@st.composite
def merges(draw, max_pieces=200):
    name = draw(st.sampled_from(sorted(OPERATIONS)))
    func, op, piece = OPERATIONS[name]
    pieces = draw(st.lists(piece, max_size=draw(st.sampled_from([3, 20, max_pieces]))))
    options = {
        "ordered": name not in COMMUTING or draw(st.booleans()),
        "chunksize": draw(st.none() | st.integers(1, 30)),
        "buffersize": draw(st.none() | st.integers(1, 60)),
    }
    initial = [func(draw(piece))] if draw(st.booleans()) or not pieces else []
    return func, op, pieces, options, initial, draw(st.booleans())


def check(engine, func, op, pieces, options, initial, is_sized):
    before = [*map(func, initial)] if func is not str else list(initial)
    expected = functools.reduce(op, map(func, pieces), *[func(one) for one in before])
    if initial:
        options = {**options, "initial": initial[0]}
    given_pieces = pieces if is_sized else iter(pieces)

    assert expected == oobpickle.merge(engine, func, given_pieces, op=op, **options)
    assert before == initial


@pytest.fixture(scope="module")
def threads():
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ThreadPool(n)) for n in range(1, 9)]


@pytest.fixture(scope="module")
def processes():
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("fork")
        yield [stack.enter_context(context.Pool(n)) for n in (1, 2, 5)]


@some
@given(merge=merges(), n_workers=st.integers(1, 8))
def test_on_threads(threads, merge, n_workers):
    check(threads[n_workers - 1], *merge)


@some
@given(merge=merges(), n_workers=st.integers(1, 8))
def test_where_every_call_ends_early(threads, merge, n_workers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_LEAST_S", 0)
        patch.setattr(work, "_TIMES_OP", 0)
        check(threads[n_workers - 1], *merge)


@some
@given(merge=merges())
def test_in_this_process(merge):
    check(None, *merge)


@few
@given(merge=merges(), which=st.integers(0, 2))
def test_on_processes(processes, merge, which):
    check(processes[which], *merge)
