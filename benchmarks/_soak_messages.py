"""What the soak sends: objects of all kinds and sizes that know their own checksum.

What
    ``Parcel(seed)`` makes an object whose kind, size and content only that seed makes, with a
    digest of all its bytes, types and shapes. A `Shelf` holds what has arrived, as a program does.

How it works
    The digest is a CRC over everything, in order; of arrays that occur twice it counts which one it
    is. What is kept on a shelf is verified when it is dropped, and now and then overwritten: nobody
    else may see that, and nobody else's writes may be seen here.

Lifetime
    Of the process that holds it.

When it cannot
    Without pandas no frames are sent.
"""

from __future__ import annotations

import array
import contextlib
import functools
import os
import zlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.random import SFC64, Generator
from numpy.typing import NDArray

with contextlib.suppress(ImportError):
    import pandas  # type: ignore[import-untyped]

    # Strings without pyarrow: its locks do not survive a fork in a process with threads.
    pandas.set_option("future.infer_string", False)

#: Set in all processes of a run without oobpickle: plain pickling loses the order of bytes.
PLAIN_VARIABLE: Final = "OOBPICKLE_SOAK_PLAIN"
LARGEST_NBYTES: Final = 50 << 20
_BASE_WORDS: Final = 1_048_583  # prime: no two pages of a message are alike
_FRAME_NBYTES: Final = 8 << 20  # columns of strings are slow to make
_OBJECTS: Final = 5_000


class MismatchError(Exception):
    """What is there is not what was sent."""


@functools.cache
def _base() -> NDArray[np.uint64]:
    return Generator(SFC64(1)).integers(0, 1 << 64, _BASE_WORDS, dtype=np.uint64)


def _words(seed: int, nbytes: int) -> NDArray[np.uint64]:
    """Return random words that only this seed makes: at least 1, and at least `nbytes` bytes."""
    n_words, base = max(1, -(-nbytes // 8)), _base()
    found = np.empty(n_words, np.uint64)
    key = np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    at, start = 0, seed % _BASE_WORDS
    while at < n_words:
        step = min(_BASE_WORDS - start, n_words - at)
        np.bitwise_xor(base[start : start + step], key, out=found[at : at + step])
        at, start = at + step, 0
    return found


# --- kinds


def _octets(seed: int, nbytes: int) -> Any:
    return _words(seed, nbytes).view(np.uint8)[:nbytes]


def _matrix(seed: int, nbytes: int) -> Any:
    words = _words(seed, max(64, nbytes))
    return words[: len(words) // 8 * 8].reshape(-1, 8).view(np.float64)


def _fortran(seed: int, nbytes: int) -> Any:
    return np.asfortranarray(_matrix(seed, nbytes))


def _strided(seed: int, nbytes: int) -> Any:
    return _words(seed, 2 * nbytes)[::2]


def _swapped(seed: int, nbytes: int) -> Any:
    return _words(seed, nbytes).view(">i4")


def _structured(seed: int, nbytes: int) -> Any:
    fields = np.dtype([("count", "i8"), ("weight", "f4"), ("flags", "u1", 4)])
    return _words(seed, max(16, nbytes // 16 * 16)).view(fields)


def _dates(seed: int, nbytes: int) -> Any:
    return (_words(seed, nbytes) >> np.uint64(24)).astype("datetime64[ms]")


def _read_only(seed: int, nbytes: int) -> Any:
    found = _words(seed, nbytes).view(np.complex64)
    found.flags.writeable = False
    return found


def _masked(seed: int, nbytes: int) -> Any:
    data = _octets(seed, nbytes)
    return np.ma.MaskedArray(data, mask=data > 99, fill_value=7)


def _objects(seed: int, nbytes: int) -> Any:
    n_objects = min(_OBJECTS, 3 + nbytes // 100)
    found = np.empty(n_objects, object)
    words = _words(seed, nbytes)
    found[:] = [(int(word), f"{word:x}") for word in np.resize(words, n_objects)]
    found[0] = words
    found[1] = words[:7]
    return found


def _nested(seed: int, nbytes: int) -> Any:
    arrays = [_words(seed + n, nbytes // 8) for n in range(4)]
    small = [_octets(seed + n, 3 * n) for n in range(40)]
    return {
        "arrays": arrays,
        "again": arrays[2],
        "view": arrays[0][1:],
        "bytes": (_bytes(seed, nbytes // 4), bytearray(_bytes(seed + 1, nbytes // 8))),
        "small": small,
        "text": ["€" * (seed % 1000), None, 2.5, True, {"k": (1, -2)}],
        "zero": (np.float32(2.5), np.array(seed), np.empty((0, 3)), np.array(["a", "bcd"])),
    }


def _bytes(seed: int, nbytes: int) -> Any:
    return _octets(seed, nbytes).tobytes()


def _typed(seed: int, nbytes: int) -> Any:
    return array.array("Q", _words(seed, nbytes).tobytes())


def _text(seed: int, nbytes: int) -> Any:
    return _bytes(seed, nbytes).decode("latin-1")


def _frame(seed: int, nbytes: int) -> Any:
    words = _words(seed, min(nbytes, _FRAME_NBYTES) // 4)
    columns = {
        "id": words.view(np.int64),
        "value": words.astype(np.float64),
        "when": (words >> np.uint64(20)).astype("datetime64[us]"),
        "kind": pandas.Categorical.from_codes((words % np.uint64(3)).astype(np.int8), list("abc")),
        "name": np.resize(np.array(["x", "yy", "zzz"], object), len(words)),
    }
    return pandas.DataFrame(columns)


KINDS: Final[dict[str, Callable[[int, int], Any]]] = {
    "octets": _octets,
    "words": _words,
    "matrix": _matrix,
    "fortran": _fortran,
    "strided": _strided,
    "swapped": _swapped,
    "structured": _structured,
    "dates": _dates,
    "read-only": _read_only,
    "masked": _masked,
    "objects": _objects,
    "nested": _nested,
    "bytes": _bytes,
    "typed": _typed,
    "text": _text,
}
if "pandas" in globals():
    KINDS["frame"] = _frame
if PLAIN_VARIABLE in os.environ:
    del KINDS["swapped"]


# --- checksums


class _Digest:
    """A CRC over all bytes of an object, its types, shapes, and which arrays are one."""

    def __init__(self, value: Any) -> None:
        self.crc = self.nbytes = 0
        self._seen: dict[int, tuple[int, object]] = {}  # kept, so that no id is given twice
        self._feed(value)

    def _say(self, *words: object) -> None:
        self.crc = zlib.crc32(repr(words).encode(), self.crc)

    def _add(self, data: Any) -> None:
        self.nbytes += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def _feed(self, value: Any) -> None:
        self._say(type(value).__name__)
        if isinstance(value, np.ma.MaskedArray):
            self._say(value.fill_value)
            self._array(value.data)
            self._array(np.ma.getmaskarray(value))
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, (bytes, bytearray)):
            self._add(value)
        elif isinstance(value, str):
            self._add(value.encode())
        elif isinstance(value, array.array):
            self._add(memoryview(value).cast("B"))
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._feed(item)
        elif isinstance(value, dict):
            for key in value:
                self._say(key)
                self._feed(value[key])
        elif hasattr(value, "to_numpy"):
            self._frame(value)
        else:
            self._say(value)

    def _array(self, value: NDArray[Any]) -> None:
        self._say(value.dtype.descr if value.dtype.names else value.dtype.str, value.shape)
        self._say(self._seen.setdefault(id(value), (len(self._seen), value))[0])
        if value.dtype.hasobject:
            for item in value.tolist():
                self._feed(item)
        elif value.size:
            # In memory order, so that the digest sees whether that is kept.
            flat = value.T if value.flags.f_contiguous else np.ascontiguousarray(value)
            self._add(flat.reshape(-1).view(np.uint8))

    def _frame(self, value: Any) -> None:
        for name in value:
            self._say(name, str(value[name].dtype))
            self._array(value[name].to_numpy())


def _digest(value: Any) -> tuple[int, int]:
    found = _Digest(value)
    return found.crc, found.nbytes


class Parcel:
    """An object and what it should be.

    Attributes
    ----------
    seed : int
        What made it.
    kind : str
        One of `KINDS`.
    value : object
        What is sent.
    digest : (int, int) or None
        CRC and nbytes; ``None`` while somebody writes into it.
    """

    def __init__(self, seed: int) -> None:
        chance = Generator(SFC64(seed))
        self.seed = seed
        self.kind = list(KINDS)[int(chance.integers(len(KINDS)))]
        nbytes = int(np.exp(chance.uniform(0, np.log(LARGEST_NBYTES))))
        self.value = KINDS[self.kind](seed, nbytes)
        self.digest: tuple[int, int] | None = _digest(self.value)

    @property
    def nbytes(self) -> int:
        return self.digest[1] if self.digest else 0

    def verify(self) -> Parcel:
        """Raise `MismatchError` unless it is whole."""
        expected = self.digest
        found = _digest(self.value)
        if expected is not None and found != expected:
            raise MismatchError(
                f"{self.kind} of seed {self.seed}: (crc, nbytes) {found}, expected {expected}"
            )
        return self

    def overwrite(self) -> None:
        """Write into it, if it is an array of numbers."""
        if type(self.value) is np.ndarray and not self.value.dtype.hasobject:
            if not self.value.flags.writeable:
                raise MismatchError(f"{self.kind} of seed {self.seed} arrived read-only")
            self.digest = None  # whoever forks meanwhile does not look at it
            self.value[...] = np.zeros((), self.value.dtype)
            self.digest = _digest(self.value)


class Shelf:
    """What a process holds of what it has received, up to so many parcels."""

    def __init__(self, most: int) -> None:
        self.parcels: list[Parcel] = []
        self._most = most

    def put(self, parcel: Parcel, chance: Generator) -> None:
        """Keep a parcel; drop some, verified once more; write into others."""
        self.parcels.append(parcel)
        while len(self.parcels) > self._most:
            self.parcels.pop(int(chance.integers(len(self.parcels)))).verify()
        if chance.random() < 0.2:
            self.parcels[int(chance.integers(len(self.parcels)))].overwrite()

    def drop(self, parcel: Parcel) -> None:
        """Keep this one no longer, if it is still here."""
        self.parcels = [other for other in self.parcels if other is not parcel]

    def clear(self) -> None:
        """Verify and drop everything."""
        while self.parcels:
            self.parcels.pop().verify()
