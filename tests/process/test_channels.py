"""The table: every channel of multiprocessing, in both directions, under the start methods.

What stands here is what the documents promise: ``docs/reference/channels.md`` has the same rows,
and a reason for each cell that cannot be.
"""

import functools
import json
import re

import pytest

from conftest import by_start_method
from process.harness import HERE, cases_of, run_program

TO_CHILD, TO_PARENT = "to the child", "to the parent"

#: By family: the function of programs/channels.py that tries these channels.
CHANNELS = {
    "pool": [
        "Pool.map",
        "Pool.map(chunksize=2)",
        "Pool.map_async",
        "Pool.imap",
        "Pool.imap_unordered",
        "Pool.starmap",
        "Pool.starmap_async",
        "Pool.apply",
        "Pool.apply_async",
        "Pool.apply_async(callback=)",
    ],
    "lives_of_a_pool": [
        "Pool(initargs=)",
        "Pool(maxtasksperchild=1)",
        "errors that a task raises",
        "ThreadPool",
    ],
    "executors": [
        "ProcessPoolExecutor.submit",
        "ProcessPoolExecutor.map",
        "ProcessPoolExecutor.map(chunksize=2)",
        "ProcessPoolExecutor(initargs=)",
        "ProcessPoolExecutor(max_tasks_per_child=1)",
    ],
    "executors_inside_workers": ["ProcessPoolExecutor in a worker"],
    "queues": [
        "Queue",
        "Queue(maxsize=1)",
        "Queue.join_thread",
        "Queue.cancel_join_thread",
        "SimpleQueue",
        "JoinableQueue",
    ],
    "pipes_and_processes": [
        "Pipe()",
        "Pipe(duplex=False)",
        "Process(args=)",
        "Process(kwargs=)",
    ],
    "managers": [
        "Manager().dict",
        "Manager().list",
        "Manager().Namespace",
        "Manager().Queue",
        "Manager().dict in a worker",
        "BaseManager.register",
    ],
    "listeners": ["Listener and Client, AF_UNIX"],
    "programs": ["a program that inherits a connection"],
    "relays": ["through three processes"],
}

#: Arguments of a process that starts: they go one way.
STARTING = {
    "Pool(initargs=)",
    "ProcessPoolExecutor(initargs=)",
    "Process(args=)",
    "Process(kwargs=)",
}
#: Nothing to send: what is there to be pickled goes to nobody, or one way only.
ONE_WAY = {
    *((channel, TO_PARENT) for channel in STARTING),
    ("errors that a task raises", TO_CHILD),
    ("ThreadPool", TO_PARENT),
    ("through three processes", TO_CHILD),
}
#: Not with fork: a forked child has its arguments already, and CPython allows no such executor.
NOT_FORKED = STARTING | {"ProcessPoolExecutor(max_tasks_per_child=1)"}

CELLS = [
    (family, channel, direction, method)
    for family, method in by_start_method(list(CHANNELS))
    for channel in CHANNELS[family]
    for direction in (TO_CHILD, TO_PARENT)
    if (channel, direction) not in ONE_WAY
]


@functools.cache
def _cells(family, method):
    """Run a family once for all its cells."""
    lines = run_program("channels", family, method).splitlines()
    cells = [json.loads(line) for line in lines]
    return {(cell["channel"], cell["direction"]): cell for cell in cells}


@pytest.mark.parametrize(("family", "channel", "direction", "start_method"), CELLS)
def test_crosses(family, channel, direction, start_method):
    cell = _cells(family, start_method).get((channel, direction))

    if start_method == "fork" and channel in NOT_FORKED:
        assert cell is None or cell["n_messages"] == cell["n_fallbacks"] == 0
        return
    assert cell["n_fallbacks"] == 0
    assert cell["nbytes"] >= cell["least_nbytes"]
    if channel == "ThreadPool":
        assert cell["n_messages"] == 0


def test_every_family_is_in_the_table():
    assert sorted(CHANNELS) == sorted(cases_of("channels"))


def test_the_document_has_the_same_rows():
    text = (HERE.parents[1] / "docs/reference/channels.md").read_text()
    table = text.split("| channel |")[1].split("\n\n")[0]
    documented = {}
    for names, cells in re.findall(r"^\| (.+?) \|(.+)\|$", table, re.MULTILINE):
        found = re.findall(r"`(.+?)`", names) or [names]
        documented.update(dict.fromkeys(found, cells))

    promised = {channel for channels in CHANNELS.values() for channel in channels}
    assert promised <= documented.keys()
    assert {c for c in promised if "to the child only" in documented[c]} == {
        c for c, direction in ONE_WAY if direction == TO_PARENT and c != "ThreadPool"
    }
    assert {c for c in promised if "not under fork" in documented[c]} == NOT_FORKED
