"""How tasks of Ray learn that the rest is called off: a key in the cluster's store."""

import pickle
import sys
from types import SimpleNamespace

import pytest

from oobpickle._merge import ray
from oobpickle._merge.ray import Stop


class Store:
    """In the place of ``ray.experimental.internal_kv``."""

    def __init__(self):
        self.keys = set()
        self.n_looks = 0

    def _internal_kv_put(self, key, value):
        self.keys.add(key)

    def _internal_kv_exists(self, key):
        self.n_looks += 1
        return key in self.keys

    def _internal_kv_del(self, key):
        self.keys.discard(key)


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    package = SimpleNamespace(internal_kv=found)
    monkeypatch.setitem(sys.modules, "ray.experimental", package)
    return found


def test_a_task_goes_on_until_the_key_is_gone(store, monkeypatch):
    monkeypatch.setattr(ray, "_INTERVAL_S", 0)
    stop = Stop(b"key")
    assert stop.show()
    there = pickle.loads(pickle.dumps(stop))
    assert not there.is_set()
    stop.set()
    stop.set()
    assert store.keys == set()
    with pytest.raises(RuntimeError, match="called off"):
        there.is_set()


def test_it_looks_when_it_begins_and_then_now_and_then(store):
    Stop(b"key").show()
    there, store.n_looks = Stop(b"key"), 0
    assert not any(there.is_set() for _ in range(100))
    assert store.n_looks == 1


def test_a_release_without_the_store(store, monkeypatch):
    stop = Stop(b"key")
    monkeypatch.delattr(Store, "_internal_kv_put")
    assert not stop.show()
    monkeypatch.delattr(Store, "_internal_kv_exists")
    assert not stop.is_set()
    monkeypatch.delattr(Store, "_internal_kv_del")
    stop.set()


def test_an_engine_asks_for_no_store_that_is_not_there(store, monkeypatch):
    module = SimpleNamespace(
        is_initialized=lambda: True,
        cluster_resources=lambda: {"CPU": 3.0},
        remote=lambda call: SimpleNamespace(options=lambda **_: call),
    )
    with ray.Ray(module) as engine:
        assert engine.n_workers == 3
        assert len(store.keys) == 1
    assert store.keys == set()
    monkeypatch.delattr(Store, "_internal_kv_put")
    with ray.Ray(module) as engine:
        assert engine.stop is None
