"""Blocks, pools, executors and queues that end in every order, with work and mail left over."""

import gc
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import inside
from inside import eventually, message, verify

import oobpickle
from internals import inner
from oobpickle._hook import connections

MIB = 1 << 20
N_TASKS = 12


def _twice(received):
    verify(received)
    return message(received[0] + 1000, 2 * received[1].nbytes)


def _slowly(received):
    time.sleep(0.01)
    return _twice(received)


def _tasks(n=N_TASKS):
    return [message(seed, 400_000) for seed in range(n)]


def _verify_all(results, n=N_TASKS):
    found = [verify(one)[0] for one in results]
    assert found == list(range(1000, 1000 + n)), found


def _in_flight(arena):
    return arena.statistics().n_blocks["in_flight"]


def _assert_nothing_is_left(arena):
    """After the block: no page, and the next block takes the arena away."""

    def is_gone():
        gc.collect()
        with oobpickle.enabled():
            pass
        return inner(arena).blocks.ended and not inside.our_descriptors()

    eventually(is_gone)
    assert arena.statistics().nbytes_resident == 0, arena.statistics()


def _n_descriptors(_=0):
    return len(inside.our_descriptors())


def many_blocks_beside_a_pool_that_is_older():
    """Neither side waits for the other to leave: nothing of the ended arenas stays in either."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(int) == 0
        found = []
        for seed in range(12):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", oobpickle.FallbackWarning)
                with oobpickle.enabled(capacity=256 * MIB) as arena:
                    for n in range(3):
                        verify(pool.apply(_twice, (message(seed + n, 400_000),)))
                    assert arena.statistics().n_messages_out_of_band >= 3
            eventually(lambda: pool.apply(_n_descriptors) == 0)  # it sees the end when it sends
            found.append(_n_descriptors())
        # Of the last one, if a message was still on its way: until the next block.
        assert max(found) <= 4, found
        pool.close()
        pool.join()


def block_left_while_workers_run():
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        pool = context.Pool(2)
        results = pool.map_async(_slowly, _tasks(), chunksize=1)
        eventually(lambda: arena.statistics().n_messages_out_of_band > 4)
    assert not results.ready()
    warnings.simplefilter("ignore", oobpickle.FallbackWarning)  # of the first large message now
    _verify_all(results.get(30))
    _verify_all(pool.map(_twice, _tasks()))  # in-band, as without a block
    pool.close()
    pool.join()
    del results, pool
    _assert_nothing_is_left(arena)


def block_left_while_a_message_is_about_to_take_room():
    """It is neither lost nor warned of: the sender has looked, then the owner closes the arena."""
    context = multiprocessing.get_context("fork")
    looked = context.Event()
    send_through = connections._send_through

    def after_the_owner_has_closed(hook, *args):
        looked.set()
        eventually(lambda: hook.arena.closed)
        return send_through(hook, *args)

    def send(end):
        connections._send_through = after_the_owner_has_closed
        end.send(message(7))

    with oobpickle.enabled(capacity=256 * MIB) as arena:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=send, args=(sender,))
        worker.start()
        assert looked.wait(30)
    verify(receiver.recv(), 7)
    worker.join()
    worker.close()
    assert not arena.statistics().fallbacks, arena.statistics()
    assert arena.statistics().n_messages_out_of_band == 0, arena.statistics()
    _assert_nothing_is_left(arena)


def block_left_while_results_are_unread():
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        tasks, results = context.SimpleQueue(), context.SimpleQueue()
        worker = context.Process(target=_serve, args=(tasks, results))
        worker.start()
        for one in _tasks():
            tasks.put(one)
        tasks.put(None)
        worker.join()
        assert _in_flight(arena) == N_TASKS, arena.statistics()
    _verify_all(results.get() for _ in range(N_TASKS))
    worker.close()
    del tasks, results
    _assert_nothing_is_left(arena)


def _serve(tasks, results):
    while (task := tasks.get()) is not None:
        results.put(_twice(task))


def block_left_while_arrays_are_alive():
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled(capacity=256 * MIB) as arena, context.Pool(2) as pool:
        held = pool.map(_twice, _tasks(), chunksize=1)
        pool.close()
        pool.join()
    del pool
    assert all(inside.is_in_arena(arena, one[1]) for one in held)
    with oobpickle.enabled(capacity=64 * MIB), context.Pool(1) as pool:
        assert verify(pool.apply(_twice, (message(1),)))[0] == 1001
    del pool
    _verify_all(held)
    for one in held:
        one[1][:] = 1
    del held, one
    _assert_nothing_is_left(arena)


def pool_closed_and_joined_with_results_unread():
    arena = oobpickle.install(capacity=256 * MIB)
    pool = multiprocessing.get_context("fork").Pool(2)
    results = pool.imap(_twice, _tasks())
    pool.close()
    pool.join()
    _verify_all(results)
    results = None
    del pool
    assert arena.statistics().n_fallbacks == 0
    inside.assert_empty(arena)


def pool_closed_and_joined_with_results_dropped():
    arena = oobpickle.install(capacity=256 * MIB)
    pool = multiprocessing.get_context("fork").Pool(2)
    for one in _tasks():
        pool.apply_async(_twice, (one,))
    pool.close()
    pool.join()
    del pool
    assert arena.statistics().n_messages_out_of_band == 2 * N_TASKS, arena.statistics()
    inside.assert_empty(arena)


def imap_abandoned():
    """Its results are loaded and dropped; the pool goes on."""
    arena = oobpickle.install(capacity=256 * MIB)
    pool = multiprocessing.get_context("fork").Pool(2)
    for _ in range(5):
        results = pool.imap(_twice, _tasks())
        verify(next(results), 1000)
        del results
    _verify_all(pool.map(_twice, _tasks()))
    pool.close()
    pool.join()
    del pool
    assert arena.statistics().n_fallbacks == 0
    inside.assert_empty(arena)


def executor_shut_down_with_futures_cancelled():
    arena = oobpickle.install(capacity=256 * MIB)
    executor = ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
    futures = [executor.submit(_slowly, one) for one in _tasks(40)]
    verify(futures[0].result(), 1000)
    executor.shutdown(cancel_futures=True)
    assert any(future.cancelled() for future in futures)
    done = [future.result() for future in futures if not future.cancelled()]
    _verify_all(done, len(done))
    del executor, futures, done
    inside.assert_empty(arena)


def queues_dropped_full():
    """With its feeder at work, and with readers that have taken a part."""
    arena = oobpickle.install(capacity=256 * MIB)
    context = multiprocessing.get_context("fork")
    for wait in (True, False):
        queue = context.Queue()
        for one in _tasks():
            queue.put(one)
        verify(queue.get(timeout=20), 0)
        eventually(lambda: _in_flight(arena) >= 4)
        queue.close()
        if wait:
            queue.join_thread()
        else:
            queue.cancel_join_thread()
            eventually(lambda feeder=queue._thread: not feeder.is_alive())
        del queue
    inside.assert_empty(arena)
    assert arena.statistics().n_reclaimed >= N_TASKS, arena.statistics()


if __name__ == "__main__":
    inside.main()
