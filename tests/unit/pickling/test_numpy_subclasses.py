"""Arrays of subclasses: out of band, and as NumPy's own pickling delivers them."""

import pickle

import numpy as np
import pytest

import oobpickle
import samples
from oobpickle.testing import check_roundtrip

ARRAY = np.arange(20_000.0).reshape(40, 500)
FORTRAN = np.asfortranarray(ARRAY)
PERMUTED = np.moveaxis(ARRAY.reshape(40, 50, 10), 0, 1)
RECORDS = np.zeros(20_000, [("a", "i4"), ("b", "f8")])
RECORDS["a"] = np.arange(20_000)


class Bare(np.ndarray):
    """Leaves everything to ndarray."""


class Finalized(np.ndarray):
    """Sees how it is made."""

    def __array_finalize__(self, obj):
        self.unit = getattr(obj, "unit", None)
        self.made_of = self.shape, self.dtype, type(obj)


class Restored(np.ndarray):
    """Sees its state."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self.seen = [type(item) for item in state]


class Named(np.ma.MaskedArray):
    """Leaves everything to MaskedArray."""


class Stated(np.ma.MaskedArray):
    """A state of its own."""

    def __getstate__(self):
        return (*super().__getstate__(), "more")

    def __setstate__(self, state):
        super().__setstate__(state[:-1])
        self.more = state[-1]


def with_unit(array, unit):
    array.unit = unit
    return array


def hard():
    return np.ma.MaskedArray(ARRAY, ARRAY < 4, fill_value=3.5, hard_mask=True)


#: By name: the array, and the sizes of its buffers, bytes.
OUT_OF_BAND = {
    "bare": (ARRAY.view(Bare), [160_000]),
    "bare, read-only": (samples._read_only(ARRAY.copy().view(Bare)), [160_000]),
    "bare, Fortran": (FORTRAN.view(Bare), [160_000]),
    "bare, strided": (ARRAY.view(Bare)[::2, ::-1], [80_000]),
    "bare, broadcast": (np.broadcast_to(ARRAY[0], (40, 500), subok=True).view(Bare), [160_000]),
    "bare, dates": (ARRAY.view("M8[s]").view(Bare), [160_000]),
    "finalized": (with_unit(ARRAY.view(Finalized), "metre"), [160_000]),
    "finalized, Fortran": (FORTRAN.view(Finalized), [160_000]),
    "restored": (ARRAY.view(Restored), [160_000]),
    "matrix": (ARRAY.view(np.matrix), [160_000]),
    "recarray": (np.rec.array(RECORDS), [240_000]),
    "masked": (np.ma.masked_less(ARRAY, 7), [160_000, 20_000]),
    "masked, no mask": (np.ma.array(ARRAY), [160_000, 20_000]),
    "masked, hard": (hard(), [160_000, 20_000]),
    "masked, Fortran": (np.ma.masked_less(FORTRAN, 7), [160_000, 20_000]),
    "masked, Fortran, mask in C": (np.ma.array(FORTRAN, mask=ARRAY < 5), [160_000, 20_000]),
    "masked, strided": (np.ma.masked_less(ARRAY, 7)[::2], [80_000, 10_000]),
    "masked, records": (np.ma.array(RECORDS, mask=[(1, 0)] * 20_000), [240_000, 40_000]),
    "masked matrix": (np.ma.masked_less(ARRAY.view(np.matrix), 7), [160_000, 20_000]),
    "masked subclass": (Named(ARRAY, ARRAY < 7), [160_000, 20_000]),
    "masked, default fill of another dtype": (
        np.ma.array(ARRAY.astype(np.float32), mask=ARRAY < 4),
        [80_000, 20_000],
    ),
    "masked, default fill out of range": (
        np.ma.array(np.tile(ARRAY, 2).astype(np.int16), mask=np.tile(ARRAY, 2) < 4),
        [80_000, 40_000],
    ),
    "masked, one long text": (np.ma.array(np.array("x" * 40_000)), [160_000, 1]),
    "masked dates": (np.ma.array(ARRAY.view("M8[s]"), mask=ARRAY < 4), [160_000, 20_000]),
}
#: What NumPy makes of these cannot be made of a buffer, or is the class's own business.
IN_STREAM = {
    "own reducer": with_unit(ARRAY.view(samples.Matrix), "metre"),
    "own masked state": Stated(ARRAY, ARRAY < 7),
    "axes in another order": PERMUTED.view(Bare),
    "masked, axes in another order": np.ma.masked_less(PERMUTED, 7),
    "big-endian": ARRAY.astype(">f8").view(Bare),
    "plain records in a recarray": RECORDS.view(np.recarray).view(RECORDS.dtype, np.recarray),
    "small": ARRAY[:4].view(Bare),
    "objects": ARRAY.astype(object).view(Bare),
    "masked constant": np.ma.masked,
}


@pytest.mark.parametrize("name", OUT_OF_BAND)
def test_it_travels_out_of_band_and_arrives_as_with_pickle(name):
    array, sizes = OUT_OF_BAND[name]
    payload = oobpickle.dumps(array)

    assert sizes == payload.sizes
    assert len(payload.stream) < 600
    assert b"oobpickle" not in payload.stream
    check_roundtrip(array)


@pytest.mark.parametrize("name", IN_STREAM)
def test_what_is_left_to_numpy_arrives_as_with_pickle(name):
    check_roundtrip(IN_STREAM[name])


def test_its_memory_is_sent_uncopied():
    arrays = [ARRAY.view(Bare), ARRAY.copy().view(Finalized), np.ma.masked_less(ARRAY + 1, 7)]
    memory = [arrays[0], arrays[1], arrays[2].data, arrays[2].mask]

    addresses = [samples.address_of(buffer) for buffer in oobpickle.dumps(arrays).buffers]
    assert [array.ctypes.data for array in memory] == addresses


def test_where_no_code_of_the_user_looks_the_array_is_the_buffer():
    for array in (ARRAY.view(Bare), np.ma.masked_less(ARRAY, 7), ARRAY.view(np.matrix)):
        payload = oobpickle.dumps(array)
        memory = [bytearray(nbytes) for nbytes in payload.sizes]
        payload.write_into(memory)
        arrived = oobpickle.loads(payload, buffers=memory)

        assert samples.address_of(memory[0]) == arrived.ctypes.data
        assert arrived.flags.writeable


def test_a_memmap_arrives_without_its_file(tmp_path):
    mapped = np.memmap(tmp_path / "mapped", "f8", "w+", shape=ARRAY.shape)
    mapped[:] = ARRAY
    check_roundtrip(mapped)
    payload = oobpickle.dumps([mapped, mapped.T])
    arrived = oobpickle.loads(payload)

    assert payload.sizes == [160_000, 160_000]
    assert (type(arrived[0]), arrived[0].filename) == (np.memmap, None)


def test_a_mask_that_two_arrays_share_is_not_shared_by_what_arrives_if_pickle_would_not():
    mask = ARRAY < 7
    check_roundtrip([np.ma.MaskedArray(ARRAY, mask), np.ma.MaskedArray(ARRAY + 1, mask)])
    one = np.ma.MaskedArray(ARRAY, mask)
    check_roundtrip([one, one])


def test_below_the_threshold_it_is_numpys_own_pickle():
    from oobpickle._pickling.serializer import serialize

    for array in (ARRAY.view(Bare), ARRAY.view(Finalized), np.ma.masked_less(ARRAY, 7)):
        payload = serialize(array, 1 << 20)

        assert payload.sizes == []
        assert pickle.dumps(array, 5) == payload.stream
