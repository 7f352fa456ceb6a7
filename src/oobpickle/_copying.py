"""Copying much memory at once, on two cores where one is idle.

**What.** `copy_array` is ``np.copyto`` for arrays of one shape and dtype, `copy_bytes` the same for
memory of one size.

**How it works.** What is contiguous is copied by `oobpickle._core`, which takes a helper thread for
large copies; strides are NumPy's business. The GIL is released meanwhile if it is much.

**Lifetime.** When they return, no thread of theirs is left.

**When it cannot.** Without the extension module NumPy copies everything, on one core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from oobpickle._native import core

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_SMALL_NBYTES: Final = 32 << 10


def copy_array(destination: Array, source: Array) -> None:
    """Copy an array over another one of the same shape and dtype, which is C-contiguous."""
    import numpy as np

    if core is not None and source.nbytes > _SMALL_NBYTES and source.flags.c_contiguous:
        core.copy(destination.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8))
    else:
        np.copyto(destination, source)


def copy_bytes(destination: memoryview, source: bytes | memoryview) -> None:
    """Copy contiguous bytes."""
    if core is None or len(source) <= _SMALL_NBYTES:
        destination[:] = source
    else:
        core.copy(destination, source)
