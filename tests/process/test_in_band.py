"""Large in-band messages: the memory they take, and that they are what they were."""

import pytest

from conftest import by_start_method
from process.harness import cases_of, run_program

WITH_ARGUMENTS = {"takes_what_it_needs", "the_copy_goes_as_it_is_sent"}


@pytest.mark.parametrize("case", [c for c in cases_of("in_band") if c not in WITH_ARGUMENTS])
def test_in_band(case):
    run_program("in_band", case)


@pytest.mark.parametrize("way", ["queue", "thread", "process"])
def test_peak_memory_of_both_sides(way):
    run_program("in_band", "the_copy_goes_as_it_is_sent", way)


@pytest.mark.parametrize(
    ("way", "start_method"), by_start_method(["result", "executor", "pipe", "SimpleQueue"])
)
def test_peak_memory(way, start_method):
    run_program("in_band", "takes_what_it_needs", way, start_method)
