"""Kinds of objects besides the model of one array: what people send, and where it was slow.

What
    ``make(kind, nbytes)`` returns a `Sample` with an object of about so many bytes; ``KINDS`` names
    them all.

How it works
    A sample is what crosses, as an attribute of an instance. It has what the model has: a checksum
    that reads every byte, a digest, and a way to spoil what arrived.

Lifetime
    That of the process that sends it.

When it cannot
    The frames need pandas and pyarrow; without them their rows fail and say so.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

_ROW_NBYTES: Final = 70  # of a frame: 3 * 8 + 2 * 4 + 1 + 8 + 8 + 1 + a string of 12 and its offset


class Sample:
    """An object of one kind."""

    def __init__(self, kind: str, nbytes: int) -> None:
        self.value = KINDS[kind](nbytes)

    def checksum(self) -> int:
        """Read every byte, as fast as memory allows."""
        total = 0
        for array in _arrays(self.value):
            total ^= int(np.bitwise_xor.reduce(_words(array), axis=None))
        return total

    def digest(self) -> int:
        """Read every byte; unlike the checksum, their order counts."""
        value = zlib.crc32(type(self.value).__qualname__.encode())
        for array in _arrays(self.value):
            value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), value)
        return value

    def spoil(self) -> None:
        """Overwrite what can be overwritten."""
        if isinstance(self.value, np.ndarray):
            self.value[...] = 0


def _words(array: Any) -> Any:
    if array.dtype.itemsize == 8:
        return array.view(np.uint64)
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    n_whole = flat.nbytes // 8 * 8
    return np.append(flat[:n_whole].view(np.uint64), flat[n_whole:].astype(np.uint64))


def _arrays(value: Any) -> Iterator[Any]:
    """Yield arrays over all bytes of a sample's object."""
    if isinstance(value, np.ma.MaskedArray):
        yield from (value.data, np.ma.getmaskarray(value))
    elif isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, bytes):
        yield np.frombuffer(value, np.uint8)
    elif isinstance(value, list):
        yield np.fromiter(value, np.int64, len(value))
    else:
        for name in value:
            yield from _arrays_of_column(value[name].array)


def _arrays_of_column(column: Any) -> Iterator[Any]:
    if hasattr(column, "codes"):
        yield column.codes
    elif hasattr(column, "__arrow_array__"):
        chunks = column.__arrow_array__().chunks if hasattr(column, "_pa_array") else []
        for buffer in (buffer for chunk in chunks for buffer in chunk.buffers()):
            if buffer is not None:
                yield np.frombuffer(buffer, np.uint8)
        if not chunks:
            yield np.asarray(column.astype("i8"))
    elif column.dtype.kind == "O":  # not what it becomes as an array: times with a zone do, too
        yield np.frombuffer("".join(column).encode(), np.uint8)
    else:
        yield np.asarray(column.astype("i8") if column.dtype.kind == "M" else column)


def _words_of(nbytes: int) -> Any:
    generator = np.random.Generator(np.random.SFC64(nbytes))
    return generator.integers(0, 1 << 62, nbytes // 8, dtype=np.int64)


def _masked(nbytes: int) -> Any:
    words = _words_of(nbytes)
    return np.ma.MaskedArray(words.view(np.float64), words % 7 == 0)


def _frame(nbytes: int) -> Any:
    import pandas as pd  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import pyarrow as pa  # type: ignore[import-not-found,import-untyped,unused-ignore]

    n = nbytes // _ROW_NBYTES
    words = _words_of(8 * n)
    times = pd.DatetimeIndex(words >> 2)
    columns = {f"float {i}": np.roll(words, i).astype(np.float64) for i in range(3)}
    columns |= {f"integer {i}": (words >> i).astype(np.int32) for i in range(2)}
    columns |= {"boolean": words % 2 == 0, "time": times, "zone": times.tz_localize("UTC")}
    columns["category"] = pd.Categorical.from_codes((words % 5).astype(np.int8), list("abcde"))
    texts = pa.array(words % 10**12).cast(pa.string())
    columns["text"] = pd.array(texts, dtype="string[pyarrow]")
    return pd.DataFrame(columns)


def _objects(nbytes: int) -> Any:
    import pandas as pd

    words = _words_of(8 * (nbytes // 64))
    texts = np.array([f"{word:020}" for word in words.tolist()], object)
    return pd.DataFrame({"text": texts}, dtype=object)


KINDS: Final[dict[str, Callable[[int], Any]]] = {
    "strided": lambda nbytes: _words_of(2 * nbytes)[::2],
    "masked": _masked,
    "bytes": lambda nbytes: _words_of(nbytes).tobytes(),
    "integers": lambda nbytes: list(range(1 << 20, (1 << 20) + nbytes // 8)),
    "frame": _frame,
    "objects": _objects,
}


class Small:
    """One of very many."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = f"object {number}"
        self.weight = number / 3
