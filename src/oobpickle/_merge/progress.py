"""How far it is: what `merge` says while it runs.

**What.** `reporter` returns what is called with the number of pieces that are done.

**How it works.** A bar of tqdm, where that is installed; else a line on stderr, written over
itself. Or what the caller gave.

**Lifetime.** Bar and line are ended when the merge is, by an error too.

**When it cannot.** What a callable of the program raises ends the merge, as any other error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int | None], object]


class Reporter:
    """Says nothing."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, n_done: int, n_all: int | None) -> None:
        """Say how many pieces are done, and of how many, if that is known."""


class _Called(Reporter):
    def __init__(self, progress: Progress) -> None:
        self.tell = progress  # type: ignore[assignment,method-assign]


class _Line(Reporter):
    _is_begun = False

    def tell(self, n_done: int, n_all: int | None) -> None:
        of = "" if n_all is None else f" of {n_all}"
        print(f"\rmerge: {n_done}{of} pieces", end="", file=sys.stderr, flush=True)
        self._is_begun = True

    def __exit__(self, *_: object) -> None:
        if self._is_begun:
            print(file=sys.stderr)


class _Bar(Reporter):
    def __init__(self, tqdm: Any) -> None:
        self._bar = tqdm(desc="merge", unit="piece")

    def tell(self, n_done: int, n_all: int | None) -> None:
        if n_all != self._bar.total:
            self._bar.total = n_all
            self._bar.refresh()
        self._bar.update(n_done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def reporter(progress: bool | Progress | None) -> Reporter:
    """Return what tells the user.

    Raises
    ------
    TypeError
        If `progress` is not one of the things that `merge` takes.
    """
    if progress is None or progress is False:
        return Reporter()
    if progress is not True:
        if not callable(progress):
            raise TypeError(f"progress must be True, None or a callable, not {progress!r}")
        return _Called(progress)
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return _Line()
    return _Bar(tqdm)
