"""Subclasses: arrays of classes that derive from ``numpy.ndarray``.

**What.** `reducer_of` knows how to reduce a class that leaves its pickling to ``ndarray`` or to
``MaskedArray``: ``numpy.memmap``, ``matrix``, ``recarray`` and users' classes.

**How it works.** NumPy copies such an array into ``bytes`` first. Where no code of the user's can
see a difference, ours is rebuilt by ``ndarray.__new__`` on the buffer, as a masked array is by
``MaskedArray.__new__`` on two. A class with an ``__array_finalize__`` or ``__setstate__`` of its
own gets the very calls that NumPy makes, with ``bytes`` made of the buffer.

**Lifetime.** No state.

**When it cannot.** NumPy's way is taken: classes with a reducer of their own, Python objects, byte
orders other than the machine's, axes in an order that is neither C's nor Fortran's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from oobpickle._pickling.byte_types import LEAST_NBYTES, Reduce, Taker, as_bytes
from oobpickle._pickling.replaced import Rebuild, inherits

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_REDUCERS: Final = ("__reduce_ex__", "__reduce__")


def reducer_of(kind: type) -> Reduce | None:
    """Return how to reduce instances of a class, or ``None`` if that is not known here."""
    # None too while another thread is importing numpy.
    ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
    if ndarray is None or not issubclass(kind, ndarray):
        return None
    if inherits(kind, ndarray, _REDUCERS):
        return _reduce_directly if is_made_by_new(kind) else _reduce_by_state
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    if masked is None or not issubclass(kind, masked):
        return None
    if not inherits(kind, masked, (*_REDUCERS, "__getstate__")):
        return None
    return _reduce_masked_directly if kind is masked else _reduce_masked_by_state


def is_made_by_new(kind: type) -> bool:
    """Tell whether ``ndarray.__new__`` alone may rebuild an array of the class."""
    ndarray: Any = sys.modules["numpy"].ndarray
    return inherits(kind, ndarray, [*_REDUCERS, "__setstate__"]) and _is_finalized_by_numpy(kind)


def _is_finalized_by_numpy(kind: type) -> bool:
    owner = next(cls for cls in kind.__mro__ if "__array_finalize__" in vars(cls))
    return owner.__module__.partition(".")[0] == "numpy"


def _plain(taker: Taker, array: Any) -> Array | None:
    """Return the array as an exact one, if all of it can be sent as NumPy would."""
    import numpy as np

    plain = np.ndarray.view(array, np.ndarray)
    dtype, flags = plain.dtype, plain.flags
    least_nbytes = getattr(taker, "least_nbytes_of_subclass", LEAST_NBYTES)
    if plain.nbytes < least_nbytes or dtype.hasobject or not dtype.isnative or dtype.kind == "T":
        return None
    # Of these two orders NumPy's way makes C's; ours would keep the second.
    is_usual = flags.c_contiguous or flags.f_contiguous or not _is_permuted(plain)
    return plain if is_usual else None


def _is_permuted(array: Array) -> bool:
    axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    return array.transpose(axes).flags.c_contiguous


def _rebuild_of(taker: Taker, array: Array) -> Any:
    import numpy as np

    order = (0, array.strides) if array.flags.fnc else ()
    stand_in = taker.stand_in(array)
    return Rebuild(np.ndarray, (array.shape, array.dtype, stand_in, *order))


def _reduce_directly(taker: Taker, array: Any) -> Any:
    import numpy as np

    plain = _plain(taker, array)
    # A record array of plain records becomes one of numpy.record where it is made.
    is_odd = plain is not None and plain.dtype.names and not issubclass(plain.dtype.type, np.record)
    if plain is None or is_odd or taker.stays(plain.nbytes):
        return array.__reduce_ex__(5)
    _, arguments = _rebuild_of(taker, plain).reduced
    return np.ndarray.__new__, (type(array), *arguments)


def _reduce_by_state(taker: Taker, array: Any) -> Any:
    import numpy as np

    plain = _plain(taker, array)
    if plain is None or taker.stays(plain.nbytes):
        return array.__reduce_ex__(5)
    tiny: Any = np.empty(0, plain.dtype)
    rebuild, (_, *empty), state = tiny.__reduce__()
    stand_in = taker.stand_in(plain)
    described = plain.shape, plain.dtype, plain.flags.fnc
    return rebuild, (type(array), *empty), (state[0], *described, as_bytes(stand_in))


def _data_and_mask(taker: Taker, array: Any) -> tuple[Array, Array] | None:
    import numpy as np

    data = _plain(taker, array)
    if data is None:
        return None
    order = np.asfortranarray if data.flags.fnc else _in_c_order
    return data, order(np.ma.getmaskarray(array).view(np.ndarray))


def _in_c_order(array: Array) -> Array:
    import numpy as np

    return np.ascontiguousarray(array) if _is_permuted(array) else array


def _reduce_masked_directly(taker: Taker, array: Any) -> Any:
    import numpy as np

    both = _data_and_mask(taker, array)
    if both is None or taker.stays(both[0].nbytes + both[1].nbytes):
        return array.__reduce_ex__(5)
    is_plain = array._baseclass is np.ndarray and both[0].dtype.names is None and array.ndim > 0
    if not is_plain:
        return _masked_state(taker, array, *both)
    data, mask = (_rebuild_of(taker, one) for one in both)
    fill_value = array._fill_value
    # dtype, copy, subok, ndmin
    arguments = (type(array), data, mask, None, False, True, 0, fill_value)
    if fill_value is None:
        # NumPy's way sets the default, whose dtype is not that of the array. A state of None would
        # be left out, so it is made where it arrives.
        default = Rebuild(type(None), ())
        return np.ma.MaskedArray.__new__, arguments, default, None, None, np.ma.set_fill_value
    return np.ma.MaskedArray.__new__, arguments


def _reduce_masked_by_state(taker: Taker, array: Any) -> Any:
    both = _data_and_mask(taker, array)
    if both is None or taker.stays(both[0].nbytes + both[1].nbytes):
        return array.__reduce_ex__(5)
    return _masked_state(taker, array, *both)


def _masked_state(taker: Taker, array: Any, data: Array, mask: Array) -> Any:
    import numpy as np

    tiny: Any = np.ma.MaskedArray(np.empty(0, data.dtype))
    rebuild, (_, _, *empty), state = tiny.__reduce__()
    contents = [as_bytes(taker.stand_in(one)) for one in (data, mask)]
    described = data.shape, data.dtype, data.flags.fnc
    arguments = (type(array), array._baseclass, *empty)
    return rebuild, arguments, (state[0], *described, *contents, array._fill_value)
