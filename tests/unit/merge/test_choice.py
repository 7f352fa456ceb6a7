"""Which engine serves what, and what is refused."""

import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
import types
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

import oobpickle
from oobpickle._merge.choice import engine_for
from oobpickle._merge.executors import Executor
from oobpickle._merge.pools import Processes, Threads


class Other(concurrent.futures.Executor):
    """An executor of nobody."""


def test_pools():
    with ThreadPool(3) as threads, multiprocessing.get_context("fork").Pool(2) as pool:
        assert (type(engine_for(threads)), engine_for(threads).n_workers) == (Threads, 3)
        assert (type(engine_for(pool)), engine_for(pool).n_workers) == (Processes, 2)


@pytest.mark.parametrize(
    ("executor", "is_sending", "owning"),
    [
        (concurrent.futures.ThreadPoolExecutor(2), False, ""),
        (concurrent.futures.ProcessPoolExecutor(2), True, ""),
        (Other(), False, "private"),
    ],
    ids=["threads", "processes", "other"],
)
def test_executors(executor, is_sending, owning):
    engine = engine_for(executor)

    assert type(engine) is Executor
    assert (engine.is_sending, engine.owning) == (is_sending, owning)
    assert engine.n_workers == (2 if owning == "" else os.cpu_count())


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (3, "not a builtins.int"),
        (map, "not the class builtins.map: give an instance"),
        (concurrent.futures.ThreadPoolExecutor, "ThreadPoolExecutor: give an instance"),
        (json, "not the module json"),
        (multiprocessing, "not the module multiprocessing"),
        (multiprocessing.get_context("fork"), "not a multiprocessing.context.ForkContext"),
    ],
)
def test_anything_else_is_refused(engine, said):
    with pytest.raises(TypeError, match="engine must be a multiprocessing Pool") as raised:
        oobpickle.merge(engine, str, [1])

    assert said in str(raised.value)


def test_a_pool_of_ray_is_told_what_to_do():
    pool = types.new_class("Pool", exec_body=lambda ns: ns.update(__module__="ray.util.x"))()
    with pytest.raises(TypeError, match="give the module ray itself"):
        engine_for(pool)


def test_an_asynchronous_client_of_dask_is_refused(monkeypatch):
    client = types.SimpleNamespace(asynchronous=True)
    module = types.SimpleNamespace(Client=type(client))
    monkeypatch.setitem(sys.modules, "distributed", module)
    with pytest.raises(TypeError, match="asynchronous"):
        engine_for(client)


PROGRAM = """
import json, sys
import oobpickle
assert oobpickle.merge(None, str, "ab") == "ab"
try:
    oobpickle.merge(3, str, "ab")
except TypeError:
    print(json.dumps(sorted(name.partition(".")[0] for name in sys.modules)))
"""


def test_no_library_is_imported_for_it():
    source = str(Path(oobpickle.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    output = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout

    assert not {"numpy", "dask", "distributed", "ray", "joblib", "tqdm", "concurrent"} & set(
        json.loads(output)
    )
