"""A participant that dies at any step harms nobody and leaves nothing behind."""

import re

import pytest

from process.harness import SOURCE, run_program

POINTS = sorted(
    {
        point
        for path in (SOURCE / "oobpickle").glob("*.py")
        for point in re.findall(r'_faults\.reach\("([^"]+)"\)', path.read_text())
    }
)

#: A process joins once in its life.
ONCE = {"participants.held", "participants.joined"}


def test_the_source_names_fault_points():
    assert len(POINTS) > 20
    assert set(POINTS) > ONCE


@pytest.mark.parametrize("point", POINTS)
def test_survivors_of_a_kill_at(point):
    hits = (1,) if point in ONCE else (1, 4)

    run_program("kill_at", point, *hits)
