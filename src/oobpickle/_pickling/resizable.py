"""Resizable: memory whose owner may change its size while a message waits to be written.

**What.** `Resizable` stands for a bytearray, an ``array.array`` or the like in a payload.

**How it works.** Whoever holds a buffer of a bytearray keeps everybody else from appending to it:
another thread would get a `BufferError` that plain pickling never causes. So the object is held,
not its buffer, and the buffer is taken for each copy, which is made without giving up the GIL.

**Lifetime.** That of its payload; it holds the object.

**When it cannot.** `ResizedError` if the size is not that of the stream any more; whoever sends
takes the object apart once more, with a copy of such memory."""

from __future__ import annotations

from pickle import PickleBuffer
from typing import Any

from oobpickle._errors import ResizedError


def resized(owner: object, nbytes: int, found_nbytes: int) -> ResizedError:
    """Return the error for memory that has another size than when it was taken apart."""
    return ResizedError(
        f"a {type(owner).__name__} of {nbytes} bytes had {found_nbytes} when it was written. "
        "Write the payload before you resize what is in it."
    )


class Resizable:
    """Memory of an object that can change its size.

    Attributes
    ----------
    owner : object
        Whose memory it is.
    nbytes : int
        When it was taken apart.
    """

    __slots__ = ("nbytes", "owner")

    def __init__(self, owner: Any, nbytes: int) -> None:
        self.owner = owner
        self.nbytes = nbytes

    def raw(self) -> memoryview:
        """Return its bytes; while that lives, nobody can resize the memory.

        Raises
        ------
        ResizedError
            If it has another size by now.
        """
        raw = PickleBuffer(self.owner).raw()
        found_nbytes = raw.nbytes
        if found_nbytes != self.nbytes:
            raw.release()  # the traceback keeps this frame while another attempt is made
            raise resized(self.owner, self.nbytes, found_nbytes)
        return raw

    def copy_into(self, view: memoryview) -> None:
        """Copy its bytes, in one step for all other threads."""
        view[:] = self.raw()
