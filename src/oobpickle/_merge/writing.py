"""What arrives read-only, made one's own: `writable` and `private`.

**What.** Ray and Dask deliver arrays that may not be written, joblib maps files read-only. An
operator in place needs a left operand that it may change.

**How it works.** The object is taken apart, which copies nothing, by a sink that looks at each
array and buffer. If one is read-only, the object is put together again from copies.

**Lifetime.** No state. The copy shares nothing with the original.

**When it cannot.** What cannot be pickled raises the pickler's error.
"""

from __future__ import annotations

import sys
from functools import partial
from pickle import PickleBuffer
from typing import Any, Final, TypeVar

from oobpickle._pickling.payload import Payload
from oobpickle._pickling.reducers import DispatchTable, Reducer, Sink, levels
from oobpickle._pickling.serializer import loads, take_apart

T = TypeVar("T")

#: Its memory is never writable, and no program expects it to be.
_IMMUTABLE: Final = "pyarrow"


def writable(obj: T) -> T:
    """Return an object that may be changed: a private copy if an array in it is read-only.

    Parameters
    ----------
    obj : object
        What a task was given or returned: an array, or anything that has arrays in it and can be
        pickled.

    Returns
    -------
    object
        `obj` itself if all of its arrays are writable; otherwise a copy that shares nothing with
        it, as pickling would have made it.

    Raises
    ------
    Exception
        Whatever ``pickle.dumps(obj, protocol=5)`` raises.

    See Also
    --------
    merge : does this for its operators.

    Notes
    -----
    Ray gives tasks arrays in its store, Dask those of its own memory, joblib maps files: they may
    not be written, since others see the same bytes. Copies each buffer once. What is immutable by
    nature, such as ``bytes`` and the columns of Arrow, needs no copy.

    Examples
    --------
    >>> import numpy as np, oobpickle
    >>> delivered = {"counts": np.zeros(3)}
    >>> oobpickle.writable(delivered) is delivered
    True
    >>> delivered["counts"].flags.writeable = False
    >>> own = oobpickle.writable(delivered)
    >>> own["counts"] += 1
    >>> own["counts"], delivered["counts"]
    (array([1., 1., 1.]), array([0., 0., 0.]))
    """
    sink = _Look(0)
    take_apart(obj, sink, by_value=True)
    own: T = _copy(sink) if sink.is_read_only else obj
    return own


def private(obj: Any) -> Any:
    """Return a copy that shares nothing with the object, and is writable."""
    sink = Sink(0)
    take_apart(obj, sink, by_value=True)
    return _copy(sink)


def _copy(sink: Sink) -> Any:
    return loads(Payload(sink.pieces, sink.sources, sink.sizes))


class _Look(Sink):
    """A sink that notes whether anything in it is read-only."""

    __slots__ = ("is_read_only",)

    def __init__(self, threshold: int) -> None:
        self.is_read_only = False
        super().__init__(threshold)

    @property
    def table(self) -> DispatchTable:
        table = _Table()
        table.sink = self
        table.levels = levels({})
        return table

    def reduce_array(self, array: Any) -> Any:
        self.is_read_only |= not array.flags.writeable
        return super().reduce_array(array)

    def reduce_subclass(self, reduce: Reducer, array: Any) -> Any:
        """Look at an array of another class, and at its mask if it has one."""
        for one in (array, getattr(array, "_mask", None)):
            if isinstance(one, sys.modules["numpy"].ndarray):
                self.is_read_only |= not one.flags.writeable
        return reduce(array)

    def take(self, buffer: PickleBuffer) -> bool:
        with memoryview(buffer) as view:
            is_immutable = type(view.obj).__module__.partition(".")[0] == _IMMUTABLE
            self.is_read_only |= view.readonly and not is_immutable
        return super().take(buffer)


class _Table(DispatchTable):
    """A dispatch table that shows its sink every array."""

    __slots__ = ()
    sink: _Look

    def __missing__(self, kind: type) -> Reducer:
        reduce = super().__missing__(kind)
        ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
        if ndarray is not None and kind is not ndarray and issubclass(kind, ndarray):
            self[kind] = reduce = partial(self.sink.reduce_subclass, reduce)
        return reduce
