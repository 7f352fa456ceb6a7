"""The public API: sorted, documented, and free of effects when it is imported."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import oobpickle

NAMES = list(oobpickle.__all__)
SENTENCE = re.compile(r"[A-Z0-9`].*[.!?]", re.DOTALL)
#: What must follow a line of dashes in a numpydoc docstring, and in this order.
SECTIONS = [
    "Parameters",
    "Returns",
    "Yields",
    "Attributes",
    "Raises",
    "Warns",
    "See Also",
    "Notes",
    "References",
    "Examples",
]


def test_all_is_sorted_and_has_no_name_twice():

    assert sorted(set(NAMES)) == NAMES


def test_public_objects_say_that_they_are_of_this_package():
    objects = [getattr(oobpickle, name) for name in NAMES]

    assert {obj.__module__.split(".")[0] for obj in objects} == {"oobpickle"}
    assert [obj.__name__ for obj in objects] == NAMES


def members():
    """Yield every public object, its public methods and its properties, by qualified name."""
    for name in NAMES:
        obj = getattr(oobpickle, name)
        yield name, obj
        if inspect.isclass(obj):
            for attribute, value in vars(obj).items():
                if not attribute.startswith("_") and (
                    callable(value) or isinstance(value, (classmethod, staticmethod, property))
                ):
                    yield f"{name}.{attribute}", value


def docstring_of(qualified, obj):
    """Return the docstring of a member; a property may be among its class's attributes instead."""
    doc = inspect.getdoc(obj.fget if isinstance(obj, property) else obj)
    if doc is None and isinstance(obj, property):
        cls, _, attribute = qualified.partition(".")
        of_class = inspect.getdoc(getattr(oobpickle, cls)) or ""
        section = of_class.partition("Attributes\n----------\n")[2]
        found = re.search(rf"^(?:\w+, )*{attribute}\b[\w, ]*: .*\n    (.*)", section, re.MULTILINE)
        doc = found and found[1]
    return doc


MEMBERS = dict(members())


def test_every_public_docstring_begins_with_a_sentence():
    first = {
        name: (docstring_of(name, obj) or "no docstring").partition("\n\n")[0]
        for name, obj in MEMBERS.items()
    }

    assert {name: text for name, text in first.items() if not SENTENCE.fullmatch(text)} == {}


def test_sections_of_public_docstrings_are_those_of_numpydoc_in_their_order():
    found, expected = {}, {}
    for name, obj in MEMBERS.items():
        doc = docstring_of(name, obj) or ""
        found[name] = re.findall(r"^(\S.*)\n(-+)$", doc, re.MULTILINE)
        expected[name] = [(s, "-" * len(s)) for s in SECTIONS if s in dict(found[name])]

    assert expected == found


FUNCTIONS = {
    name: getattr(obj, "__func__", obj)
    for name, obj in MEMBERS.items()
    if inspect.isfunction(getattr(obj, "__func__", obj))
}


def test_parameters_that_a_docstring_lists_are_those_of_the_function():
    listed, expected = {}, {}
    for name, function in FUNCTIONS.items():
        doc = inspect.getdoc(function)
        section = re.search(r"Parameters\n-+\n(.*?)(\n\n[A-Z]|\Z)", doc, re.DOTALL)
        if section is not None:
            listed[name] = [
                one.strip(" *")
                for line in re.findall(r"^\S.*", section[1], re.MULTILINE)
                for one in line.partition(" : ")[0].split(",")
            ]
            parameters = inspect.signature(function).parameters
            expected[name] = [p for p in parameters if p not in ("self", "cls")]

    assert expected == listed
    assert len(listed) > 5


@pytest.mark.parametrize("name", [n for n in NAMES if inspect.isfunction(getattr(oobpickle, n))])
def test_public_functions_say_what_they_raise(name):
    function = getattr(oobpickle, name)
    node = ast.parse(inspect.getsource(function)).body[0]
    raises = any(isinstance(child, ast.Raise) for child in ast.walk(node))

    assert not raises or "\nRaises\n------\n" in inspect.getdoc(function)


# --- importing it


PROGRAM = """
import ctypes, json, sys  # ctypes, since libffi may keep a descriptor of itself open
import multiprocessing.connection, multiprocessing.queues, multiprocessing.reduction
import threading, os

def replaced():
    connection = multiprocessing.connection
    return [
        id(connection._ForkingPickler),
        id(multiprocessing.queues._ForkingPickler),
        id(connection.Connection._send_bytes),
        id(connection.Connection._recv_bytes),
        id(connection.Pipe),
        id(multiprocessing.reduction.dump),
    ]

def state():
    return {
        "replaced": replaced(),
        "contents": [
            {name: id(value) for name, value in vars(m).items() if type(value) is not type(sys)}
            for m in (
                multiprocessing, multiprocessing.connection, multiprocessing.queues,
                multiprocessing.reduction, multiprocessing.context, multiprocessing.process)],
        "connection": {k: id(v) for k, v in vars(multiprocessing.connection.Connection).items()},
        "reducers": len(multiprocessing.reduction.ForkingPickler._extra_reducers),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "environment": dict(os.environ),
    }

before = state()
import oobpickle
after = state()
print(json.dumps([before, after, sorted(m.split(".")[0] for m in sys.modules)]))
"""


@pytest.fixture(scope="module")
def imported():
    """What importing oobpickle does in a fresh interpreter."""
    source = str(Path(oobpickle.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (child.returncode, child.stderr) == (0, "")
    return json.loads(child.stdout)


def test_importing_leaves_multiprocessing_as_it_was(imported):
    before, after, _ = imported

    assert before == after


@pytest.mark.parametrize("module", ["numpy", "cloudpickle", "pandas", "torch", "hypothesis"])
def test_importing_does_not_import(imported, module):

    assert module not in imported[2]
