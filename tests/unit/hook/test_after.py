"""After the block: a large message through what was made inside it is said once."""

import gc
import multiprocessing
import warnings
import weakref
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest

import oobpickle
from kernel import needs_kernel
from oobpickle import FallbackWarning
from oobpickle._hook import after

BIG = np.arange(50_000)
SAID = r"391 KiB travelled as without oobpickle, since the enabled\(\) block"


def made_inside(**options):
    with oobpickle.enabled(**options):
        return multiprocessing.Pipe()


LEFT_AT = made_inside.__code__.co_firstlineno + 1


def send(ends, obj):
    one, other = ends
    with ThreadPool(1) as threads:
        sent = threads.apply_async(one.send, (obj,))
        received = other.recv()
        sent.get(20)
    return received


def close(ends):
    for end in ends:
        end.close()


def test_the_first_large_message_is_said_where_the_block_was_left():
    ends = made_inside()
    with pytest.warns(FallbackWarning, match=SAID) as caught:
        assert np.array_equal(send(ends, BIG), BIG)
        assert np.array_equal(send(ends, BIG), BIG)

    assert [(one.filename, one.lineno) for one in caught] == [(__file__, LEFT_AT)]
    assert not {"_send_bytes", "_recv"} & {*vars(ends[0]), *vars(ends[1])}
    close(ends)


def test_small_messages_and_bytes_are_not():
    ends = made_inside()
    with warnings.catch_warnings(record=True) as caught:
        send(ends, BIG[:100])
        ends[0].send_bytes(bytes(60_000))
        assert ends[1].recv_bytes() == bytes(60_000)
    close(ends)

    assert caught == []


def test_what_is_sent_as_bytes_is_not_however_large():
    ends = made_inside(threshold=1000)
    with warnings.catch_warnings(record=True) as caught:
        ends[0].send_bytes(bytes(60_000))
        assert ends[1].recv_bytes() == bytes(60_000)
    close(ends)

    assert caught == []


@needs_kernel("sock_diag")  # else the pair, which is older than the block, is not served
def test_nothing_is_said_within_another_block():
    ends = made_inside()
    with oobpickle.enabled(), warnings.catch_warnings(record=True) as caught:
        send(ends, BIG)
    close(ends)

    assert [one for one in caught if "travelled as without" in str(one.message)] == []


def test_uninstall_is_an_end_as_well():
    oobpickle.install()
    ends = multiprocessing.Pipe()
    oobpickle.uninstall()
    with pytest.warns(FallbackWarning, match=SAID):
        send(ends, BIG)
    close(ends)


def test_an_end_that_is_dropped_is_closed_at_once():
    ends = made_inside()
    one, other = map(weakref.ref, ends)
    gc.disable()
    del ends
    gc.enable()

    assert (one(), other()) == (None, None)


def test_what_another_library_has_put_there_stays():
    ends = multiprocessing.Pipe()
    theirs = ends[0]._send_bytes
    ends[0]._send_bytes = theirs
    after.watch(ends, 1000, ("here.py", 1))

    assert ends[0]._send_bytes is theirs
    with pytest.warns(FallbackWarning, match="391 KiB"):
        send(ends, BIG)
    assert ends[0]._send_bytes is theirs
    close(ends)


def test_what_is_sent_when_it_is_finalized_is_sent():
    one, other = made_inside()
    ours = vars(one)["_send_bytes"]
    gone = weakref.ref(set())  # as that to a connection is, when what refers to it is finalized
    ours.func(gone, *ours.args[1:], b"gone")
    received = other.recv_bytes()
    one.send_bytes(b"still there")

    assert (received, other.recv_bytes()) == (b"gone", b"still there")
    close((one, other))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_warnings_are_errors_the_thread_of_a_pool_goes_on():
    with oobpickle.enabled():
        pool = multiprocessing.get_context("fork").Pool(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [pool.apply_async(np.array, (BIG,)) for _ in range(3)]
        assert all(np.array_equal(result.get(20), BIG) for result in results)
    pool.close()
    pool.join()


def test_a_pool_of_the_block_that_returns_large_results_after_it():
    with oobpickle.enabled():
        pool = multiprocessing.get_context("fork").Pool(1)
        pool.apply(np.arange, (50_000,))
    with pytest.warns(FallbackWarning, match=SAID):
        assert pool.apply(np.arange, (50_000,)).nbytes == 400_000
    pool.close()
    pool.join()
