"""The table of channels: what crosses each of them, to the child and to the parent.

Each function is a family of channels. It prints a line of JSON for each cell, after it has looked
at every value that arrived: how many messages went out of band meanwhile, how many did not, and how
many bytes.
"""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing.connection import Client, Listener
from multiprocessing.managers import BaseManager
from multiprocessing.pool import ThreadPool

import inside
from inside import Model, eventually

import oobpickle

TO_CHILD, TO_PARENT = "to the child", "to the parent"
SEEDS = [0, 1, 2]
N_MODELS = len(SEEDS)
MODEL_NBYTES = Model(0).nbytes()


@contextlib.contextmanager
def _cell(arena, channel, direction, n_models=N_MODELS):
    """Print what was sent inside the block, where so many models should cross."""
    before = arena.statistics()
    yield
    after = arena.statistics()
    n_messages = after.n_messages_out_of_band - before.n_messages_out_of_band
    nbytes = after.nbytes_out_of_band - before.nbytes_out_of_band
    cell = {
        "channel": channel,
        "direction": direction,
        "n_messages": n_messages,
        "n_fallbacks": after.n_fallbacks - before.n_fallbacks,
        "nbytes": nbytes,
        "least_nbytes": n_models * MODEL_NBYTES,
    }
    print(json.dumps(cell))


def _models():
    return [Model(seed) for seed in SEEDS]


def _checked(models):
    return [model.check().seed for model in models]


def _seed_of(model):
    return model.check().seed


def _in_order(pairs):
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def _ending(pool):
    pool.close()
    pool.join()


# --- Pool


def _with_position(task):
    position, function, argument = task
    return position, function(argument)


def _unordered(pool, function, arguments):
    tasks = [(i, function, argument) for i, argument in enumerate(arguments)]
    return _in_order(pool.imap_unordered(_with_position, tasks))


def _starmap(pool, function, arguments):
    return pool.starmap(function, [(argument,) for argument in arguments])


def _starmap_async(pool, function, arguments):
    return pool.starmap_async(function, [(argument,) for argument in arguments]).get(60)


def _apply(pool, function, arguments):
    return [pool.apply(function, (argument,)) for argument in arguments]


def _apply_async(pool, function, arguments):
    results = [pool.apply_async(function, (argument,)) for argument in arguments]
    return [result.get(60) for result in results]


def _callback(pool, function, arguments):
    found = {}
    for i, argument in enumerate(arguments):
        pool.apply_async(
            function, (argument,), callback=lambda value, i=i: found.update({i: value})
        )
    eventually(lambda: len(found) == len(arguments), within_s=60)
    return _in_order(found.items())


WAYS = {
    "Pool.map": lambda pool, *args: pool.map(*args),
    "Pool.map(chunksize=2)": lambda pool, *args: pool.map(*args, 2),
    "Pool.map_async": lambda pool, *args: pool.map_async(*args).get(60),
    "Pool.imap": lambda pool, *args: list(pool.imap(*args)),
    "Pool.imap_unordered": _unordered,
    "Pool.starmap": _starmap,
    "Pool.starmap_async": _starmap_async,
    "Pool.apply": _apply,
    "Pool.apply_async": _apply_async,
    "Pool.apply_async(callback=)": _callback,
}


def pool(method):
    with oobpickle.enabled() as arena, multiprocessing.get_context(method).Pool(2) as workers:
        _use(arena, workers, WAYS)
        _ending(workers)


def _use(arena, workers, ways):
    for channel, way in ways.items():
        with _cell(arena, channel, TO_CHILD):
            assert way(workers, _seed_of, _models()) == SEEDS
        with _cell(arena, channel, TO_PARENT):
            assert _checked(way(workers, Model, SEEDS)) == SEEDS


_initial = None


def _initialize(model):
    global _initial
    _initial = model


def _seed_of_initial():
    return _initial.check().seed


def _raise_with(seed):
    raise ValueError("no", Model(seed))


def _errors(workers, seeds):
    found = []
    for seed in seeds:
        workers.apply_async(_raise_with, (seed,), error_callback=found.append)
    eventually(lambda: len(found) == len(seeds), within_s=60)
    return found


def lives_of_a_pool(method):
    """What a pool is given at its start, workers that live for one task, and errors."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        with _cell(arena, "Pool(initargs=)", TO_CHILD, n_models=1):
            workers = context.Pool(1, _initialize, (Model(7),))
            assert workers.apply(_seed_of_initial) == 7
        channel = "errors that a task raises"
        with _cell(arena, channel, TO_PARENT):
            for error in _errors(workers, SEEDS):
                assert type(error) is ValueError
                error.args[1].check()
        _ending(workers)
        ways = {"Pool(maxtasksperchild=1)": lambda pool, *args: pool.map(*args, 1)}
        with context.Pool(2, maxtasksperchild=1) as workers:
            _use(arena, workers, ways)
            _ending(workers)
        with _cell(arena, "ThreadPool", TO_CHILD, n_models=0), ThreadPool(2) as threads:
            models = _models()
            for returned, model in zip(threads.map(lambda m: m, models), models, strict=True):
                assert returned is model


# --- executors


def _submit(executor, function, arguments):
    futures = [executor.submit(function, argument) for argument in arguments]
    return [future.result(60) for future in futures]


EXECUTOR_WAYS = {
    "ProcessPoolExecutor.submit": _submit,
    "ProcessPoolExecutor.map": lambda pool, *args: list(pool.map(*args)),
    "ProcessPoolExecutor.map(chunksize=2)": lambda pool, *args: list(pool.map(*args, chunksize=2)),
}


def executors(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        channel = "ProcessPoolExecutor(initargs=)"
        with _cell(arena, channel, TO_CHILD, n_models=1):
            workers = ProcessPoolExecutor(1, context, _initialize, (Model(7),))
            assert workers.submit(_seed_of_initial).result() == 7
        with workers:
            _use(arena, workers, EXECUTOR_WAYS)
        channel = "ProcessPoolExecutor(max_tasks_per_child=1)"
        if method != "fork":
            with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as workers:
                _use(arena, workers, {channel: _submit})


def _from_within(method, seeds, direction):
    """Send models between this worker and one of its own; return their seeds, or the models."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), ProcessPoolExecutor(1, context) as workers:
        if direction == TO_CHILD:
            return _submit(workers, _seed_of, [Model(seed) for seed in seeds])
        return _checked(_submit(workers, Model, seeds))


def executors_inside_workers(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena, ProcessPoolExecutor(1, context) as workers:
        for direction in (TO_CHILD, TO_PARENT):
            with _cell(arena, "ProcessPoolExecutor in a worker", direction):
                assert workers.submit(_from_within, method, SEEDS, direction).result() == SEEDS


# --- queues and pipes


def _take(get, put):
    for _ in SEEDS:
        put(get().check().seed)


def _give(_get, put):
    for seed in SEEDS:
        put(Model(seed))


def _work_on_queues(work, there, back):
    work(there.get, back.put)


def _work_on_joinable(work, there, back):
    work(there.get, back.put)
    if work is _take:
        for _ in SEEDS:
            there.task_done()


def _work_and_join_thread(work, there, back):
    work(there.get, back.put)
    back.close()
    back.join_thread()


def _work_without_waiting(work, there, back):
    back.cancel_join_thread()
    work(there.get, back.put)
    there.get()  # until the parent has everything


def queues(method):
    context = multiprocessing.get_context(method)
    kinds = {
        "Queue": (context.Queue, _work_on_queues),
        "Queue(maxsize=1)": (lambda: context.Queue(1), _work_on_queues),
        "Queue.join_thread": (context.Queue, _work_and_join_thread),
        "Queue.cancel_join_thread": (context.Queue, _work_without_waiting),
        "SimpleQueue": (context.SimpleQueue, _work_on_queues),
        "JoinableQueue": (context.JoinableQueue, _work_on_joinable),
    }
    with oobpickle.enabled() as arena:
        for channel, (make, target) in kinds.items():
            for direction, work in ((TO_CHILD, _take), (TO_PARENT, _give)):
                with _cell(arena, channel, direction):
                    there, back = make(), make()
                    process = context.Process(target=target, args=(work, there, back))
                    process.start()
                    if direction == TO_CHILD:
                        for model in _models():
                            there.put(model)
                        assert [back.get() for _ in SEEDS] == SEEDS
                    else:
                        assert _checked([back.get() for _ in SEEDS]) == SEEDS
                    if target is _work_without_waiting:
                        there.put(None)
                    if target is _work_on_joinable and direction == TO_CHILD:
                        there.join()
                    process.join()
                    assert process.exitcode == 0


def _work_on_a_connection(work, connection):
    work(connection.recv, connection.send)


def _work_on_two(work, read, write):
    work(read.recv, write.send)


def _talk(here_get, here_put, direction):
    if direction == TO_CHILD:
        for model in _models():
            here_put(model)
        assert [here_get() for _ in SEEDS] == SEEDS
    else:
        assert _checked([here_get() for _ in SEEDS]) == SEEDS


def _seed_in(model, connection):
    connection.send(model.check().seed)


def pipes_and_processes(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        for direction, work in ((TO_CHILD, _take), (TO_PARENT, _give)):
            with _cell(arena, "Pipe()", direction):
                here, there = context.Pipe()
                process = context.Process(target=_work_on_a_connection, args=(work, there))
                process.start()
                _talk(here.recv, here.send, direction)
                process.join()
            with _cell(arena, "Pipe(duplex=False)", direction):
                (read, put), (get, write) = context.Pipe(False), context.Pipe(False)
                process = context.Process(target=_work_on_two, args=(work, read, write))
                process.start()
                _talk(get.recv, put.send, direction)
                process.join()
        for channel, by_name in (("Process(args=)", False), ("Process(kwargs=)", True)):
            with _cell(arena, channel, TO_CHILD):
                for model in _models():
                    get, put = context.Pipe(False)
                    named = {"model": model, "connection": put}
                    args, kwargs = ((), named) if by_name else (tuple(named.values()), {})
                    process = context.Process(target=_seed_in, args=args, kwargs=kwargs)
                    process.start()
                    assert get.recv() == model.seed
                    process.join()
                    assert process.exitcode == 0


# --- managers, listeners


class _Shelf:
    """What a manager serves by itself."""

    def __init__(self):
        self._models = []

    def put(self, model):
        self._models.append(model.check())

    def get(self, at):
        return self._models[at]


class _Library(BaseManager):
    pass


_Library.register("Shelf", _Shelf)


def _put_and_get(arena, channel, put, get):
    with _cell(arena, channel, TO_CHILD):
        for model in _models():
            put(model.seed, model)
    with _cell(arena, channel, TO_PARENT):
        received = [get(seed) for seed in SEEDS]
        assert _checked(received) == SEEDS
    for model in received:
        model.counts[:] = 0  # it is ours: the manager's own stays as it is


def managers(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        with context.Manager() as manager:
            shared, several = manager.dict(), manager.list()
            space, queue = manager.Namespace(), manager.Queue()
            ways = {
                "Manager().dict": (shared.__setitem__, shared.__getitem__),
                "Manager().list": (several.insert, several.__getitem__),
                "Manager().Namespace": (
                    lambda seed, model: setattr(space, f"m{seed}", model),
                    lambda seed: getattr(space, f"m{seed}"),
                ),
                "Manager().Queue": (lambda _, model: queue.put(model), lambda _: queue.get()),
            }
            for channel, (put, get) in ways.items():
                _put_and_get(arena, channel, put, get)
            assert _checked([shared[seed] for seed in SEEDS]) == SEEDS
            _from_a_worker(arena, context, shared)
        with _Library(ctx=context) as library:
            shelf = library.Shelf()
            _put_and_get(
                arena, "BaseManager.register", lambda _, model: shelf.put(model), shelf.get
            )
            assert _checked([shelf.get(seed) for seed in SEEDS]) == SEEDS


def _copy_in(shared, seed):
    shared[seed + 10] = shared[seed].check()


def _from_a_worker(arena, context, shared):
    with _cell(arena, "Manager().dict in a worker", TO_CHILD), context.Pool(1) as workers:
        workers.starmap(_copy_in, [(shared, seed) for seed in SEEDS])
        _ending(workers)
    with _cell(arena, "Manager().dict in a worker", TO_PARENT):
        assert _checked([shared[seed + 10] for seed in SEEDS]) == SEEDS


def _call_home(address, work):
    with Client(address, authkey=b"key") as connection:
        work(connection.recv, connection.send)


def listeners(method):
    context = multiprocessing.get_context(method)
    channel = "Listener and Client, AF_UNIX"
    with oobpickle.enabled() as arena:
        for direction, work in ((TO_CHILD, _take), (TO_PARENT, _give)):
            with (
                Listener(None, "AF_UNIX", authkey=b"key") as listener,
                _cell(arena, channel, direction),
            ):
                process = context.Process(target=_call_home, args=(listener.address, work))
                process.start()
                with listener.accept() as connection:
                    _talk(connection.recv, connection.send, direction)
                process.join()
                assert process.exitcode == 0


# --- programs that inherit a connection

_PROGRAM = """
import sys
from multiprocessing.connection import Connection

sys.path.insert(0, {folder!r})
from inside import Model

here = Connection(int(sys.argv[1]))
for seed in {seeds}:
    model = here.recv().check()
    model.counts[:] = 0
    here.send(model.seed)
for seed in {seeds}:
    here.recv()
    here.send(Model(seed))
"""


def programs(_method):
    """The first message asks the program to join, and travels in-band."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        with oobpickle.enabled() as arena:
            here, there = multiprocessing.Pipe()
            code = _PROGRAM.format(folder=os.path.dirname(inside.__file__), seeds=[9, *SEEDS])
            command = [sys.executable, "-W", "error", "-c", code, str(there.fileno())]
            program = subprocess.Popen(command, pass_fds=[there.fileno()])
            there.close()
            here.send(Model(9))
            assert here.recv() == 9
            assert arena.statistics().fallbacks["channel"].n_messages == 1
            assert arena.statistics().n_fallbacks == 1
            channel = "a program that inherits a connection"
            with _cell(arena, channel, TO_CHILD):
                for model in _models():
                    here.send(model)
                    assert here.recv() == model.seed
            with _cell(arena, channel, TO_PARENT, N_MODELS + 1):
                for seed in (9, *SEEDS):
                    here.send(None)
                    assert here.recv().check().seed == seed
            assert program.wait(60) == 0


# --- three processes


def _relay(source, target):
    for _ in SEEDS:
        target.put(source.get())


def relays(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        queues = [context.Queue() for _ in range(4)]
        processes = [context.Process(target=_relay, args=pair) for pair in pairwise(queues)]
        for process in processes:
            process.start()
        with _cell(arena, "through three processes", TO_PARENT, 4 * len(SEEDS)):
            for model in _models():
                queues[0].put(model)
            assert _checked([queues[-1].get() for _ in SEEDS]) == SEEDS
        for process in processes:
            process.join()
            assert process.exitcode == 0


if __name__ == "__main__":
    inside.main()
