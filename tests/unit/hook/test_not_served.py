"""Libraries that are left alone: what is seen of their messages."""

import itertools
import sys
from types import SimpleNamespace

import pytest

import oobpickle
from oobpickle._hook import installed, not_served


class Connection:
    """As that of a copy of multiprocessing."""

    def _send_bytes(self, buf):
        return len(buf)

    def _recv(self, size, read=None):
        return size, read


@pytest.fixture
def library(monkeypatch):
    for name in ("_send_bytes", "_recv"):
        monkeypatch.setattr(getattr(Connection, name), "__module__", "billiard.connection")
    process = SimpleNamespace(_process_counter=itertools.count(1))
    monkeypatch.setitem(sys.modules, "billiard.process", process)
    connection = SimpleNamespace(Connection=Connection)
    monkeypatch.setitem(sys.modules, "billiard.connection", connection)
    return process


@pytest.mark.parametrize(
    ("nbytes", "expected"), [(100_000, []), (131_071, []), (131_072, ["billiard"])]
)
@pytest.mark.parametrize("call", ["_send_bytes", "_recv"])
def test_large_messages_are_noticed(library, nbytes, expected, call):
    with oobpickle.enabled() as arena:
        if call == "_send_bytes":
            assert Connection()._send_bytes(bytes(nbytes)) == nbytes
        else:
            assert Connection()._recv(nbytes, 3) == (nbytes, 3)
        found = not_served.names(installed.current)
        assert [name for name in found if name == "billiard"] == expected
        installed.current.not_served.clear()
        assert arena.statistics().n_fallbacks == 0
    assert Connection._send_bytes.__module__ == "billiard.connection"


def test_one_that_was_imported_inside_is_named_if_it_has_started_a_process(library):
    connection = sys.modules.pop("billiard.connection")
    with oobpickle.enabled():
        assert "billiard" not in not_served.names(installed.current)
        sys.modules["billiard.connection"] = connection
        assert "billiard" not in not_served.names(installed.current)
        next(library._process_counter)
        assert "billiard" in not_served.names(installed.current)
        del sys.modules["billiard.connection"]


def test_what_is_said_names_the_library_and_the_page():
    text = not_served.describe(["billiard", "multiprocess"])
    assert "billiard pickles by itself and is not served" in text
    assert "multiprocess was imported inside it" in text
    assert "docs/reference/libraries.md" in text
    assert "joblib pickles in another way" in not_served.describe(["joblib"])
