"""Where the thing is that could not be pickled: a note on pickle's own exception."""

import dataclasses
import pickle
import threading

import numpy as np
import pytest

import oobpickle
from oobpickle._pickling.serializer import serialize
from samples import Layer, Model


class Raises:
    def __reduce__(self):
        raise ZeroDivisionError("of the object")


class Returns:
    """Its reducer returns the wrong thing."""

    def __init__(self, what):
        self.what = what

    def __reduce__(self):
        return self.what


class Inside:
    def __reduce__(self):
        return Inside, (Raises(),)


def _has_place(error):
    # CPython 3.14's pickle adds notes of its own.
    return any(note.startswith("oobpickle") for note in getattr(error, "__notes__", ()))


BAD = {
    "raises": Raises(),
    "returns a number": Returns(5),
    "returns too little": Returns((int,)),
    "returns what cannot be called": Returns((5, ())),
    "returns arguments of another type": Returns((int, 5)),
    "returns an unknown name": Returns("no_such_name"),
    "cannot be pickled": threading.Lock(),
}
PLACES = {
    "$": lambda bad: bad,
    "$[1]": lambda bad: [np.zeros(1000), bad],
    "$['a'][2]": lambda bad: {"a": (1, 2, bad)},
    "$.layers['first'].bad": lambda bad: Model(layers={"first": Model(x=1, bad=bad)}),
    "$.__reduce_ex__(5)[1].state": lambda bad: Layer(1, Model(state=bad), 3),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BAD)
def test_the_type_and_the_path_are_said_with_pickles_own_error(name, place):
    obj = PLACES[place](BAD[name])
    kind = type(BAD[name])
    with pytest.raises(Exception) as plain:
        pickle.dumps(obj, 5)
    for by_value in (False, True):
        with pytest.raises(plain.type) as ours:
            serialize(obj, 0, by_value=by_value)

        assert str(plain.value) == str(ours.value)
        note = f"oobpickle: pickling a {kind.__module__}.{kind.__qualname__} at {place}"
        assert note in ours.value.__notes__


def test_what_a_reducer_returns_is_part_of_the_path():
    with pytest.raises(ZeroDivisionError) as caught:
        oobpickle.dumps({"a": Inside()})

    assert caught.value.__notes__[-1].endswith(".Raises at $['a'].__reduce_ex__(5)[0]")


def test_in_very_many_objects_it_is_not_looked_for():
    with pytest.raises(ZeroDivisionError) as caught:
        oobpickle.dumps([*([i] for i in range(200_000)), Raises()])

    assert not _has_place(caught.value)


def test_what_fails_only_once_stays_without_a_place():
    calls = []

    class Once:
        def __reduce__(self):
            calls.append(1)
            if len(calls) == 1:
                raise ZeroDivisionError
            return int, ()

    with pytest.raises(ZeroDivisionError) as caught:
        oobpickle.dumps(Once())

    assert not _has_place(caught.value)


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    text: str


class FailsFrozen:
    def __reduce__(self):
        raise FrozenError("no")


def test_an_error_that_takes_no_notes_is_raised_as_it_is():
    with pytest.raises(Exception, match="no") as plain:  # CPython 3.15 adds notes of its own
        pickle.dumps([FailsFrozen()])
    with pytest.raises(plain.type, match="no"):
        serialize([FailsFrozen()], 0, by_value=True)


def test_the_place_is_found_though_dill_has_been_imported():
    pytest.importorskip("dill")
    obj = [1, {"a": pickle}]
    with pytest.raises(TypeError, match="module") as caught:
        serialize(obj, 0)

    ours = [note for note in caught.value.__notes__ if note.startswith("oobpickle: ")]
    assert ours == ["oobpickle: pickling a builtins.module at $[1]['a']"]  # 3.14 has notes, too
