"""Foreign exceptions: what a signal handler of the program raises in the middle of our own code.

**What.** `pass_on_foreign`, which every ``except OSError`` asks, and `ignoring`. `annotate` adds a
note to an exception of whatever class.

**How it works.** A signal handler can raise between any two lines, and the `TimeoutError` of an
alarm is an `OSError`. One of a system call has an errno; ours are known by their class.

**Lifetime.** No state.

**When it cannot.** A handler that raises an `OSError` with an errno is taken for a system call.
"""

from __future__ import annotations

import contextlib

from oobpickle._errors import OobPickleError


def pass_on_foreign(error: BaseException) -> None:
    """Raise `error` again, unless it is of a system call or of oobpickle.

    A signal handler of the program can raise between any two lines, and a `TimeoutError` is an
    `OSError`: whoever catches those asks here, or the program would wait for ever.
    """
    if isinstance(error, OSError) and error.errno is None and not isinstance(error, OobPickleError):
        raise error


def annotate(error: BaseException, note: str) -> None:
    """Add a note, if the exception takes one: a frozen data class does not."""
    with contextlib.suppress(Exception):
        error.add_note(note)


class ignoring:
    """A context in which errors of these types are ignored, but for foreign ones."""

    def __init__(self, *types: type[BaseException]) -> None:
        self._types = types

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, self._types):
            return False
        pass_on_foreign(error)
        return True
