"""Objects to send, and how to compare what arrived: shared by the unit and property tests."""

import builtins
import collections
import enum
import functools
import hashlib
import logging
import pickle
import types

import numpy as np

#: Shapes whose arrays of 8 bytes an item stay in the stream, go out of band and are copied in one
#: go, or go out of band and are copied by numpy.
SHAPES = {"small": (4, 3, 2), "medium": (12, 10, 8), "large": (40, 24, 20)}


#: CPython 3.15's ``frozendict``, or nothing.
FROZEN_DICTS = tuple(t for t in [getattr(builtins, "frozendict", None)] if t is not None)


def order_of(array):
    """Return the strides along the axes where they mean something."""
    if array.size == 0:
        return ()
    return tuple(s for s, n in zip(array.strides, array.shape, strict=True) if n > 1)


def _elements_of(array, seen):
    if isinstance(array, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(array)
        return _elements_of(array.data, seen), mask.tobytes(), repr(array.fill_value)
    plain = np.asarray(array)
    if plain.dtype.hasobject:
        return [_described(item, seen) for item in plain.ravel().tolist()]
    if plain.dtype.names:  # what lies between fields is no part of the value
        return {name: _elements_of(plain[name], seen) for name in plain.dtype.names}
    data = plain.tobytes()
    # A digest, so that a difference between megabytes can be shown.
    return data if len(data) <= 64 else hashlib.sha1(data).hexdigest()


def described(obj):
    """Return all that a receiver can see of an object, arrays with dtype and memory order.

    Shared references and cycles appear as the number of the object's first appearance.
    """
    return _described(obj, {})


#: Pickled by their names: what arrives is the very object.
_BY_NAME = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    enum.Enum,
    logging.Logger,
    np.ufunc,
)


def _described(obj, seen):
    if isinstance(obj, _BY_NAME):
        return ("the very same", obj)
    containers = (np.ndarray, list, dict, *FROZEN_DICTS, tuple, types.SimpleNamespace)
    if isinstance(obj, containers) or (hasattr(obj, "__dict__")):
        if id(obj) in seen:
            return ("again", seen[id(obj)][0])
        seen[id(obj)] = (len(seen), obj)  # kept, so that its id stays its own
    if isinstance(obj, np.ndarray):
        return _array_described(obj, seen)
    if isinstance(obj, np.generic):
        return (type(obj).__name__, str(obj.dtype), obj.tobytes() if not obj.dtype.names else obj)
    if isinstance(obj, (dict, *FROZEN_DICTS)):
        items = [(_described(k, seen), _described(v, seen)) for k, v in obj.items()]
        return (type(obj).__name__, items, _attributes(obj, seen))
    if isinstance(obj, (list, tuple, collections.deque)):
        return (
            type(obj).__name__,
            [_described(item, seen) for item in obj],
            _attributes(obj, seen),
        )
    if isinstance(obj, float):
        return ("float", obj.hex())
    if isinstance(obj, functools.partial):
        return ("partial", obj.func, _described(obj.args, seen), _described(obj.keywords, seen))
    if isinstance(obj, BaseException):
        return (type(obj).__name__, _described(obj.args, seen), _attributes(obj, seen))
    if isinstance(obj, np.random.Generator):
        return ("Generator", _described(obj.bit_generator.state, seen))
    if type(obj).__eq__ is not object.__eq__ and not hasattr(obj, "__dict__"):
        return (type(obj).__name__, obj)
    return (type(obj).__name__, _attributes(obj, seen))


def _attributes(obj, seen):
    found = dict(getattr(obj, "__dict__", {}))
    for cls in type(obj).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            mangled = f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(obj, mangled):
                found[mangled] = getattr(obj, mangled)
    return [(name, _described(value, seen)) for name, value in found.items()]


def _array_described(array, seen):
    dtype = array.dtype
    return (
        type(array).__name__,
        array.shape,
        (dtype.str, repr(dtype), dtype.char, dtype.type.__name__, dtype.isalignedstruct),
        dict(dtype.metadata or {}),
        order_of(array),
        _elements_of(array, seen),
        _attributes(array, seen) if type(array) is Matrix else [],
    )


def pickled(obj):
    """Return what plain pickle delivers: the value that everything is compared with."""
    return pickle.loads(pickle.dumps(obj, protocol=5))


def filled(dtype, shape):
    """Return a C-ordered array of distinct values as far as the dtype has so many."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape))
    numbers = np.arange(1, size + 1)
    if dtype.names is not None:
        array = np.zeros(shape, dtype)
        for name in dtype.names:
            field = dtype.fields[name][0]
            base, inner = field.subdtype or (field, ())
            array[name] = filled(base, shape + inner)
        return array
    if dtype.kind == "V" and dtype.isbuiltin != 2:
        raw = np.resize(numbers.astype("u1"), size * dtype.itemsize)
        return raw.view(dtype).reshape(shape)
    if dtype.kind in "mM":
        return numbers.astype("i8").astype(dtype).reshape(shape)
    if dtype.kind == "b":
        return (numbers % 3 == 0).reshape(shape)
    if dtype.kind == "c":
        return (numbers + 1j * numbers[::-1]).astype(dtype).reshape(shape)
    if dtype.kind in "iu":
        return (numbers % 127).astype(dtype).reshape(shape)
    if dtype.kind == "f":
        return (numbers % 2048).astype(dtype).reshape(shape)
    return numbers.astype(dtype).reshape(shape)


def dtypes():
    """Return every kind of dtype whose elements are plain bytes, by name."""
    found = {
        "f8": np.dtype("f8"),
        "bool": np.dtype("?"),
        "int8": np.dtype("i1"),
        "longlong": np.dtype("q"),
        "half": np.dtype("f2"),
        "longdouble": np.dtype("g"),
        "complex": np.dtype("c8"),
        "clongdouble": np.dtype("G"),
        "big-endian": np.dtype(">f8"),
        "big-endian complex": np.dtype(">c16"),
        "big-endian longdouble": np.dtype(">g"),
        "big-endian clongdouble": np.dtype(">G"),
        "str": np.dtype("U5"),
        "big-endian str": np.dtype(">U5"),
        "bytes": np.dtype("S7"),
        "void": np.dtype("V6"),
        "datetime64": np.dtype("M8[us]"),
        "datetime64 of 25 s": np.dtype("M8[25s]"),
        "timedelta64": np.dtype("m8[D]"),
        "timedelta64 without unit": np.dtype("m8"),
        "metadata": np.dtype("f8", metadata={"unit": "metre"}),
        "packed": np.dtype([("a", "i1"), ("b", "f8"), ("c", "U2")]),
        "aligned": np.dtype([("a", "i1"), ("b", "f8")], align=True),
        "subarray": np.dtype([("v", "f4", (2, 3)), ("n", ">i2")]),
        "nested": np.dtype([("p", [("x", "f4"), ("y", "f4")]), ("n", "u2")]),
        "record": np.dtype((np.record, [("x", "f8"), ("n", "i4")])),
        "titles": np.dtype([(("the title", "a"), "f8"), ("b", "i2")]),
        "datetime field": np.dtype([("when", "M8[s]"), ("what", "f8")]),
        "overlapping fields": np.dtype(
            {"names": ["all", "low"], "formats": ["<u4", "<u2"], "offsets": [0, 0]}
        ),
        "fields out of order": np.dtype(
            {"names": ["second", "first"], "formats": ["i4", "i2"], "offsets": [4, 0]}
        ),
        "gap": np.dtype(
            {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 16], "itemsize": 32}
        ),
    }
    try:
        from numpy._core._rational_tests import rational
    except ImportError:  # numpy 1 has it elsewhere, and it is only one more dtype
        return found
    return found | {"of an extension": np.dtype(rational)}


def _unaligned(array):
    raw = bytearray(b"x" + array.tobytes())
    return np.ndarray(array.shape, array.dtype, raw, 1)


def _read_only(array):
    array.flags.writeable = False
    return array


#: How an array may lie in memory; each takes a C-ordered array and returns one like it.
LAYOUTS = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "transposed": lambda a: a.T,
    "moveaxis": lambda a: np.moveaxis(a, 0, 1),
    "rows": lambda a: a[1:-1],
    "strided": lambda a: a[::2],
    "column": lambda a: a[:, 1],
    "strided within": lambda a: a[:, :, ::2],
    "strided Fortran": lambda a: np.asfortranarray(a)[::2],
    "negative": lambda a: a[::-1],
    "negative within": lambda a: a[:, ::-1, :],
    "broadcast": lambda a: np.broadcast_to(a[0], a.shape),
    "one axis": lambda a: a.reshape(-1),
    "axes of length 1": lambda a: a[:, None, :, :1],
    "one item of many": lambda a: a[1:2, 1:2, 1:2],
    "no dimension": lambda a: a[1, 1, 1:2].reshape(()),
    "empty": lambda a: a[:0],
    "empty within": lambda a: a[:, :0],
    "unaligned": _unaligned,
    "read-only": _read_only,
    "read-only strided": lambda a: _read_only(a)[::3],
}


def as_pickle_should(array):
    """Return what pickle delivers, without what it loses of arrays that are no plain buffers.

    NumPy turns those into native byte order and C order; keeping both is right as well.
    """
    arrived = pickled(array)
    if arrived.dtype != array.dtype:
        arrived = arrived.astype(array.dtype, order="K")
    compact = array.copy(order="K")
    if array.size and order_of(compact) == order_of(array):  # nothing lies between its items
        memory = bytearray(array.nbytes)
        compact = np.ndarray(array.shape, arrived.dtype, memory, 0, compact.strides)
        compact[...] = arrived
        return compact
    return arrived


# Made once in each process: several tests ask for all of them.
@functools.cache
def _made(name, size):
    return filled(dtypes()[name], SHAPES[size])


@functools.cache
def _expected(layout, name, size):
    return described(as_pickle_should(LAYOUTS[layout](_made(name, size).copy())))


def differing(layout, cross, *, writable=True):
    """Send arrays of every dtype and shape in one layout; return where pickle does it differently.

    `cross` takes an array and returns what arrives.
    """
    wrong = {}
    for name in dtypes():
        for size in SHAPES:
            array = LAYOUTS[layout](_made(name, size).copy())
            expected = _expected(layout, name, size)
            try:
                arrived = cross(array)
                actual = described(arrived)
            except Exception as error:
                wrong[name, size] = repr(error)
            else:
                if actual != expected:
                    pairs = zip(expected, actual, strict=True)
                    wrong[name, size] = [pair for pair in pairs if pair[0] != pair[1]]
                elif writable and not arrived.flags.writeable:
                    wrong[name, size] = "arrived read-only"
    return wrong


class Matrix(np.ndarray):
    """A subclass with an attribute that its pickle keeps."""

    def __array_finalize__(self, obj):
        self.unit = getattr(obj, "unit", None)

    def __reduce__(self):
        rebuild, arguments, state = super().__reduce__()
        return rebuild, arguments, (state, self.unit)

    def __setstate__(self, state):
        super().__setstate__(state[0])
        self.unit = state[1]


def special_arrays(directory):
    """Return arrays that are no exact ndarrays of plain bytes, by name."""
    big = np.arange(2000.0).reshape(40, 50)
    objects = np.empty((2, 2), object)
    objects[0, 0], objects[0, 1], objects[1, 0] = big, big.T, [big[::2], None]
    mapped = np.memmap(directory / "mapped", "f8", "w+", shape=(40, 50))
    mapped[:] = big
    mapped.flush()
    unit = big.copy().view(Matrix)
    unit.unit = "metre"
    found = {
        "object": objects,
        "object, no dimension": np.array({"a": 1}, object),
        "object, read-only": _read_only(objects.copy()),
        "object field": np.array([(1, big), (2, None)], [("n", "i4"), ("o", "O")]),
        "memmap": mapped,
        "memmap, read-only": np.memmap(directory / "mapped", "f8", "r", shape=(40, 50)),
        "matrix": big.copy().view(np.matrix),
        "recarray": np.rec.fromarrays([np.arange(300), np.arange(300) / 2], names="a,b"),
        "masked": np.ma.masked_less(big.copy(), 7.0),
        "masked, hard": np.ma.MaskedArray(np.arange(9), [0, 1, 0] * 3, fill_value=5, hard_mask=1),
        "subclass": unit,
        "itemsize 0": np.zeros(5, "V0"),
    }
    if hasattr(np.dtypes, "StringDType"):
        words = ["a", "a much longer word than fits inline"] * 100
        missing = np.dtypes.StringDType(na_object=None)
        found["StringDType"] = np.array(words, np.dtypes.StringDType())
        found["StringDType with a missing one"] = np.array(["a", None, "b" * 40], missing)
    return found


class Model:
    """A plain class, equal by what it shows."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Slotted:
    """Slots, one of them private."""

    __slots__ = ("__count", "weights")

    def __init__(self, weights, count):
        self.weights = weights
        self.__count = count

    @property
    def count(self):
        return self.__count


class SlottedChild(Slotted):
    """Slots of a base class, of its own, and a ``__dict__``."""

    __slots__ = ("__dict__", "bias")


Layer = collections.namedtuple("Layer", "weights bias name")


class NotedLayer(Layer):
    """A named tuple with attributes."""


class Doubling(dict):
    """Its items are not what is put into it."""

    def __setitem__(self, key, value):
        super().__setitem__(key, 2 * value if type(value) is int else value)


class Total:
    """Its pickle has an array, and it keeps none."""

    def __init__(self, weights):
        self.total = float(weights.sum())
        self._reduced = weights

    def __reduce__(self):
        return rebuild_total, (self._reduced,)


def rebuild_total(weights):
    total = Total(weights)
    del total._reduced
    return total


class Row(tuple):
    """A tuple with attributes."""


class Table(dict):
    """A dict with attributes."""


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def relu(x):
    return max(x, 0)


def tanh(x):
    return np.tanh(x)


class Deriving:
    """Its state after loading is computed from the array."""

    def __init__(self, weights):
        self.weights = weights
        self.total = float(weights.sum())

    def __getstate__(self):
        return self.weights

    def __setstate__(self, weights):
        self.__init__(weights)


class Viewing:
    """Loading makes a second array over the same memory."""

    def __init__(self, weights):
        self.weights = weights
        self.head = weights[:100]
        self.flat = weights.reshape(-1)

    def __getstate__(self):
        return self.weights

    def __setstate__(self, weights):
        self.__init__(weights)


class Signal:
    """For reducers: a class that plain pickle would handle otherwise."""

    def __init__(self, samples):
        self.samples = samples

    def __reduce__(self):
        raise pickle.PicklingError("only the registered reducer may be used")


class LoudSignal(Signal):
    pass


def rebuild_signal(samples):
    return Signal(samples)


def reduce_signal(signal):
    return rebuild_signal, (pickle.PickleBuffer(signal.samples),)


def address_of(buffer):
    """Return where a buffer of at least one byte lies."""
    return np.frombuffer(buffer, np.uint8).ctypes.data
