"""`concurrent.futures.ProcessPoolExecutor` as it comes.

What
    `Executor`, with the default start method.

How it works
    https://docs.python.org/3/library/concurrent.futures.html#processpoolexecutor

Lifetime
    From `start` to `stop`.

When it cannot
    See ``_executed.py``.
"""

from __future__ import annotations

import concurrent.futures
from typing import Any

from _peers._executed import ExecutorPeer


class Executor(ExecutorPeer):
    """The executor of the standard library."""

    def executor_class(self) -> Any:
        return concurrent.futures.ProcessPoolExecutor
