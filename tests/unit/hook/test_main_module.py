"""The main module: whether spawned children can import it is what multiprocessing will do."""

import importlib.machinery
import multiprocessing.spawn
import sys
import types

import pytest

import oobpickle
from oobpickle._hook.main_module import is_lost


def main_module(monkeypatch, *, spec=None, **attributes):
    module = types.ModuleType("__main__")
    module.__spec__ = spec and importlib.machinery.ModuleSpec(spec, None)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "__main__", module)


@pytest.mark.parametrize(
    ("expected", "attributes"),
    [
        (True, {}),  # a notebook, python -c
        (True, {"__file__": "<stdin>"}),
        (True, {"__file__": "/nowhere/script.py"}),
        (True, {"__file__": None}),
        (False, {"__file__": __file__}),
        (False, {"spec": "package.module"}),
        (True, {"spec": "package.__main__"}),
        (True, {"spec": "__main__"}),  # a folder, a zip file
    ],
    ids=lambda value: str(value),
)
def test_what_spawned_children_cannot_import_is_lost(monkeypatch, expected, attributes):
    main_module(monkeypatch, **attributes)

    assert is_lost() is expected


def test_the_script_of_ipython_is_lost_since_multiprocessing_does_not_run_it(monkeypatch, tmp_path):
    path = tmp_path / "ipython"
    path.touch()
    main_module(monkeypatch, __file__=str(path))

    assert is_lost()


def test_a_relative_file_is_looked_for_where_the_program_began(monkeypatch, tmp_path):
    (tmp_path / "script.py").touch()
    monkeypatch.setattr(multiprocessing.process, "ORIGINAL_DIR", str(tmp_path))
    main_module(monkeypatch, __file__="script.py")

    assert not is_lost()


@pytest.mark.parametrize("path", ["<stdin>", "/nowhere/script.py", __file__])
def test_a_child_does_not_look_for_a_file_that_is_not_there(monkeypatch, path):
    main_module(monkeypatch, __file__=path)
    original = multiprocessing.spawn.get_preparation_data
    plain = original("name")
    with oobpickle.enabled():
        data = multiprocessing.spawn.get_preparation_data("name")
    if path != __file__:
        del plain["init_main_from_path"]

    assert data == plain
    assert multiprocessing.spawn.get_preparation_data is original
