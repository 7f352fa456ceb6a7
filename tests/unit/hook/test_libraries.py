"""Which modules of loky are imported, and whether they are served."""

import sys
from types import SimpleNamespace

import pytest

from oobpickle._hook import libraries
from oobpickle._hook.loky import hooked_dumps


def test_both_places_of_loky(monkeypatch):
    one, other = SimpleNamespace(), SimpleNamespace()
    monkeypatch.setitem(sys.modules, "loky.some.module", one)
    monkeypatch.setitem(sys.modules, "joblib.externals.loky.some.module", other)
    assert libraries.of_loky("some.module") == [one, other]
    assert libraries.of_loky("no.module") == []


@pytest.mark.parametrize("package", ["loky", "joblib.externals.loky"])
def test_it_is_served_if_its_pickler_is_replaced(package, monkeypatch):
    def dumps(obj):
        return obj

    queues = SimpleNamespace(dumps=dumps)
    monkeypatch.setitem(sys.modules, f"{package}.backend.queues", queues)
    assert not libraries.serves(f"{package}.process_executor")
    queues.dumps = hooked_dumps(dumps)
    assert libraries.serves(f"{package}.process_executor")
    assert not libraries.serves("other.loky.process_executor")


@pytest.mark.parametrize(("name", "expected"), [("joblib.pool", True), ("program", False)])
def test_who_calls_is_seen(name, expected):
    names = {"__name__": name, "calls": libraries.calls, "sys": sys}
    exec("def inner(): return calls(sys._getframe())\ndef call(): return inner()", names)

    assert names["call"]() is expected
