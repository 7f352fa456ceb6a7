"""Ctrl-C, garbage collection and signal handlers come at any moment and break nothing."""

import pytest

from process.harness import cases_of, run_program

APART = ("finalizers_that_send", "finalizers_at_interpreter_shutdown")
CASES = [case for case in cases_of("interrupts") if case not in APART]


#: The interpreter prints what it drops where a fork hook begins ("Exception ignored in ...").
AT_A_FORK = ("storm_over_forks", "ctrl_c_while_the_fork_runs", "ctrl_c_just_before_the_fork")


@pytest.mark.parametrize("case", CASES)
def test_interrupts(case):
    run_program("interrupts", case, stderr="..." if case in AT_A_FORK else "")


@pytest.mark.parametrize("threshold", [0, 65_536])
def test_finalizers_that_send_with_threshold(threshold):
    run_program("interrupts", "finalizers_that_send", threshold)


def test_finalizers_at_interpreter_shutdown():
    printed = run_program("interrupts", "finalizers_at_interpreter_shutdown", fresh=True)

    assert printed == 3 * "dead\n"
