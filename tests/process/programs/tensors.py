"""torch and oobpickle in one process: tensors go torch's way, arrays beside them ours."""

import importlib

import inside
import numpy as np
from inside import content

import oobpickle
from oobpickle._hook.replacements import of_standard_library

N = 3
LARGE = 400_000


def _there():
    """Return what is now in the places where oobpickle replaces something."""
    return [getattr(owner, name) for owner, name, _ in of_standard_library()]


_originals = _there()


def _is_restored():
    return all(now is then for now, then in zip(_there(), _originals, strict=True))


def _model(seed):
    import torch

    return {
        "seed": seed,
        "tensor": torch.arange(LARGE) + seed,
        "half": torch.full((3,), seed, dtype=torch.float16),
        "view": torch.arange(20).reshape(4, 5).T[1:] + seed,
        "array": content(seed, LARGE),
        "small": np.arange(5) + seed,
    }


def _check(model, seed):
    import torch

    expected = _model(seed)
    assert model.keys() == expected.keys()
    assert model["seed"] == seed
    for name, wanted in expected.items():
        found = model[name]
        assert type(found) is type(wanted), name
        if name != "seed":
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
            equal = torch.equal if type(wanted) is torch.Tensor else np.array_equal
            assert equal(found, wanted), name
    return model


def _next(model):
    return _model(_check(model, model["seed"])["seed"] + 1)


def _serve(*queues):
    for tasks, results in zip(queues[::2], queues[1::2], strict=True):
        while (model := tasks.get()) is not None:
            results.put(_next(model))
            model["tensor"].fill_(-1)
            results.put("filled")
            tasks.get()  # torch's tensors live in their sender until they are opened


def _ways(method):
    import torch.multiprocessing
    from torch.multiprocessing.queue import Queue

    context = torch.multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        for seed, model in enumerate(pool.imap(_next, [_model(seed) for seed in range(N)])):
            _check(model, seed + 1)
        del model
        pool.close()
        pool.join()
    queues = [context.Queue(), context.Queue(), context.SimpleQueue(), context.SimpleQueue()]
    queues += [Queue(ctx=context), Queue(ctx=context)]
    process = context.Process(target=_serve, args=queues)
    process.start()
    for tasks, results in zip(queues[::2], queues[1::2], strict=True):
        for seed in range(N):
            model = _model(seed)
            tasks.put(model)
            _check(results.get(), seed + 1)
            assert results.get() == "filled"
            assert (model["tensor"] == -1).all()  # torch's promise: tensors are shared
            assert (model["array"] == content(seed, LARGE)).all()  # and ours: arrays are not
            tasks.put("next")
        tasks.put(None)
    process.join()
    assert process.exitcode == 0
    return 2 * N + 3 * 2 * N


def torch_imported(when, method):
    if when == "before":
        importlib.import_module("torch.multiprocessing")
        assert _is_restored()
    with oobpickle.enabled() as arena:
        there = _there()
        assert not any(now is then for now, then in zip(there, _originals, strict=True))
        n_messages = _ways(method)
        assert _there() == there
        done = arena.statistics()
        assert (done.n_messages_out_of_band, done.n_fallbacks) == (n_messages, 0), done
        assert done.nbytes_out_of_band >= n_messages * LARGE
    assert _is_restored()
    _ways("fork")


class _Models:
    """A data set."""

    def __len__(self):
        return 40

    def __getitem__(self, seed):
        return _model(seed)


def _loaded(method, collate):
    from torch.utils.data import DataLoader

    for is_kept in (False, True):
        loader = DataLoader(
            _Models(),
            batch_size=4,
            num_workers=2,
            collate_fn=collate,
            multiprocessing_context=method,
            persistent_workers=is_kept,
        )
        for _ in range(2):
            yield from loader


def _as_they_are(models):
    return models


def arrays_of_a_loader(method):
    """With two tensors or three in each model: many descriptors are handed over."""
    with oobpickle.enabled() as arena:
        for n, models in enumerate(_loaded(method, _as_they_are)):
            for seed, model in enumerate(models, n % 10 * 4):
                _check(model, seed)
                assert model["tensor"].is_shared()
                assert model["array"].flags.writeable
        del models, model
        done = arena.statistics()
        assert (done.n_messages_out_of_band, done.n_fallbacks) == (n + 1, 0), done
        assert done.nbytes_out_of_band >= (n + 1) * 4 * LARGE


def tensors_of_a_loader(method):
    """`default_collate` makes tensors of all arrays, and torch shares them."""
    import torch

    with oobpickle.enabled() as arena:
        for n, batch in enumerate(_loaded(method, None)):
            first = n % 10 * 4
            for i in range(4):
                wanted = _model(first + i)
                for name in ("tensor", "half", "view"):
                    assert torch.equal(batch[name][i], wanted[name])
                for name in ("array", "small"):
                    assert np.array_equal(batch[name][i].numpy(), wanted[name])
            assert batch["array"].is_shared()
        done = arena.statistics()
        assert (done.n_messages_out_of_band, done.n_fallbacks) == (0, 0), done


if __name__ == "__main__":
    inside.main()
