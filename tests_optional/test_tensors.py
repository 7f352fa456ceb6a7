"""Tensors of torch on the CPU, by value and as torch shares them: see CONTRIBUTING."""

import multiprocessing
import multiprocessing.resource_sharer
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

import oobpickle

torch.set_num_threads(1)  # threads of OpenMP do not survive a fork

N = 1_000_000
MAKERS = {
    "floats": lambda: torch.arange(N, dtype=torch.float32),
    "doubles": lambda: torch.arange(N, dtype=torch.float64).reshape(1000, 1000),
    "columns": lambda: torch.arange(N, dtype=torch.float64).reshape(1000, 1000)[:, ::2],
    "half": lambda: torch.arange(2000).to(torch.bfloat16).repeat(100),
    "booleans": lambda: torch.arange(N) % 3 == 0,
    "complex": lambda: torch.arange(N).to(torch.complex64),
    "with gradient": lambda: torch.ones(N, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.arange(N, dtype=torch.float32)),
    "module": lambda: torch.nn.Linear(1000, 300),
    "of numpy": lambda: torch.from_numpy(np.arange(N)),
}


def tensors_of(obj):
    return list(obj.parameters()) if isinstance(obj, torch.nn.Module) else [obj]


def assert_equal(actual, expected):
    for one, other in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert type(one) is type(other)
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert one.requires_grad == other.requires_grad
        assert torch.equal(one, other)


@pytest.fixture
def plain_tables(monkeypatch):
    """Without what ``torch.multiprocessing`` has registered: tensors by value."""
    kept = ForkingPickler._extra_reducers.items()
    by_value = {kind: reduce for kind, reduce in kept if not kind.__module__.startswith("torch")}
    monkeypatch.setattr(ForkingPickler, "_extra_reducers", by_value)


def make(name):
    return MAKERS[name]()


def changed(tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(0)
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("name", MAKERS)
def test_through_the_serializer(name):
    obj = make(name)
    expected = pickle.loads(pickle.dumps(obj, 5))
    arrived = oobpickle.loads(oobpickle.dumps(obj))

    assert_equal(arrived, expected)
    changed(tensors_of(arrived))
    assert_equal(obj, expected)


@pytest.mark.parametrize("name", MAKERS)
def test_as_the_result_of_a_pool(name, plain_tables):
    with oobpickle.enabled() as arena:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            arrived = pool.apply(make, (name,))
        assert arena.statistics().n_messages_out_of_band >= 1

    assert_equal(arrived, make(name))
    changed(tensors_of(arrived))


def test_what_torch_has_registered_is_honoured():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.multiprocessing as torch_multiprocessing

    assert torch.Tensor in ForkingPickler._extra_reducers
    tensor = torch.arange(N, dtype=torch.float32)
    with oobpickle.enabled(), torch_multiprocessing.get_context("fork").Pool(1) as pool:
        (there,) = pool.apply(changed, ([tensor],))

    multiprocessing.resource_sharer.stop()  # the thread that has handed the descriptor over

    assert tensor.is_shared()
    assert not tensor.any()  # shared, as torch promises: what a worker writes is seen here
    assert not there.any()
