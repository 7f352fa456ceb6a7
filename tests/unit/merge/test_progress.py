"""What is said while a merge runs."""

import sys
import types

import pytest

import oobpickle
from oobpickle._merge.progress import reporter


def told_by(engine, pieces, **options):
    told = []
    oobpickle.merge(engine, str, pieces, progress=lambda *args: told.append(args), **options)
    return told


def test_a_callable_is_called_with_what_is_done_and_what_there_is():

    assert told_by(None, range(3)) == [(0, 3), (1, 3), (2, 3), (3, 3), (3, 3)]


def test_what_there_is_may_not_be_known():

    assert told_by(None, iter("ab")) == [(0, None), (1, None), (2, None), (2, 2)]


def test_nothing_and_false_say_nothing(capfd):
    for progress in (None, False):
        oobpickle.merge(None, str, range(3), progress=progress)

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [1, "yes", [print]])
def test_anything_else_is_refused(progress):
    with pytest.raises(TypeError, match="progress must be True, None or a callable"):
        reporter(progress)


def test_a_line_where_tqdm_is_not_installed(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    oobpickle.merge(None, str, range(2), progress=True)

    assert capfd.readouterr().err == "".join(
        [*(f"\rmerge: {n} of 2 pieces" for n in (0, 1, 2, 2)), "\n"]
    )


def test_the_line_ends_when_the_merge_fails(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ZeroDivisionError):
        oobpickle.merge(None, (1).__floordiv__, iter([1, 0]), progress=True)

    assert capfd.readouterr().err == "\rmerge: 0 pieces\rmerge: 1 pieces\n"


class Bar:
    """What tqdm has of it."""

    def __init__(self, **options):
        self.options, self.n, self.total, self.calls = options, 0, None, []
        bars.append(self)

    def update(self, n):
        self.n += n
        self.calls.append((self.n, self.total))

    def refresh(self):
        pass

    def close(self):
        self.calls.append("closed")


bars = []


def test_a_bar_of_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    bars.clear()
    oobpickle.merge(None, str, iter("ab"), progress=True)

    (bar,) = bars
    assert bar.calls == [(0, None), (1, None), (2, None), (2, 2), "closed"]


def test_an_error_of_the_callable_ends_the_merge():
    def fails(n_done, n_all):
        if n_done == 2:
            raise KeyError(n_all)

    with pytest.raises(KeyError) as raised:
        oobpickle.merge(None, str, range(9), progress=fails)

    assert raised.value.args == (9,)
    assert not hasattr(raised.value, "__notes__")
