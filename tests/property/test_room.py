"""Objects of any sizes in an arena that has any room left: what arrives is what was sent."""

import contextlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oobpickle
from exploring import examples
from internals import inner
from messages import envelope_of
from oobpickle import ArenaFullError

MIB = 1 << 20

#: Where buffers begin to share a block, have one of their own, or are copied in another way.
_EDGES = [64, 4 << 10, 32 << 10, 64 << 10, MIB, 4 * MIB, 8 * MIB, 20 * MIB]
_sizes = st.lists(
    st.sampled_from(_EDGES).flatmap(lambda edge: st.integers(max(1, edge - 66), edge + 66)),
    min_size=1,
    max_size=6,
)


def _arrays(sizes, first):
    return [np.full(nbytes, first + i, np.uint8) for i, nbytes in enumerate(sizes)]


def _assert_same(sent, arrived):
    assert len(sent) == len(arrived)
    for one, other in zip(sent, arrived, strict=True):
        np.testing.assert_array_equal(one, other)


def _sent(obj, arena):
    envelope = envelope_of(obj, inner(arena))
    envelope.lease.settle()
    _assert_same(obj, pickle.loads(envelope))


def _broadcast(obj, _):
    with oobpickle.broadcast(obj) as handle:
        _assert_same(obj, handle.value)


def _shared(obj, _):
    with oobpickle.share(obj) as handle, handle.reading() as found:
        _assert_same(obj, found)


@pytest.mark.filterwarnings("ignore::oobpickle.FallbackWarning")
@pytest.mark.filterwarnings("ignore::oobpickle.RepeatedWarning")
@given(
    capacity=st.sampled_from([4, 16, 40, 64]),
    free=st.integers(0, 64 * MIB),
    held=st.lists(st.integers(1, 24 * MIB), max_size=2),
    objects=st.lists(
        st.tuples(st.sampled_from([_sent, _broadcast, _shared]), _sizes), min_size=1, max_size=3
    ),
)
@examples(40)
def test_what_arrives_is_what_was_sent_whatever_room_there_is(capacity, free, held, objects):
    with oobpickle.enabled(capacity=f"{capacity} MiB", wait_timeout=0) as arena:
        # Blocks that are in use, and free ones that have their pages.
        keep = []
        for nbytes in [free, *held]:
            with contextlib.suppress(ArenaFullError):
                keep.append(inner(arena).acquire([nbytes]))
        del keep[:1]
        for n, (send, sizes) in enumerate(objects):
            with contextlib.suppress(ArenaFullError):
                send(_arrays(sizes, 10 * n + 1), arena)
        keep.clear()
