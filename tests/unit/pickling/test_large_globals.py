"""Large globals: functions by value that drag much memory along are warned of once."""

import warnings

import numpy as np
import pytest

from oobpickle._pickling import large_globals
from oobpickle._pickling.large_globals import nbytes_of
from oobpickle._pickling.serializer import serialize

MIB = 1 << 20
DATA = np.zeros(MIB, np.uint8)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(large_globals, "_said", set())


def sent(obj):
    serialize(obj, 0, by_value=True)


def warnings_of(obj):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sent(obj)
        sent(obj)
    return [str(one.message) for one in caught]


def large_ones():
    table = {"a": [DATA.copy()]}

    class Holder:
        def __init__(self, table):
            self.table = table

    class WithAttribute:
        weights = DATA

    held = Holder(table)
    return {
        "global 'DATA'": lambda: DATA,
        "variable 'table'": lambda: table,
        "variable 'held'": lambda: held,
        "a default of an argument": lambda a=DATA: a,
        "its attribute 'weights'": WithAttribute(),
        "variable 'text'": (lambda text: lambda: text)("x" * MIB),
    }


LARGE = large_ones()


@pytest.mark.parametrize("what", LARGE)
def test_it_is_said_once_for_a_function_and_what_it_is(what):
    (text,) = warnings_of(LARGE[what])

    assert what in text
    assert f"has {MIB}" in text
    assert "large_ones.<locals>" in text
    assert "initializer" in text


def test_it_is_said_where_the_function_is():
    function = lambda: DATA  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sent(function)

    place = function.__code__.co_filename, function.__code__.co_firstlineno
    assert [(one.filename, one.lineno, one.category) for one in caught] == [(*place, UserWarning)]


def test_large_arguments_and_functions_that_are_found_are_not_warned_of():
    assert warnings_of([DATA, lambda: 3, large_global]) == []


def large_global():
    return DATA


def test_a_little_less_is_not_warned_of():
    part = DATA[:-1]

    assert warnings_of([lambda: part, DATA]) == []


def test_where_warnings_are_errors_it_is_shown_and_the_message_goes():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        sent(lambda: DATA)

    assert ["goes by value" in str(one.message) for one in shown] == [True]


def test_sizes_are_those_of_the_buffers():
    table = [DATA, DATA, {"a": bytearray(10), "b": memoryview(b"12345")}, 3, None, np]
    table.append(table)

    assert nbytes_of(table) == MIB + 15
    assert nbytes_of(np.array([DATA, None], object)) >= MIB


def test_a_property_that_raises_is_no_obstacle():
    class Odd:
        @property
        def nbytes(self):
            raise RuntimeError("no")

        def __init__(self):
            self.data = DATA

    assert nbytes_of(Odd()) >= MIB
