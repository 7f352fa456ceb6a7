"""Files in memory: ``np.save`` into ``/dev/shm``, ``np.load`` with a memory map.

What
    A file for each message; the model without its array, and the file's name, go through the pool.

How it works
    ``mmap_mode="c"`` maps copy-on-write: the receiver can write, and nobody sees it.
    https://numpy.org/doc/stable/reference/generated/numpy.load.html

Lifetime
    The parent removes each file when the message was used; a mapping survives that.

When it cannot
    Files of a run that is killed stay. Their names begin with `PREFIX`, and the coordinator
    removes them.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import numpy as np

from _peers._pooled import PoolPeer, Wrapping
from _peers._work import Model

PREFIX = "/dev/shm/peers-file-"


class _FileWrapping(Wrapping):
    def pack(self, model: Model) -> tuple[Model, str]:
        path = f"{PREFIX}{uuid.uuid4().hex}.npy"
        np.save(path, model.words)
        return model.with_words(None), path

    def unpack(self, message: Any) -> Model:
        model, path = message
        received: Model = model.with_words(np.load(path, mmap_mode="c"))
        return received

    def release(self, message: Any) -> None:
        os.unlink(message[1])


class Files(PoolPeer):
    """A pool that sends names of files."""

    wrapping = _FileWrapping()
