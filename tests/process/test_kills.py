"""A participant that dies at any step harms nobody and leaves nothing behind.

The programs of ``tests/long/kills.py``, with few kills of each kind.
"""

import importlib.util
import json
import os

import pytest

from conftest import by_turns
from process.harness import HERE, SOURCE, run_program

LONG = HERE.parent / "long"
PATH = os.pathsep.join(map(str, (SOURCE, LONG, HERE.parent, HERE)))
N_HITS = 1  # by each signal in turn
N_AT_A_TIME = 6


def load(name):
    spec = importlib.util.spec_from_file_location(name, LONG / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


POINTS = load("points").all_points()
CHOSEN = by_turns(POINTS)
GROUPS = [CHOSEN[at : at + N_AT_A_TIME] for at in range(0, len(CHOSEN), N_AT_A_TIME)]


def run(name, *args):
    """Run a program of the long runs and return its lines."""
    printed = run_program(name, *args, folder=LONG, env={"PYTHONPATH": PATH})
    return [json.loads(line) for line in printed.splitlines()]


def kill_at(method, points):
    *found, end = run("at_points", method, N_HITS, 1, 60, *points)

    assert points == [one["point"] for one in found]
    assert [sum(one["hits"].values()) for one in found] == [N_HITS] * len(points)
    assert [one["hits"]["TERM"] for one in found[:3]] == [0, 1, 0][: len(points)]
    assert end["nbytes_left"] == 0


def test_the_source_names_fault_points():
    assert len(POINTS) > 40


@pytest.mark.parametrize("points", GROUPS, ids=lambda points: points[0])
def test_survivors_of_kills_at(points):
    kill_at("fork", points)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_survivors_of_kills_in_processes_that_attach(method):
    kill_at(method, ["arena.mapped", "victim.piping"])


def test_survivors_of_kills_at_random_moments():
    kills, end = run("at_random", "fork", 20, 1, 60)

    assert sum(kills["hits"].values()) >= 20
    assert end["nbytes_left"] == 0


def test_what_a_killed_parent_leaves_goes_on():
    kills, _ = run("of_parents", "fork", 3, 1, 60)

    assert {"KILL": 1, "TERM": 1, "SEGV": 1} == kills["hits"]


def test_what_a_thousand_blocks_of_the_dead_take():
    (found,) = run("of_a_thousand", 1)

    assert found["longest_ms"] < 50


def test_pools_that_are_terminated_with_unread_results():
    (found,) = run("of_pools", 40, 60)

    assert found["n_rounds"] == 40
