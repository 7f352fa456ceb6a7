"""The errors and the warning of oobpickle: one tree, so that one ``except`` catches all of it.

**What.** Every exception that the library raises of its own accord. Each also inherits from the
standard class that a caller already catches for that kind of failure.

**How it works.** A message says what happened, the numbers, where, and what to do. The text is the
only argument, so each exception survives pickling with the same text.

**Lifetime.** None: no state.

**When it cannot.** An error of the user's own object (a ``__reduce__`` or ``__setstate__`` that
raises) is not wrapped: it arrives as plain ``pickle`` would have raised it.
"""

from __future__ import annotations

import pickle


class OobPickleError(Exception):
    """Base of all errors that oobpickle raises of its own accord."""


class PayloadError(OobPickleError, pickle.UnpicklingError):
    """A payload is truncated or altered, or comes with the wrong number or size of buffers."""


class EnvelopeError(OobPickleError, pickle.UnpicklingError):
    """An envelope is truncated, altered, or from an arena that this process cannot reach."""


class StaleEnvelopeError(EnvelopeError):
    """An envelope was loaded already, or its memory has been taken back."""


class StructureError(OobPickleError, ValueError):
    """``loads(payload, into=obj)``: `obj` has not the structure of the payload."""


class FileFormatError(OobPickleError, ValueError):
    """A file is not what `dump` writes, truncated, altered, or of a newer version."""


class SharedStructureError(OobPickleError, ValueError):
    """Something was changed within `Shared.writing` that is not the memory of an array."""


class ArenaError(OobPickleError, OSError):
    """The arena cannot be created, attached or used on this system."""


class ArenaFullError(OobPickleError, MemoryError):
    """No room in the arena: the caller may wait, or send the bytes in-band."""

    def __init__(self, message: str, reason: str = "full") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ArenaFullError], tuple[str, str], dict[str, object]]:
        return type(self), (str(self), self.reason), self.__dict__


class FallbackWarning(UserWarning):
    """Some messages travelled in-band; the text says how many, why, and what to change."""


class RepeatedWarning(FallbackWarning):
    """The same array went out again and again, and made up most of what was sent."""


class NotServedWarning(FallbackWarning):
    """Nothing went out of band: a library was used that pickles by itself and is not served."""


class LockOwnerDiedWarning(RuntimeWarning):
    """A process died while it was writing to a shared object, which may be half changed."""


def format_nbytes(nbytes: int) -> str:
    """Return bytes in the largest binary unit that keeps the number at or above 1."""
    value = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 10 or unit == "bytes" else f"{value:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        value = seconds * factor
        if value >= 1:
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds * 1e6:.0f} us"
