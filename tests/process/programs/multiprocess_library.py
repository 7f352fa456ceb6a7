"""multiprocess, dill's copy of multiprocessing, inside a block: unchanged programs."""

import asyncio
import os
import pickle
import signal
import sys
import warnings

import inside
import multiprocess
import numpy as np
from inside import Fitted, eventually, message, verify

import oobpickle

MIB = 1 << 20
N = 4
NBYTES = 800_000
FACTOR = 3


def _enabled():
    return oobpickle.enabled(capacity=64 * MIB)


def _models(n=N):
    return [Fitted(seed, NBYTES) for seed in range(n)]


def _check(models, n=N):
    assert [model.seed for model in models] == list(range(n))
    for model in models:
        verify((model.seed, model.counts.view(np.uint8)))
        assert model.counts.flags.writeable
        model.counts[:] = 0


def _is_out_of_band(arena, n):
    statistics = arena.statistics()
    assert statistics.n_messages_out_of_band == n, statistics
    assert statistics.n_fallbacks == 0, statistics


def pools(method):
    """Whole models both ways, by functions that only dill can pickle."""
    context = multiprocess.get_context(method)
    with _enabled() as arena:
        with context.Pool(2) as pool:
            seeds = {}
            _check(pool.map(lambda model: seeds.setdefault(model.seed, model), _models(), 1))
            _check(list(pool.imap(lambda seed: Fitted(seed, NBYTES), range(N))))
            _check([pool.apply_async(lambda m: m, (model,)).get(60) for model in _models()])
            assert pool.map(lambda n: n + 1, range(3)) == [1, 2, 3]
            pool.close()
            pool.join()
        _is_out_of_band(arena, 5 * N)
        inside.assert_empty(arena)


def _relay(queue, simple, here):
    for _ in range(N):
        simple.put(queue.get())
        here.send(here.recv())
    simple.put([queue.get(), lambda: None])


def queues_and_pipes(method):
    context = multiprocess.get_context(method)
    with _enabled() as arena:
        queue, simple, (here, there) = context.Queue(), context.SimpleQueue(), context.Pipe()
        process = context.Process(target=_relay, args=(queue, simple, there))
        process.start()
        for seed in range(N):
            queue.put(message(seed))
            verify(simple.get(), seed)
            here.send(message(seed))
            verify(here.recv(), seed)
        _is_out_of_band(arena, 4 * N)
        queue.put(7)
        assert simple.get()[0] == 7
        process.join(60)
        assert process.exitcode == 0
        queue.close()
        queue.join_thread()
        _is_out_of_band(arena, 4 * N)
        inside.assert_empty(arena)


def arguments_and_managers(method):
    """Arguments of a process go in-band, as they did; a manager is a process of the block."""
    context = multiprocess.get_context(method)
    with _enabled() as arena:
        with context.Manager() as manager:
            shared = manager.list()
            process = context.Process(target=lambda one: shared.append(one), args=(message(1),))
            process.start()
            process.join(60)
            assert process.exitcode == 0
            verify(shared[0], 1)
        _is_out_of_band(arena, 2)
        inside.assert_empty(arena)


def older_than_the_block(method):
    """The first messages travel in-band, and ask the workers to join."""
    context = multiprocess.get_context(method)
    with context.Pool(1) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        _check(pool.map(lambda model: model, _models(), 1))
        with _enabled() as arena:
            _check(pool.map(lambda model: model, _models(), 1))
            _check(pool.map(lambda model: model, _models(), 1))
            n = arena.statistics().n_messages_out_of_band
            assert n >= 2 * N, arena.statistics()
        _check(pool.map(lambda model: model, _models(), 1))


class _OfMain:
    def __init__(self):
        self.content = bytes(inside.content(1, NBYTES))

    def times(self):
        return FACTOR * len(self.content)


def _everything():
    """What dill can pickle and plain pickling cannot, each with enough bytes."""
    content = bytes(inside.content(2, NBYTES))

    class Local(_OfMain):
        def times(self):
            return FACTOR + len(content)

    yield _OfMain(), lambda found: found.times()
    yield Local(), lambda found: found.times()
    yield lambda: (FACTOR, content), lambda found: found()
    yield [memoryview(content).tobytes(), slice(1, 2)], lambda found: found
    yield {"module": sys, "content": content}, lambda found: (found["module"].byteorder, 1)
    yield type("Made", (), {"content": content}), lambda found: found.content
    yield bytearray(content), bytes
    yield np.arange(200_000).reshape(400, 500)[:, ::2], lambda found: found.tolist()
    yield np.ma.masked_less(np.arange(200_000), 7), lambda found: found.sum()


def what_dill_can_pickle(method):
    context = multiprocess.get_context(method)
    expected = [look(one) for one, look in _everything()]
    with _enabled() as arena, context.Pool(1) as pool:
        for n, (one, look) in enumerate(_everything()):
            assert pool.apply(look, (one,)) == expected[n]
            returned = pool.apply(lambda same: same, (one,))
            assert look(returned) == expected[n]
            assert type(returned).__name__ == type(one).__name__
        statistics = arena.statistics()
        assert statistics.n_messages_out_of_band >= 3 * len(expected), statistics
        assert statistics.n_fallbacks == 0, statistics
        pool.close()
        pool.join()


def _send_and_wait(write, go_on):
    write.send(message(1))
    go_on.recv()


def a_sender_is_killed(method):
    """What it has sent is received; what is unread comes back."""
    context = multiprocess.get_context(method)
    with _enabled() as arena:
        for is_read in (True, False):
            (read, write), (wait, go_on) = context.Pipe(False), context.Pipe(False)
            process = context.Process(target=_send_and_wait, args=(write, wait))
            process.start()
            eventually(lambda r=read: r.poll())
            os.kill(process.pid, signal.SIGKILL)
            process.join(60)
            if is_read:
                verify(read.recv(), 1)
            for end in (read, write, wait, go_on):
                end.close()
            inside.assert_empty(arena)
        _is_out_of_band(arena, 2)


def _produce(write):
    for seed in range(3):
        write.send(message(seed))


async def _read_all(read):
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), read
    )
    found = []
    for _ in range(3):
        nbytes = int.from_bytes(await reader.readexactly(4), "big")
        found.append(await reader.readexactly(nbytes))
    transport.close()
    return found


def readers_of_their_own(method):
    """asyncio takes the bytes from the pipe, and they are loaded when the sender has gone."""
    context = multiprocess.get_context(method)
    with _enabled() as arena:
        read, write = context.Pipe(False)
        process = context.Process(target=_produce, args=(write,))
        process.start()
        found = asyncio.run(_read_all(read))
        process.join(60)
        arena.trim()
        for seed, data in enumerate(found):
            verify(pickle.loads(data), seed)


def _in_a_worker(n):
    with oobpickle.enabled() as arena, multiprocess.get_context("fork").Pool(1) as pool:
        verify(pool.apply(message, (n,)), n)
        pool.close()
        pool.join()
        return arena.statistics().n_messages_out_of_band


def a_block_in_a_worker(method):
    """A process that was started outside a block gets an arena of its own."""
    context = multiprocess.get_context(method)
    process = context.Process(target=_enter)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _enter():
    multiprocess.current_process()._config["daemon"] = False
    assert _in_a_worker(1) == 1


def everything_is_restored():
    import multiprocess.connection
    import multiprocess.queues

    def there():
        connection = multiprocess.connection
        return [
            *(connection._ForkingPickler, multiprocess.queues._ForkingPickler, connection.Pipe),
            *(connection.Connection._send_bytes, connection.Connection._recv),
            *(connection._ConnectionBase.fileno, multiprocess.reduction.dump),
            multiprocess.reduction.DupFd,
        ]

    before = there()
    with _enabled():
        assert not any(now is then for now, then in zip(there(), before, strict=True))
    assert there() == before


if __name__ == "__main__":
    inside.main()
