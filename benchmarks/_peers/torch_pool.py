"""`torch.multiprocessing`: arrays travel as tensors in shared memory.

What
    A ``torch.multiprocessing.Pool``. The sender wraps the array by ``torch.from_numpy``, the
    receiver unwraps it by ``Tensor.numpy``; the rest of the model travels in the pickle.

How it works
    Sending moves the storage of the tensor into shared memory, which copies it once; the receiver
    maps it. https://docs.pytorch.org/docs/stable/multiprocessing.html

Lifetime
    The memory goes with the last tensor or array on it. Nothing is released by hand.

When it cannot
    `ImportError` where there is no build of torch for this Python.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.multiprocessing

from _peers._pooled import PoolPeer, Wrapping
from _peers._work import Model


class _TensorWrapping(Wrapping):
    def pack(self, model: Model) -> Model:
        return model.with_words(torch.from_numpy(model.words))

    def unpack(self, message: Any) -> Model:
        received: Model = message.with_words(message.weights.numpy())
        return received


class Torch(PoolPeer):
    """The pool of torch."""

    wrapping = _TensorWrapping()

    def context(self) -> Any:
        return torch.multiprocessing

    def _remember(self, message: Any) -> None:
        pass  # There is nothing to release.
