"""After a kill, a stop or a termination: what was had comes back, what was sent arrives."""

import pytest

from process.harness import (
    assert_shared_memory_returns,
    cases_of,
    run_program,
    shared_nbytes,
)

#: Cases with arguments have tests of their own below.
WITH_ARGUMENTS = {
    "owner_killed_while_it_closes",
    "parent_killed_with_messages_in_flight",
    "process_with_a_fault_in_its_environment",
    "sender_killed_after_send",
}


@pytest.mark.parametrize("case", [c for c in cases_of("recovery") if c not in WITH_ARGUMENTS])
def test_recovery(case):
    run_program("recovery", case)


@pytest.mark.parametrize("kind", ["simplex", "duplex", "SimpleQueue", "Queue"])
def test_what_was_sent_arrives_though_its_sender_was_killed(kind):
    run_program("recovery", "sender_killed_after_send", kind)


@pytest.mark.parametrize("point", ["lock.taken:2", "lock.clean", "row.emptied:3"])
def test_others_go_on_if_the_owner_is_killed_while_it_closes(point):
    run_program("recovery", "owner_killed_while_it_closes", point)


@pytest.mark.parametrize("point", ["participant.joined", "envelope.claimed", "seal.committed"])
def test_a_spawned_process_dies_where_its_environment_says(point):
    run_program("recovery", "process_with_a_fault_in_its_environment", point)


def test_forked_workers_exit_and_memory_returns_if_the_parent_is_killed():
    before = shared_nbytes()

    # A worker that cannot return its result says so, as ever.
    run_program(
        "recovery", "parent_killed_with_messages_in_flight", "fork", exit_code=-9, stderr="..."
    )

    assert_shared_memory_returns(before, slack_nbytes=64 << 20)


def test_spawned_workers_exit_and_memory_returns_if_the_parent_is_killed():
    before = shared_nbytes()

    # The standard library's resource tracker complains about the pool's semaphores, as ever.
    run_program(
        "recovery", "parent_killed_with_messages_in_flight", "spawn", exit_code=-9, stderr="..."
    )

    assert_shared_memory_returns(before, slack_nbytes=64 << 20)
