"""A process for each side of a comparison, which does a row when it is asked to.

What
    `Side` starts a benchmark again with further arguments and asks it; `answer` is what that runs.

How it works
    The name of a row on standard input, the seconds that it took on standard output, in a line of
    its own: libraries may print others.

Lifetime
    From the making of a `Side` to its `end`.

When it cannot
    A side that ends early fails the comparison.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping

_TOOK = "took "


class Side:
    """One side, in a process of its own.

    Parameters
    ----------
    *arguments : str
        Of the interpreter: the program, and what makes it a side.
    """

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def time_s(self, row: str) -> float:
        """Have a row done; return the seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{row}\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith(_TOOK):
            assert line, "a side has ended"
        return float(line.removeprefix(_TOOK))

    def end(self) -> None:
        """Close its input, and wait for its end."""
        self._process.communicate()


def answer(work: Mapping[str, Callable[[], object]]) -> None:
    """Do the rows that are asked for, until nobody asks any more."""
    for line in sys.stdin:
        start = time.perf_counter()
        work[line.strip()]()
        print(f"{_TOOK}{time.perf_counter() - start}", flush=True)
