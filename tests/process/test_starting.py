"""A process object with large arguments: sent once, never lost, and nothing of it is left."""

import pytest

from process.harness import cases_of, run_program

SPAWNING = ["spawn", "forkserver"]
WITHOUT_METHOD = {"never_launched"}
WITH_METHOD = set(cases_of("starting")) - WITHOUT_METHOD - {"killed_before_it_runs"}
POINTS = ["participant.held", "participant.joined", "claim.committed", "envelope.claimed"]


@pytest.mark.parametrize("method", SPAWNING)
@pytest.mark.parametrize("case", sorted(WITH_METHOD))
def test_starting(case, method):
    run_program("starting", case, method)


@pytest.mark.parametrize("case", sorted(WITHOUT_METHOD))
def test_starting_with_spawn(case):
    run_program("starting", case)


@pytest.mark.parametrize("method", SPAWNING)
@pytest.mark.parametrize("point", POINTS)
def test_what_was_sent_to_a_process_that_dies_comes_back(point, method):
    run_program("starting", "killed_before_it_runs", method, point)
