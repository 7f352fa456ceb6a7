"""What a sender pickles in the place of an object: the call that makes it.

**What.** `Rebuild` is a function and its arguments. `inherits` tells whether a class leaves
something to a base. A receiver has nothing of this: ``pickle.loads`` makes the calls, in
`oobpickle._envelope`.

**How it works.** A reducer can replace one object by one call. What it wants to replace *inside*
the arguments of that call it wraps in a `Rebuild`, which the pickler then meets as an object.

**Lifetime.** That of one pickling.

**When it cannot.** It cannot fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from oobpickle._native import core


class _Rebuild:
    """Pickled as ``function(*arguments)``."""

    __slots__ = ("reduced",)

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


Rebuild: Any = _Rebuild if core is None else core.Rebuild


def inherits(kind: type, base: type, names: Iterable[str]) -> bool:
    """Tell whether a class has attributes of these names as its base has them."""
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in names)
