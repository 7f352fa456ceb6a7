"""Functions by value: what arrives does what was sent, and refers to what it referred to."""

import concurrent.futures
import functools
import gc
import importlib
import pickle
import re
import sys
import types
import typing
import weakref

import numpy as np
import pytest

import oobpickle
from oobpickle._pickling import functions
from oobpickle._pickling.serializer import serialize

LIMIT = 7
TABLE = types.MappingProxyType({"a": importlib})


def crossed(obj):
    return pickle.loads(serialize(obj, 1 << 40, by_value=True).stream)


def test_everything_of_a_function_arrives():
    def function(a: int, b=[LIMIT], *, c: "str" = "c", d=importlib) -> float:  # noqa: B006
        """Doc."""
        return a, b, c, d

    function.attribute = sys
    function.__wrapped__ = wrapped = lambda: 3
    arrived = crossed(function)

    assert arrived is not function
    assert arrived(1) == (1, [7], "c", importlib)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(arrived, name) == getattr(function, name)
    assert arrived.__code__ == function.__code__
    assert arrived.__code__.co_filename == __file__
    assert arrived.attribute is sys
    assert arrived.__wrapped__() == wrapped()


def test_functions_refer_to_themselves_and_to_each_other():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    arrived_even, arrived_odd = crossed([even, odd])

    assert arrived_even(10)
    assert arrived_odd(7)
    assert arrived_even.__closure__[0].cell_contents is arrived_odd


def test_functions_share_what_they_shared():
    n = 0

    def count():
        nonlocal n
        n += 1

    def counted():
        return n

    arrived_count, arrived_counted = crossed([count, counted])
    arrived_count()

    assert arrived_counted() == 1
    assert counted() == 0


def test_an_empty_cell_stays_empty():
    def outer():
        def inner():
            return later

        yield inner
        later = 1

    arrived = crossed(next(outer()))
    with pytest.raises(NameError, match="later"):
        arrived()


def made_in(globals_, source):
    exec(source, globals_)
    return globals_


def test_only_the_globals_that_are_used_are_sent():
    given = made_in(
        {"__name__": "nowhere", "used": 1, "unused": pytest, "in_class": 2, "set_there": 0},
        "def f():\n global set_there\n set_there = used\n class C:\n  a = in_class\n"
        " return C.a, [used for _ in 'a'], lambda: used",
    )
    arrived = crossed(given["f"])

    assert arrived()[:2] == (2, [1])
    expected = {"__name__", "__builtins__", "used", "in_class", "set_there"}
    assert set(arrived.__globals__) == expected
    assert given["set_there"] == 0


def test_functions_of_one_message_share_their_globals():
    given = made_in(
        {"__name__": "nowhere", "n": 1},
        "def f():\n global n\n n += 1\ndef g():\n return n",
    )
    f, g = crossed([given["f"], given["g"]])
    f()

    assert f.__globals__ is g.__globals__
    assert g() == 2
    assert given["n"] == 1


def test_submodules_that_are_used_are_imported():
    futures = lambda: concurrent.futures.ThreadPoolExecutor  # noqa: E731
    stream = serialize(futures, 1 << 40, by_value=True).stream

    assert b"concurrent.futures.thread" in stream or b"concurrent.futures" in stream
    assert pickle.loads(stream)() is concurrent.futures.ThreadPoolExecutor


def test_functions_with_a_cache_arrive_with_an_empty_one():
    @functools.lru_cache(3, typed=True)
    def fibonacci(n):
        """Doc."""
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    fibonacci.attribute = 3
    fibonacci(5)
    arrived = crossed(fibonacci)

    assert arrived.cache_info().currsize == 0
    assert arrived.cache_parameters() == {"maxsize": 3, "typed": True}
    assert (arrived(10), arrived.__doc__, arrived.attribute) == (55, "Doc.", 3)
    assert arrived.__wrapped__.__closure__[0].cell_contents is arrived


@functools.lru_cache
def cached():
    return 3


def test_what_is_found_by_its_name_stays_what_it_is():
    found = [cached, crossed, np.sum, np.add, len, oobpickle.dumps, functools.partial(crossed, 1)]
    arrived = crossed([*found, lambda: 1])

    assert arrived[:6] == found[:6]
    assert arrived[6].func is crossed


def shadow(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) + 1

    return wrapper


@shadow
def shadowed(n):
    return 2 * n


def test_a_function_that_its_decorator_hides_goes_by_value():
    original = shadowed.__wrapped__
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pickle.dumps(original)
    arrived, decorated = crossed([original, shadowed])

    assert arrived is not original
    assert arrived(3) == 6
    assert decorated is shadowed


def test_a_module_that_lies_about_its_name_does_not_matter():
    def function():
        return 5

    function.__module__, function.__qualname__ = "numpy", "nothing"

    assert crossed(function)() == 5
    assert crossed(function).__module__ == "numpy"


def test_methods_arrive_bound():
    class Local:
        def method(self):
            return type(self)

        @classmethod
        def make(cls):
            return cls

        def aliases(self):
            return aliases

    aliases = [Local.make, Local().method]
    local = Local()
    instance, method, make = crossed([local, local.method, Local.make])

    assert method.__self__ is instance
    assert method() is make() is type(instance)
    assert [alias() for alias in instance.aliases()] == [type(instance)] * 2
    assert crossed("abc".upper)() == "ABC"


def test_builtin_types_with_other_names_are_found_from_a_function():
    kinds = [types.FunctionType, types.CodeType, types.MappingProxyType, type(None)]

    assert crossed(lambda: kinds)() == kinds
    with pytest.raises(pickle.PicklingError, match=r"lookup function|found as builtins.function"):
        crossed(types.FunctionType)


def test_type_variables_arrive_once():
    T = typing.TypeVar("T", int, str)
    variable, function = crossed([T, lambda: T])

    assert variable is T
    assert function() is T


def test_a_type_variable_is_refused_where_nothing_else_goes_by_value():
    T = typing.TypeVar("T")
    for obj in (T, [T, list[T]], T | None):
        with pytest.raises(pickle.PicklingError) as plain:
            pickle.dumps(obj, 5)
        with pytest.raises(pickle.PicklingError) as caught:
            crossed(obj)

        assert str(caught.value) == str(plain.value)


@pytest.mark.parametrize("kind", [typing.ParamSpec, typing.TypeVarTuple])
def test_other_type_parameters_are_refused_everywhere(kind):
    parameter = kind("P")
    for obj in (parameter, lambda: parameter):
        with pytest.raises((pickle.PicklingError, AttributeError)) as caught:
            crossed(obj)

        said = "\n".join([str(caught.value), *caught.value.__notes__])
        assert re.search(r"lookup P on|not found as \S+\.P\b", said)  # the other since 3.14


def test_modules_and_read_only_mappings_are_found_from_a_function():

    assert crossed(lambda: (importlib, TABLE))() == (importlib, TABLE)


@pytest.mark.parametrize(
    "inner",
    [importlib, TABLE, crossed.__code__, property(len), staticmethod(len)],
    ids=lambda inner: type(inner).__name__,
)
def test_what_functions_consist_of_is_refused_elsewhere(inner):
    with pytest.raises(TypeError) as plain:
        pickle.dumps(inner, 5)
    for obj in (inner, [inner, lambda: inner], [lambda: inner, inner]):
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)) as caught:
            crossed(obj)

        said = [str(caught.value), *caught.value.__notes__]
        assert any(str(plain.value) in text for text in said)


def test_a_module_that_nobody_can_import_is_refused():
    module = types.ModuleType("nowhere")
    with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
        crossed(lambda: module)


def test_nothing_of_a_function_that_arrived_stays():
    arrived = crossed(lambda: LIMIT)
    alive = weakref.ref(arrived)
    del arrived
    gc.collect()

    assert alive() is None


# --- mirrors of main modules


@pytest.fixture
def main(monkeypatch):
    """Return a main module that nobody can import, and what loads like a spawned child of it."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)

    def load(obj):
        stream = serialize(obj, 1 << 40, by_value=True, is_main_lost=True).stream
        own = functions._own[:]
        functions._own.clear()
        try:
            return pickle.loads(stream)
        finally:
            functions._own[:] = own

    return module, load


def test_functions_of_a_lost_main_module_share_their_globals_from_message_to_message(main):
    module, load = main
    made_in(
        vars(module),
        "state, scale, cells = None, 2, []\n"
        "def init(v):\n global state\n state = v\n"
        "def use():\n return state, helper(3)\n"
        "def helper(n):\n return n * scale\n",
    )
    load(module.init)(5)

    assert load(module.use)() == (5, 6)
    module.scale, module.state = 3, 4
    exec("def helper(n):\n return -n * scale", vars(module))
    assert load(module.use)() == (5, -9)
    assert module.use() == (4, -9)


def test_what_comes_back_does_not_change_the_main_module(main):
    module, load = main
    made_in(vars(module), "n = 1\ndef f():\n global n\n n += 1\n return n\n")
    there = load(module.f)
    there()
    returned = crossed(there)

    assert returned() == 3
    assert module.n == 1
    assert returned.__globals__ is not vars(module)
    assert returned.__globals__ is not there.__globals__


def test_classes_and_functions_of_a_lost_main_module_go_by_value(main):
    module, _ = main
    made_in(
        vars(module),
        "import functools, typing\nT = typing.TypeVar('T')\n"
        "class Model(typing.Generic[T]):\n def me(self):\n  return type(self), Model\n"
        "@functools.lru_cache\ndef cached(n):\n return n\n",
    )
    model, cached, variable = module.Model, module.cached, module.T
    names = ("Model", "cached", "T")
    streams = {}
    for name in names:
        obj = getattr(module, name)
        assert crossed(obj) is obj
        streams[name] = serialize(obj, 1 << 40, by_value=True, is_main_lost=True).stream
    for name in names:
        delattr(module, name)
    assert pickle.loads(streams["Model"]) is model  # as it is tracked here
    assert pickle.loads(streams["T"]) is variable
    assert pickle.loads(streams["cached"])(4) == 4
    assert pickle.loads(streams["cached"]) is not cached


def test_a_class_of_a_lost_main_module_that_cannot_go_says_what_to_do(main):
    module, load = main
    made_in(
        vars(module),
        "class Meta(type):\n def __new__(*args):\n  return type.__new__(*args)\n"
        "class Model(metaclass=Meta): pass",
    )
    with pytest.raises(pickle.PicklingError, match=r"Model .* metaclass Meta .* module of its own"):
        load(module.Model())
