"""Numbers of bytes as people write them."""

import numpy as np
import pytest

from oobpickle._nbytes import nbytes_of


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, None),
        (0, 0),
        (4 << 30, 4 << 30),
        (4e9, 4_000_000_000),
        (np.int64(5), 5),
        ("4GB", 4_000_000_000),
        ("4 GB", 4_000_000_000),
        ("4gib", 4 << 30),
        ("1.5GiB", 3 << 29),
        ("64 KiB", 65536),
        ("64kB", 64000),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
        ("10MiB", 10 << 20),
        ("10 MB", 10**7),
        (" 12 ", 12),
        ("12B", 12),
        ("12 bytes", 12),
        ("4e9", 4_000_000_000),
        ("4_000", 4000),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_it_is_understood(written, expected):
    found = nbytes_of("capacity", written)

    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("written", "error", "says"),
    [
        ("", ValueError, "capacity is no number of bytes: ''"),
        ("4G", ValueError, "'4G'"),
        ("4 parsecs", ValueError, "'4 parsecs'"),
        ("-4GB", ValueError, "'-4GB'"),
        ("GB", ValueError, "'GB'"),
        ("1.5B", ValueError, "a whole number of bytes, not '1.5B'"),
        ("1e999", ValueError, "a whole number of bytes"),
        (float("nan"), ValueError, "a whole number of bytes, not nan"),
        (float("inf"), ValueError, "inf"),
        (1.5, ValueError, "1.5"),
        (True, TypeError, "capacity must be a number of bytes, not True"),
        (b"4GB", TypeError, "b'4GB'"),
        ([4], TypeError, r"\[4\]"),
    ],
)
def test_it_is_refused_with_an_example(written, error, says):
    with pytest.raises(error, match=says) as caught:
        nbytes_of("capacity", written)

    assert '4 << 30 or 4e9, or a string with its unit, "4GB" or "4GiB"' in str(caught.value)
