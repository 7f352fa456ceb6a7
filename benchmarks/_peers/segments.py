"""`multiprocessing.shared_memory` by hand, as its documentation shows it.

What
    A segment for each message: create, copy in, send name, shape and dtype, attach. `View` reads
    the array where it is; `Copy` copies it out, for a receiver that wants an object of its own.
    The rest of the model travels through the pool beside the name.

How it works
    https://docs.python.org/3/library/multiprocessing.shared_memory.html

Lifetime
    The sender closes its mapping at once. The parent unlinks every name when the message was used.
    A view keeps its mapping as long as its model lives. One resource tracker, started before the
    workers, sees all names.

When it cannot
    A segment that nobody unlinks stays in ``/dev/shm`` until the tracker removes it.
"""

from __future__ import annotations

from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from _peers._pooled import PoolPeer, Wrapping
from _peers._work import Model

Message = tuple[Model, str, tuple[int, ...], str]


class _Attached(SharedMemory):
    """A mapping that goes with its array: closing it earlier is refused, as views exist."""

    def __del__(self) -> None:
        try:
            super().__del__()
        except BufferError:
            self._mmap = None  # The array still holds the mapping; it goes with the array.
            super().__del__()


class _ViewWrapping(Wrapping):
    def pack(self, model: Model) -> Message:
        words = model.words
        segment = SharedMemory(create=True, size=words.nbytes)
        np.ndarray(words.shape, words.dtype, segment.buf)[...] = words
        segment.close()
        return model.with_words(None), segment.name, words.shape, words.dtype.str

    def unpack(self, message: Any) -> Model:
        model, name, shape, dtype = message
        segment = _Attached(name)
        received: Model = model.with_words(np.ndarray(shape, dtype, segment.buf))
        received.segment = segment  # type: ignore[attr-defined]
        return received

    def release(self, message: Any) -> None:
        segment = SharedMemory(message[1])
        segment.close()
        segment.unlink()


class _CopyWrapping(_ViewWrapping):
    def unpack(self, message: Any) -> Model:
        model, name, shape, dtype = message
        segment = SharedMemory(name)
        words = np.ndarray(shape, dtype, segment.buf).copy()
        segment.close()
        received: Model = model.with_words(words)
        return received


class View(PoolPeer):
    """The receiver works in the segment."""

    wrapping = _ViewWrapping()

    def start(self, n_workers: int, nbytes: int) -> None:
        resource_tracker.ensure_running()
        super().start(n_workers, nbytes)


class Copy(View):
    """The receiver copies the array out of the segment."""

    wrapping = _CopyWrapping()
