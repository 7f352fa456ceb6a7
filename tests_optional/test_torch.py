"""torch.multiprocessing in the same process. Its own environment and command: see CONTRIBUTING."""

import pytest

from conftest import START_METHODS
from process.harness import run_program

#: torch's own: a fork of a process in which OpenMP has started threads can hang.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("when", ["before", "inside"])
def test_with_torch_imported(when, start_method):
    run_program("tensors", "torch_imported", when, start_method, env=ENVIRONMENT)


@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("case", ["arrays_of_a_loader", "tensors_of_a_loader"])
def test_a_data_loader(case, start_method):
    run_program("tensors", case, start_method, env=ENVIRONMENT)
