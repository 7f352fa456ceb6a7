"""A delegate has ours do the work as long as it is there, and keeps nothing of ours alive."""

import sys
import types
import weakref

from oobpickle._delegate import delegate


class Something:
    pass


def ours_with(kept):
    def ours(original, *args, **kwargs):
        return "ours", kept, original(*args, **kwargs)

    return ours


def original(*args, **kwargs):
    return args, kwargs


def test_it_calls_ours_with_the_original_and_all_arguments():
    kept = Something()
    ours = ours_with(kept)
    delegated = delegate(ours, original)

    assert delegated(1, two=2) == ("ours", kept, ((1,), {"two": 2}))
    assert delegated.__name__ == "original"


def test_it_keeps_nothing_of_ours_alive_and_then_does_what_it_replaced():
    kept = Something()
    gone = weakref.ref(kept)
    ours = ours_with(kept)
    delegated = delegate(ours, original)
    del kept, ours

    assert gone() is None
    assert delegated(1, two=2) == ((1,), {"two": 2})


def test_its_module_imports_nothing_of_ours():
    names = vars(sys.modules[delegate.__module__])

    assert not [
        name
        for name, value in names.items()
        if "oobpickle" in repr(value) and isinstance(value, types.ModuleType)
    ]
