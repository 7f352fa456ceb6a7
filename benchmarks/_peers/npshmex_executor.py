"""npshmex: a drop-in `ProcessPoolExecutor` that puts arrays into named shared memory.

What
    `Npshmex`, with `Model` registered as an array wrapper.

How it works
    Arrays are copied into a new segment for each message; the receiver's array is that segment,
    whose name is removed at once. https://github.com/JelleAalbers/npshmex#array-wrappers

Lifetime
    The segment goes with the last array on it.

When it cannot
    Sending replaces the array of a registered wrapper by its name, in the sender's own object. So
    a shallow copy is sent of a model that its sender keeps.
"""

from __future__ import annotations

from typing import Any

import npshmex

from _peers._executed import ExecutorPeer
from _peers._work import Model, make_result

npshmex.register_array_wrapper(Model, "weights")


def _make_copy(stamp: int) -> Model:
    model = make_result(stamp)
    return model.with_words(model.words)


class Npshmex(ExecutorPeer):
    """The executor of npshmex."""

    def executor_class(self) -> Any:
        return npshmex.ProcessPoolExecutor

    def prepared(self, model: Model) -> Model:
        return model.with_words(model.words)

    def make_task(self) -> Any:
        return _make_copy
