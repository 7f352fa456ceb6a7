"""What is sent while something changes it arrives as it was at one moment."""

import pytest

from process.harness import cases_of, run_program


@pytest.mark.parametrize("case", cases_of("snapshots"))
def test_snapshots(case):
    run_program("snapshots", case)
