"""Choosing the engine that serves an object of the user.

**What.** `engine_for`, and the text of what is accepted.

**How it works.** Libraries are recognised by what is imported already: whoever has an executor has
imported its module. So nothing is imported for anybody.

**Lifetime.** No state.

**When it cannot.** Anything else is a `TypeError`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

from oobpickle._merge.engine import Engine, is_of

ACCEPTED: Final = (
    "a multiprocessing Pool or ThreadPool, a concurrent.futures Executor (loky's, and that of "
    "Dask's Client.get_executor(), too), a distributed.Client, the module ray, a joblib.Parallel, "
    "or None for this process"
)


def engine_for(engine: Any) -> Engine:
    """Return what serves an object of the user.

    Raises
    ------
    TypeError
        If nothing does.
    """
    if isinstance(engine, ModuleType) and engine.__name__ == "ray":
        from oobpickle._merge.ray import Ray

        return Ray(engine)
    if is_of(engine, "multiprocessing.pool", "Pool"):
        from oobpickle._merge.pools import of_pool

        return of_pool(engine)
    if is_of(engine, "concurrent.futures", "Executor"):
        from oobpickle._merge.executors import of_executor

        return of_executor(engine)
    if is_of(engine, "distributed", "Client"):
        from oobpickle._merge.dask import Dask

        return Dask(engine)
    if is_of(engine, "joblib", "Parallel"):
        from oobpickle._merge.joblib import Joblib

        return Joblib(engine)
    raise TypeError(f"engine must be {ACCEPTED}, not {_named(engine)}")


def _named(engine: object) -> str:
    if isinstance(engine, ModuleType):
        return f"the module {engine.__name__}"
    kind = engine if isinstance(engine, type) else type(engine)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(engine, type):
        return f"the class {name}: give an instance"
    if name.startswith("ray."):
        return f"a {name}: give the module ray itself, whose objects stay where they are made"
    return f"a {name}"
