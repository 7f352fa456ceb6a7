"""Loading that fails: what a pool gets in the place of a message that cannot be loaded.

**What.** `Substitute` is a task that raises the error, or a result that is it.

**How it works.** An exception of a load ends the thread of a pool that handles results, or a worker
with its task, and then the pool waits for ever. It can be told to the job: every task and every
result begins with the numbers of its job and of its part, and these can be read from the first
bytes of the stream, whatever is wrong with the rest.

Who loads is told by the code that called: the functions of ``multiprocessing.pool``.

**Lifetime.** The error refers to the frames that it came through, as every error does.

**When it cannot.** Everywhere else, and for what is no task or result, the error is raised as ever.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

from oobpickle import _envelope
from oobpickle._foreign import annotate
from oobpickle._hook import invitations
from oobpickle._pickling import in_band, payload

_MOST_FRAMES: Final = 4  # from the pool's to ours
_START_NBYTES: Final = 40
_NUMBERS: Final = frozenset(("BININT", "BININT1", "BININT2", "LONG1"))
_BEFORE: Final = frozenset(("PROTO", "FRAME", "MARK"))


class Substitute(NamedTuple):
    """A task or a result, but for the error."""

    reader: str
    job: int
    part: int

    @classmethod
    def of(cls, data: Any, frame: FrameType) -> Substitute | None:
        """Return what stands for a message that a pool cannot load, else ``None``.

        Parameters
        ----------
        data : bytes-like
            The message.
        frame : frame
            Of the caller of ``loads``.
        """
        reader = _reader(frame)
        numbers = None if reader is None else numbers_in(data)
        return None if reader is None or numbers is None else cls(reader, *numbers)

    def with_error(self, error: Exception) -> tuple[Any, ...]:
        """Return the task or the result; a note is added to the error."""
        is_task = self.reader == "worker"
        what = "task" if is_task else "result"
        annotate(error, f"oobpickle: raised when process {os.getpid()} loaded this {what}")
        if is_task:
            return self.job, self.part, raising, (error,), {}
        return self.job, self.part, (False, error)


def raising(error: Exception) -> None:
    """Raise the error: the function of a task that could not be loaded."""
    try:
        raise error
    finally:
        del error  # which refers to this frame


def _reader(frame: FrameType | None) -> str | None:
    codes = _codes_of_pools()
    for _ in range(_MOST_FRAMES):
        if frame is None or frame.f_code in codes:
            break
        frame = frame.f_back
    return codes.get(frame.f_code) if frame is not None else None


def _codes_of_pools() -> dict[CodeType, str]:
    module: Any = sys.modules.get("multiprocessing.pool")
    if module is None:
        return {}
    functions = (
        *(module.worker, module.Pool._handle_results),
        module.Pool._help_stuff_finish,  # what `terminate` finds in the channel it reads and drops
    )
    return {function.__code__: function.__name__ for function in functions}


def numbers_in(data: Any) -> tuple[int, int] | None:
    """Return the numbers with which a task or a result begins."""
    import pickletools  # with the first message that cannot be loaded

    numbers: list[int] = []
    try:
        opcodes: Any = pickletools.genops(_start_of_stream(memoryview(data).cast("B")))
        for opcode, argument, _ in itertools.islice(opcodes, 6):
            if opcode.name in _NUMBERS:
                numbers.append(int(argument))
            elif opcode.name not in _BEFORE or numbers:
                return None
            if len(numbers) == 2:
                return numbers[0], numbers[1]
    except (ValueError, struct.error):  # it ends before
        pass
    return None


def _start_of_stream(message: memoryview) -> bytes:
    message = invitations.without_prefix(message)
    for find in (
        _envelope.start_of_stream,
        in_band.start_of_stream,
        payload.start_of_stream,
    ):
        start = find(message)
        if start is not None:
            return start
    return bytes(message[:_START_NBYTES])
