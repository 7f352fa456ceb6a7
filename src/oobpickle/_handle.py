"""A handle of memory that several processes have a part of: what such handles have in common.

**What.** `Handle`: a context that closes the handle, and copies that are the handle itself.

**How it works.** A class says what `close` gives up, and what `_open` raises afterwards.

**Lifetime.** Whoever drops the last reference to a handle gives up the same as `close`.

**When it cannot.** It cannot fail.
"""

from __future__ import annotations

from typing import Any, Self


class Handle:
    """What stands for an object in memory that this process is not the only one to have."""

    __slots__ = ()

    def _open(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Give up this process's part of the memory."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self
