"""The options of an arena, checked before anything starts.

**What.** `Options` holds what ``enabled`` and ``install`` take; `Options.resolve` fills the
defaults in.

**How it works.** ``None`` means "not said": nested uses compare only what was said.

**Lifetime.** The resolved values are written into the table's header, where children read them.

**When it cannot.** A value out of range raises ``ValueError`` (``TypeError`` for the wrong type)
with the value and the range."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, fields
from typing import Final

from oobpickle._memory import headroom

#: Measured crossover of plain pickling and the arena for one message through a warm Pool.
DEFAULT_THRESHOLD: Final = 128 << 10
#: For tests: every message goes through the arena, with its stream, however small it is.
FORCED: Final = os.environ.get("OOBPICKLE_FORCE") == "1"
_MIN_CAPACITY: Final = 1 << 20
_MAX_CAPACITY: Final = 1 << 43
_NOT_SAID: Final = 0xFFFF_FFFF_FFFF_FFFF
_COPY_CODES: Final[dict[bool | None, int]] = {None: 0, True: 1, False: 2}


@dataclass(frozen=True, slots=True)
class Options:
    """What the user said; ``None`` where nothing was said. Units: bytes and seconds."""

    capacity: int | None = None
    threshold: int | None = None
    wait_timeout: float | None = None
    copy_on_receive: bool | None = None
    spill_dir: str | None = None

    def __post_init__(self) -> None:
        _check_int("capacity", self.capacity, _MIN_CAPACITY, _MAX_CAPACITY)
        _check_int("threshold", self.threshold, 0, 1 << 62)
        _check_seconds("wait_timeout", self.wait_timeout)
        copies = self.copy_on_receive
        if copies is not None and not isinstance(copies, bool):
            raise TypeError(f"copy_on_receive must be True, False or None, not {copies!r}")

    def check_compatible(self, running: Options) -> None:
        """Compare with the options of the arena that runs already.

        Raises
        ------
        ValueError
            If an option was said here and differs there.
        """
        for field in fields(self):
            said, runs = getattr(self, field.name), getattr(running, field.name)
            if said is not None and said != runs:
                raise ValueError(
                    f"oobpickle is enabled already with {field.name}={runs!r}; "
                    f"{field.name}={said!r} differs. Leave the option out here, or give it outside."
                )

    def resolve(self) -> Options:
        """Return the options with their defaults filled in.

        `wait_timeout`, `copy_on_receive` and `spill_dir` may stay ``None``.
        """
        capacity = self.capacity
        if capacity is None:
            capacity = max(_MIN_CAPACITY, min(_MAX_CAPACITY, headroom.limit_nbytes() // 2))
        threshold = self.threshold
        if FORCED:
            threshold = 0
        elif threshold is None:
            threshold = DEFAULT_THRESHOLD
        return Options(capacity, threshold, self.wait_timeout, self.copy_on_receive, self.spill_dir)

    def words(self) -> tuple[int, int, int]:
        """Return threshold, wait_timeout and copy_on_receive as numbers, for the table's header."""
        wait = self.wait_timeout
        said = _NOT_SAID if wait is None else struct.unpack("Q", struct.pack("d", wait))[0]
        return self.threshold or 0, said, _COPY_CODES[self.copy_on_receive]

    @classmethod
    def read(
        cls, capacity: int, threshold: int, wait: int, copies: int, folder: str | None = None
    ) -> Options:
        """Return what was given to the header, and where the data on disk is."""
        said = {code: copies for copies, code in _COPY_CODES.items()}
        wait_timeout = None if wait == _NOT_SAID else struct.unpack("d", struct.pack("Q", wait))[0]
        return cls(capacity, threshold, wait_timeout, said[copies], folder)


def folder_named(name: str, value: object) -> str | None:
    """Return what an option of that name was given, as an absolute path without links.

    Raises
    ------
    TypeError, ValueError
        If it can be no path.
    """
    if value is None:
        return None
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} must be the path of a folder (str or Path), not {value!r}")
    path = os.fsdecode(value)
    if not path or "\0" in path:
        raise ValueError(f"{name} must be the path of a folder, not {value!r}")
    return os.path.realpath(path)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (bytes), not {value!r}; 4 GiB is 4 << 30")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high} bytes, not {value}")


def _check_seconds(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not (0 <= value <= 86400 * 365) or math.isnan(value):
        raise ValueError(f"{name} must be 0 to 31536000 seconds, not {value!r}")
