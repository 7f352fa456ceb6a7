"""Arrow: arrays of pyarrow that refer to a part of their memory.

**What.** `reducer_of` knows how to reduce pyarrow's arrays, so that of a slice only the referenced
range is sent. Tables, record batches and the Arrow-backed columns of pandas consist of them.

**How it works.** pyarrow pickles whole buffers: ten rows of a table of a gigabyte are a gigabyte.
There is no general way around that, so this file knows one library. An array that refers to less
than it has is put through Arrow's IPC format, which writes the referenced range; what is read from
it is reduced by pyarrow, as every other array is.

**Lifetime.** No state. pyarrow is looked for where the user's import has put it, never imported.

**When it cannot.** pyarrow's way is taken: types that the format refuses, and invalid arrays."""

from __future__ import annotations

import sys
from typing import Any, Final

from oobpickle._pickling.byte_types import Reduce, Taker
from oobpickle._pickling.replaced import inherits

_REDUCERS: Final = ("__reduce_ex__", "__reduce__")
_LEAST_WASTED_NBYTES: Final = 512


def reducer_of(kind: type) -> Reduce | None:
    """Return how to reduce instances of a class, or ``None`` if it is no array of pyarrow."""
    pyarrow = sys.modules.get("pyarrow")
    array = getattr(pyarrow, "Array", None)
    if array is None or not hasattr(pyarrow, "ipc") or not issubclass(kind, array):
        return None
    return _reduce if inherits(kind, array, _REDUCERS) else None


def _reduce(_taker: Taker, array: Any) -> Any:
    return compact(array).__reduce_ex__(5)


def compact(array: Any) -> Any:
    """Return an equal array whose buffers hold no more than it refers to, or the array itself."""
    pa: Any = sys.modules["pyarrow"]
    try:
        return _compact(pa, array)
    except (pa.ArrowException, KeyError):
        return array


def _compact(pa: Any, array: Any) -> Any:
    if array.get_total_buffer_size() - array.nbytes < _LEAST_WASTED_NBYTES:
        return array
    if isinstance(array, pa.DictionaryArray):
        indices, values = compact(array.indices), compact(array.dictionary)
        return pa.DictionaryArray.from_arrays(indices, values, ordered=array.type.ordered)
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(array.type, compact(array.storage))
    batch = pa.RecordBatch.from_arrays([array], ["array"])
    return pa.ipc.read_record_batch(batch.serialize(), batch.schema).column(0)
