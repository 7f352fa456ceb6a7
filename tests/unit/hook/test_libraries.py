"""Which modules of loky are imported, and whether they are served."""

import pickle
import sys
from types import SimpleNamespace

import pytest
from cloudpickle import CloudPickler

from oobpickle._hook import libraries
from oobpickle._hook.loky import hooked_dumps


def test_both_places_of_loky(monkeypatch):
    one, other = SimpleNamespace(), SimpleNamespace()
    monkeypatch.setitem(sys.modules, "loky.some.module", one)
    monkeypatch.setitem(sys.modules, "joblib.externals.loky.some.module", other)
    assert libraries.of_loky("some.module") == [one, other]
    assert libraries.of_loky("no.module") == []


class Own(CloudPickler):
    """A user's pickler, which has reducers of its own."""

    dispatch_table = CloudPickler.dispatch_table.new_child()


@pytest.mark.parametrize("package", ["loky", "joblib.externals.loky"])
def test_it_is_served_if_its_pickler_is_replaced(package, monkeypatch):
    def dumps(obj):
        return obj

    queues, reduction = SimpleNamespace(dumps=dumps), SimpleNamespace(_LokyPickler=pickle.Pickler)
    monkeypatch.setitem(sys.modules, f"{package}.backend.queues", queues)
    monkeypatch.setitem(sys.modules, f"{package}.backend.reduction", reduction)
    name, library = f"{package}.process_executor", package.partition(".")[0]
    assert not libraries.serves(name)
    assert libraries.unserved(name) == library
    queues.dumps = hooked_dumps(dumps)
    assert libraries.serves(name)
    assert libraries.unserved(name) == ""
    reduction._LokyPickler = type("Custom", (Own,), {"_loky_pickler_cls": Own})
    assert not libraries.serves(name)
    assert libraries.unserved(name) == library
    for other in ("other.loky.process_executor", "multiprocessing.queues", ""):
        assert not libraries.serves(other)
        assert libraries.unserved(other) == ""


@pytest.mark.parametrize(("name", "expected"), [("joblib.pool", True), ("program", False)])
def test_who_calls_is_seen(name, expected):
    names = {"__name__": name, "calls": libraries.calls, "sys": sys}
    exec("def inner(): return calls(sys._getframe())\ndef call(): return inner()", names)

    assert names["call"]() is expected
