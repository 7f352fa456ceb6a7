"""Signal handlers of the program may raise, fork and send, wherever they strike."""

import pytest

from process.harness import cases_of, run_program

#: The interpreter prints what is raised within a fork hook, or in a finalizer.
PRINTS = (
    "an_alarm_within_the_turning_of_held_blocks_into_ordinary_memory",
    "entering_a_block_is_interrupted_at_any_line",
    "leaving_a_block_is_interrupted_at_any_line",
)


@pytest.mark.parametrize("case", cases_of("signals"))
def test_signals(case):
    run_program("signals", case, stderr="..." if case in PRINTS else "")
