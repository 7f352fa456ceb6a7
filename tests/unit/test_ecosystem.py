"""Objects of the libraries that people send, as their own pickling delivers them, out of band."""

import re
import warnings
from functools import partial

import numpy as np
import pytest

import oobpickle
from oobpickle.testing import Way, check_roundtrip, differences

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
sparse = pytest.importorskip("scipy.sparse")
ensemble = pytest.importorskip("sklearn.ensemble")
neighbors = pytest.importorskip("sklearn.neighbors")
xr = pytest.importorskip("xarray")
pl = pytest.importorskip("polars")
image = pytest.importorskip("PIL.Image")

N = 12_000
NUMBERS = np.arange(N, dtype="f8")
WORDS = [f"word {i}" for i in range(N)]


def frame():
    columns = {
        "float": NUMBERS,
        "integer": np.arange(N, dtype="i4"),
        "boolean": np.arange(N) % 2 == 0,
        "time": pd.date_range("2020", periods=N, freq="s"),
        "time with zone": pd.date_range("2020", periods=N, freq="s", tz="Europe/Berlin"),
        "category": pd.Categorical.from_codes(np.arange(N) % 3, ["a", "b", "c"], ordered=True),
        "arrow": pd.array(WORDS, dtype="string[pyarrow]"),
        "object": np.array(WORDS, object),
        "nullable": pd.array([*range(N - 1), None], dtype="Int64"),
    }
    return pd.DataFrame(columns)


def table():
    return pa.table({"number": NUMBERS, "word": WORDS, "list": [[i, i] for i in range(N)]})


def matrix():
    return sparse.random(150, 150, 0.2, format="csr", random_state=0)


def samples():
    found = np.random.default_rng(0).random((600, 8))
    return found, (found[:, 0] > 0.5) + (found[:, 1] > 0.3)


def dataset():
    coordinates = {"x": np.arange(120), "y": np.arange(100.0)}
    return xr.Dataset({"v": (("x", "y"), NUMBERS.reshape(120, 100))}, coordinates)


def words():
    return pl.DataFrame({"number": NUMBERS, "word": WORDS})


MAKERS = {
    "frame": frame,
    "frame, rows": lambda: frame()[1000:9_000],
    "frame, every second row": lambda: frame().iloc[::2],
    "frame, indexed": lambda: frame().set_index("time with zone")[["float", "arrow"]],
    "series": lambda: pd.Series(NUMBERS, name="numbers"),
    "arrow integers": lambda: pd.Series(range(N), dtype="int64[pyarrow]"),
    "times with zone": lambda: pd.date_range("2020", periods=N, freq="s", tz="UTC"),
    "intervals": lambda: pd.interval_range(0, N),
    "periods": lambda: pd.period_range("2020", periods=N, freq="s"),
    "several levels": lambda: pd.MultiIndex.from_product([range(120), range(100)]),
    "sparse pandas": lambda: pd.arrays.SparseArray(np.arange(N) % 2),
    "table": table,
    "table, rows": lambda: table()[100:9_000],
    "record batch": lambda: table().to_batches()[0],
    "arrow array, part": lambda: table()["number"].chunk(0)[10:9_000],
    "arrow buffer": lambda: pa.py_buffer(NUMBERS),
    **{
        f"sparse {form}": lambda form=form: matrix().asformat(form)
        for form in ("csr", "csc", "coo", "bsr", "dia", "lil")
    },
    "sparse dok": lambda: matrix()[:60].asformat("dok"),  # slow to build and to compare
    "sparse array": lambda: sparse.csr_array(matrix()),
    "forest": lambda: ensemble.RandomForestClassifier(5, random_state=0).fit(*samples()),
    "neighbors, tree": lambda: neighbors.KNeighborsClassifier(algorithm="kd_tree").fit(*samples()),
    "neighbors": lambda: neighbors.KNeighborsClassifier(algorithm="brute").fit(*samples()),
    "dataset": dataset,
    "dataset, part": lambda: dataset().isel(x=slice(0, 120, 3)),
    "data array": lambda: dataset()["v"],
    "polars frame": words,
    "polars frame, rows": lambda: words()[100:9_000],
    "polars series": lambda: words()["number"],
    "image": lambda: image.fromarray(NUMBERS.astype("u1").reshape(120, 100)),
}
#: What hands its content over as ``bytes`` and the like, which stay in the stream: it goes out of
#: band as a whole. Else nearly all bytes are buffers.
IN_STREAM = {"sparse lil", "sparse dok", "polars frame", "polars frame, rows", "polars series"}
IN_STREAM |= {"image"}


@pytest.mark.parametrize("name", MAKERS)
def test_it_arrives_as_its_own_pickling_delivers_it(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a format is inefficient
        obj = MAKERS[name]()
    payload = oobpickle.dumps(obj)

    assert name in IN_STREAM or payload.stream_nbytes < payload.nbytes / 5 + 3000
    check_roundtrip(obj)


MODES = (None, "r", "c", "r+")
WRITABLE = re.compile(r"writeable|writable|read-only")


@pytest.mark.parametrize("name", MAKERS)
def test_it_comes_out_of_a_file_as_its_own_pickling_delivers_it(name, tmp_path):
    found = []
    for mode in MODES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a format is inefficient
            obj = MAKERS[name]()
        oobpickle.dumps(obj)  # the first time that of xarray changes what it pickles
        way = Way(partial(_dumped, tmp_path / "file"), partial(oobpickle.load, mmap_mode=mode))
        found += differences(obj, {str(mode): way})

    assert [text for text in found if not WRITABLE.search(text)] == []


def _dumped(path, obj):
    oobpickle.dump(obj, path)
    return path


def test_rows_of_a_frame_carry_only_themselves():

    assert oobpickle.dumps(frame()[:200]).nbytes < oobpickle.dumps(frame()).nbytes / 20


PARTS = {
    "integers": lambda: pa.array(range(N)),
    "integers, some missing": lambda: pa.array([None, *range(1, N)]),
    "strings": lambda: pa.array(WORDS),
    "string views": lambda: pa.array(WORDS, pa.string_view()),
    "lists": lambda: pa.array([[i, i] for i in range(N)]),
    "maps": lambda: pa.array([[("a", i)] for i in range(N)], pa.map_(pa.string(), pa.int64())),
    "structures": lambda: pa.array([{"a": i, "b": "x"} for i in range(N)]),
    "fixed size": lambda: pa.array([b"0123"] * N, pa.binary(4)),
    "dictionary": lambda: pa.array(WORDS).dictionary_encode(),
    "extension": lambda: pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([b"0123456789abcdef"] * N, pa.binary(16))
    ),
    "chunks": lambda: pa.chunked_array([pa.array(WORDS), pa.array(WORDS)]),
    "record batch": lambda: table().to_batches()[0],
    "table": table,
}


@pytest.mark.parametrize("name", PARTS)
def test_a_slice_of_arrow_memory_carries_only_itself(name):
    part = PARTS[name]()[5_000:5_010]
    payload = oobpickle.dumps(part)

    values = part.dictionary.nbytes if name == "dictionary" else 0
    assert payload.nbytes - values < 3_000
    assert oobpickle.loads(payload).equals(part)
    oobpickle.loads(payload).validate(full=True)
    check_roundtrip(part)


def test_arrow_memory_that_is_referred_to_as_a_whole_is_sent_as_it_is():
    array = pa.array(range(N))
    (source,) = oobpickle.dumps(array).buffers

    assert pa.py_buffer(source).address == array.buffers()[1].address


def test_a_slice_that_the_format_of_arrow_refuses_is_sent_as_pyarrow_does():
    kind = pa.struct([("word", pa.dictionary(pa.int32(), pa.string()))])
    part = pa.array([{"word": "x"}] * N, kind)[:5]

    assert oobpickle.loads(oobpickle.dumps(part)).equals(part)


def test_a_slice_of_an_invalid_array_is_sent_as_pyarrow_does():
    indices, values = pa.array([7] * N), pa.array(["a", "b"])
    part = pa.DictionaryArray.from_arrays(indices, values, safe=False)[:5]

    assert oobpickle.loads(oobpickle.dumps(part)).indices.equals(part.indices)


def test_the_source_names_none_of_these_libraries():
    from pathlib import Path

    names = ("pandas", "scipy", "sklearn", "xarray", "polars", "PIL", "torch")
    for path in Path(oobpickle.__file__).parent.rglob("*.py"):
        code = [line for line in path.read_text().splitlines() if "import" in line]

        assert not [line for line in code if any(name in line for name in names)]
