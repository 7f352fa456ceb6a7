"""A delegate: a function for somebody else's class, which keeps nothing of ours alive.

**What.** `delegate` makes a function that has another one of ours do its work, as long as that is
there.

**How it works.** A function refers to the names of its module, and so to all that this module
imports. Put into a class that outlives ``multiprocessing`` (gevent keeps its ``subprocess.Popen``
to the very end of the interpreter), it would keep ``multiprocessing`` alive until modules are taken
apart one by one; the connections of a process object are then closed after what closes them has
gone. So what is put there stands in this module, which imports nothing of the kind, and refers to
ours weakly.

**Lifetime.** That of the class that it is put into.

**When it cannot.** Once ours has gone, it does what it replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def delegate(to: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``to(original, *args)``, or `original` once `to` has gone.

    Parameters
    ----------
    to : function
        Of a module of ours; its module alone keeps it.
    original : callable
        What the function replaces.
    """
    reference = weakref.ref(to)

    def delegated(*args: Any, **kwargs: Any) -> Any:
        call = reference()
        return original(*args, **kwargs) if call is None else call(original, *args, **kwargs)

    delegated.__name__ = getattr(original, "__name__", delegated.__name__)
    return delegated
