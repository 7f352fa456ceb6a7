"""Any object, any way through the serializer: the value that plain pickle would have delivered."""

import array as array_module
import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oobpickle
import samples
from exploring import examples
from oobpickle import Payload, PayloadError, StructureError
from oobpickle._pickling.serializer import serialize
from oobpickle.testing import check_roundtrip
from samples import Layer, Model, described, pickled

few, some = examples(30), examples(60)


# --- arrays


def _byte_dtypes():
    orders = st.sampled_from("=<>")
    plain = st.one_of(
        orders.flatmap(lambda order: hnp.integer_dtypes(endianness=order)),
        orders.flatmap(lambda order: hnp.unsigned_integer_dtypes(endianness=order)),
        orders.flatmap(lambda order: hnp.floating_dtypes(endianness=order)),
        orders.flatmap(lambda order: hnp.complex_number_dtypes(endianness=order)),
        orders.flatmap(lambda order: hnp.datetime64_dtypes(endianness=order)),
        orders.flatmap(lambda order: hnp.timedelta64_dtypes(endianness=order)),
        orders.flatmap(lambda order: hnp.unicode_string_dtypes(endianness=order, max_len=9)),
        hnp.byte_string_dtypes(max_len=9),
        hnp.boolean_dtypes(),
    )
    return st.one_of(plain, hnp.array_dtypes(plain, max_size=3, allow_subarrays=True))


@st.composite
def arrays(draw, max_side=40):
    """An exact array of any dtype without objects, any shape, lying anyhow in its memory."""
    dtype = draw(_byte_dtypes())
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=max_side))
    while int(np.prod(shape)) * dtype.itemsize > 200_000:
        shape = shape[1:]
    # Bytes, not elements: every pattern of bits is a value that must arrive as it is.
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    seed = draw(st.binary(max_size=40)) or b"\0"
    pattern = (
        np.resize(np.frombuffer(seed, "u1"), n_bytes) if n_bytes else np.zeros(0, "u1")
    ).copy()
    if dtype.kind in "U":
        pattern[...] = 0  # no pattern is a code point but a few
    array = pattern.view(dtype).reshape(shape) if n_bytes else np.zeros(shape, dtype)
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    if array.ndim > 1:
        array = array.transpose(draw(st.permutations(range(array.ndim))))
    if draw(st.booleans()):
        index = draw(hnp.basic_indices(array.shape, allow_newaxis=True))
        array = array[index]
        array = array if type(array) is np.ndarray else np.asarray(array)
    if draw(st.integers(0, 9)) == 0:
        array = np.broadcast_to(array, (2, *array.shape))
    if draw(st.booleans()):
        array.flags.writeable = False
    return array


WAYS = {
    "loads": lambda payload: oobpickle.loads(payload),
    "bytes": lambda payload: oobpickle.loads(payload.to_bytes()),
    "bytes twice": lambda payload: oobpickle.loads(
        Payload.from_bytes(Payload.from_bytes(payload.to_bytes()).to_bytes())
    ),
    "pickle": lambda payload: pickle.loads(payload.to_pickle()),
    "pickle of bytes": lambda payload: pickle.loads(
        Payload.from_bytes(payload.to_bytes()).to_pickle()
    ),
    "given memory": lambda payload: _through_memory(payload),
}
ways = st.sampled_from(sorted(WAYS))
thresholds = st.sampled_from([0, 0, 600, 5000, 1 << 40])


def _through_memory(payload):
    destinations = [bytearray(b"\xee" * nbytes) for nbytes in payload.sizes]
    payload.write_into(destinations)
    return oobpickle.loads(payload, buffers=destinations)


@some
@given(arrays(), ways, thresholds)
def test_an_array_arrives_as_pickle_would_deliver_it_but_writable(array, way, threshold):
    before = array.tobytes()
    arrived = WAYS[way](serialize(array, threshold))

    assert described(samples.as_pickle_should(array)) == described(arrived)
    assert type(arrived) is np.ndarray
    assert arrived.flags.writeable
    assert not np.shares_memory(arrived, array)
    arrived[...] = np.zeros((), arrived.dtype)
    assert array.tobytes() == before


@st.composite
def subclasses(draw):
    """An array of a subclass, masked or not, or Python's own memory."""
    plain = draw(arrays(max_side=60))
    as_class = {
        "records": lambda: plain.view(np.recarray),
        "masked": lambda: np.ma.MaskedArray(plain, np.zeros(plain.shape, bool)),
        "hard mask": lambda: np.ma.MaskedArray(plain, np.ones(plain.shape, bool), hard_mask=True),
        "users": lambda: plain.view(samples.Matrix),
        "bytes": plain.tobytes,
        "bytearray": lambda: bytearray(plain.tobytes()),
        "array": lambda: array_module.array("b", plain.tobytes()),
    }
    return as_class[draw(st.sampled_from(sorted(as_class)))]()


# --- objects


def _leaves():
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.binary(min_size=600, max_size=700).map(bytearray),
    )


_text = [np.dtypes.StringDType()] if hasattr(np.dtypes, "StringDType") else []
_pool_arrays = st.sampled_from(["f8", "i4", "M8[s]", "U3", "f4,u1", *_text]).flatmap(
    lambda dtype: st.sampled_from([(0,), (3,), (2, 80), (70, 3)]).map(
        lambda shape: samples.filled(dtype, shape)
    )
)


@st.composite
def objects(draw, *, frozen=True):
    """Nested containers and arrays, some of which are in several places, views among them.

    Without `frozen` each of them can be changed in place, or made anew around what can.
    """
    pool = draw(st.lists(_pool_arrays, min_size=1, max_size=4))
    pool += [array[::2] for array in pool if array.ndim and draw(st.booleans())]
    pool += [array.T for array in pool if draw(st.booleans())]
    shared = st.sampled_from(range(len(pool))).map(pool.__getitem__)
    keys = st.one_of(st.integers(), st.text(max_size=3), st.tuples(st.integers(), st.booleans()))
    made = [pool]

    def containers(inner):
        children = st.one_of(inner, shared)
        return st.one_of(
            st.lists(children, max_size=4),
            st.tuples(children, children),
            st.dictionaries(keys, children, max_size=4),
            st.builds(Layer, children, children, inner),
            st.builds(lambda a, b: Model(first=a, second=b), children, children),
            st.lists(children, max_size=3).map(_object_array),
            *(
                st.dictionaries(keys, children, max_size=4).map(kind)
                for kind in samples.FROZEN_DICTS
                if frozen
            ),
        )

    root = draw(st.recursive(st.one_of(_leaves(), shared), containers, max_leaves=15))
    whole = [root, draw(shared), draw(containers(_leaves()))]
    if draw(st.booleans()):
        whole.append(root)
    if draw(st.booleans()):
        whole.append({"whole": whole, "pool": made[0]})
    return whole


def _object_array(items):
    array = np.empty(len(items), object)
    for position, item in enumerate(items):
        array[position] = item
    return array


@some
@given(objects(), ways, thresholds)
def test_an_object_arrives_as_pickle_would_deliver_it(obj, way, threshold):
    before = described(obj)
    arrived = WAYS[way](serialize(obj, threshold))

    assert described(pickled(obj)) == described(arrived)
    assert described(obj) == before


@examples(25)
@given(st.one_of(arrays(), objects(), subclasses()))
def test_an_object_arrives_in_a_process_as_pickle_would_deliver_it(obj):
    check_roundtrip(obj, start_method="fork")


@few
@given(objects())
def test_two_loads_of_one_payload_share_nothing(obj):
    payload = oobpickle.dumps(obj)
    first, second = oobpickle.loads(payload), oobpickle.loads(payload)
    arrays = [a for a in _arrays_in(first) if a.size]

    for one in arrays:
        for another in _arrays_in(second) + _arrays_in(obj):
            assert not np.shares_memory(one, another)


def _arrays_in(obj, seen=None):
    seen = {} if seen is None else seen
    if id(obj) in seen:
        return []
    seen[id(obj)] = obj
    if type(obj) is np.ndarray and obj.dtype != object:
        return [obj]
    if isinstance(obj, (dict, *samples.FROZEN_DICTS)):
        inside = list(obj.values())
    elif isinstance(obj, Model):
        inside = list(vars(obj).values())
    elif isinstance(obj, (list, tuple)) or type(obj) is np.ndarray:
        inside = list(obj)
    else:
        inside = []
    return [array for item in inside for array in _arrays_in(item, seen)]


# --- into


def _emptied(obj):
    """Overwrite every array in an object, and every number, text and bytes that can be."""
    for array in _arrays_in(obj):
        array[...] = np.zeros((), array.dtype)
    _empty_leaves(obj, {})
    return obj


def _empty_leaves(obj, seen):
    if id(obj) in seen:
        return
    seen[id(obj)] = obj
    if isinstance(obj, Model):
        obj = vars(obj)
    pairs = obj.items() if isinstance(obj, dict) else enumerate(obj) if _is_sequence(obj) else ()
    for key, value in list(pairs):
        if type(value) in (int, float, str, bytes, bytearray) and not isinstance(obj, tuple):
            obj[key] = type(value)()
        _empty_leaves(value, seen)


def _is_sequence(obj):
    return isinstance(obj, (list, tuple)) or (type(obj) is np.ndarray and obj.dtype == object)


@some
@given(objects(frozen=False), st.booleans())
def test_an_object_can_be_loaded_into_another_of_its_structure(obj, as_bytes):
    payload = oobpickle.dumps(obj)
    target = _emptied(pickled(obj))
    kept = _arrays_in(target)
    addresses = [array.ctypes.data for array in kept]
    result = oobpickle.loads(payload.to_bytes() if as_bytes else payload, into=target)

    assert result is target
    assert described(pickled(obj)) == described(target)
    assert [id(array) for array in kept] == [id(array) for array in _arrays_in(target)]
    assert addresses == [array.ctypes.data for array in kept]


@some
@given(objects(), objects())
def test_a_load_into_another_object_gives_its_value_or_changes_nothing(obj, target):
    target = pickled(target)
    before, expected = described(target), described(pickled(obj))
    kept = _arrays_in(target)
    bytes_before = [array.tobytes() for array in kept]
    try:
        oobpickle.loads(oobpickle.dumps(obj), into=target)
    except StructureError:
        assert before == described(target)
        assert bytes_before == [array.tobytes() for array in kept]
    else:
        assert expected == described(target)


@some
@given(st.data(), st.sampled_from(["f8", "U3", "M8[s]", "f4,u1"]))
def test_any_part_of_an_array_can_be_loaded_into(data, dtype):
    base = np.zeros((12, 13, 14), dtype)
    target = base[data.draw(hnp.basic_indices(base.shape))]
    if type(target) is not np.ndarray:
        return
    target = target.transpose(data.draw(st.permutations(range(target.ndim))))
    source = samples.filled(dtype, target.shape)
    outside = np.ones(base.shape, bool)
    address, strides, view = target.ctypes.data, target.strides, [target]
    oobpickle.loads(oobpickle.dumps([source]), into=view)

    assert view[0] is target
    assert (address, strides) == (target.ctypes.data, target.strides)
    assert described(source) == described(target.copy("C"))
    target[...] = np.zeros((), dtype)
    assert outside.shape == base.shape
    assert not (base != np.zeros((), dtype)).any()


# --- bytes that are no payload


@some
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda b: b"OOBPAYLD" + b)))
def test_arbitrary_bytes_are_refused(data):
    try:
        oobpickle.loads(data)
    except PayloadError:
        return
    raise AssertionError("these bytes are no payload")


_data = oobpickle.dumps({"a": np.arange(100.0), "b": [1, 2], "c": np.arange(99)[::-1]}).to_bytes()


@some
@given(st.integers(0, len(_data) - 1), st.integers(0, len(_data)), st.binary(max_size=50))
def test_a_payload_in_which_something_was_replaced_is_refused(start, n_removed, inserted):
    altered = _data[:start] + inserted + _data[start + n_removed :]
    if altered == _data:
        return
    try:
        oobpickle.loads(altered)
    except PayloadError:
        return
    raise AssertionError("these bytes are no payload")
