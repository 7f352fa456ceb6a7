"""Whose question for a descriptor says that he reads there himself."""

import selectors
import sys
import types

import pytest

from oobpickle._hook.fileno import _is_asked_to_read


def asked_by(name):
    """Ask in a function of a module with that name."""
    module = types.ModuleType(name)
    module._is_asked_to_read, module.sys = _is_asked_to_read, sys
    exec("def ask(_=None): return _is_asked_to_read(sys._getframe(0))", vars(module))
    return module.ask


@pytest.mark.parametrize("name", ["__main__", "asyncio.unix_events", "multiprocessing_utils", None])
def test_users_and_their_libraries_do(name):
    ask = asked_by(name or "")
    ask.__globals__["__name__"] = name

    assert ask()


@pytest.mark.parametrize("name", ["multiprocessing.connection", "concurrent.futures.process"])
def test_the_standard_library_does_not(name):
    assert not asked_by(name)()


class Asking:
    answer = None

    def fileno(self):
        self.answer = _is_asked_to_read(sys._getframe(1))
        return 0


def test_a_selector_asks_for_those_who_use_it():
    asking = Asking()
    selectors._fileobj_to_fd(asking)
    assert asking.answer
    module = types.ModuleType("multiprocessing.connection")
    module.to_fd, module.asking = selectors._fileobj_to_fd, asking
    exec("def wait(): to_fd(asking)", vars(module))
    module.wait()
    assert not asking.answer
