"""Blocks, pools, executors and queues that end in every order lose nothing and leave nothing."""

import pytest

from process.harness import cases_of, run_program


@pytest.mark.parametrize("case", cases_of("shutdown"))
def test_shutdown(case):
    run_program("shutdown", case, fresh=True)
