"""Invitations: whatever becomes of them, the message behind them arrives."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

import oobpickle
from oobpickle import _api
from oobpickle._hook import installed, invitations
from oobpickle._memory.arena import SharedArena

NAME = bytes(range(256))[200:232]  # with quotes and backslashes it would be the same


@pytest.fixture
def accepted(monkeypatch):
    names = []
    monkeypatch.setattr(_api, "accept", names.append)
    return names


@pytest.mark.parametrize("protocol", range(6))
def test_an_offer_runs_before_the_object_is_loaded(accepted, protocol):
    obj = {"a": [1, 2], "b": "text"}

    assert obj == pickle.loads(invitations.prefix(NAME) + pickle.dumps(obj, protocol))
    assert [NAME] == accepted


@pytest.mark.parametrize("name", [b"'" * 32, b'"' * 32, b"\\" * 32, b"\n{}" * 10 + b"  "])
def test_every_name_arrives(accepted, name):
    assert 1 == pickle.loads(invitations.prefix(name) + pickle.dumps(1))
    assert [name] == accepted


def test_an_offer_goes_before_a_payload(accepted):
    payload = oobpickle.dumps(np.arange(1000))
    whole = invitations.prefix(NAME) + bytes(payload.to_pickle(tail=b"tail"))

    np.testing.assert_array_equal(np.arange(1000), pickle.loads(whole))
    assert [NAME] == accepted


def test_without_the_library_an_offer_does_nothing():
    message = invitations.prefix(NAME) + pickle.dumps([1, 2])
    child = subprocess.run(
        [
            sys.executable,
            "-S",
            "-I",
            "-c",
            "import sys, pickle; print(pickle.load(sys.stdin.buffer))",
        ],
        input=message,
        capture_output=True,
        check=True,
    )

    assert (b"[1, 2]\n", b"") == (child.stdout, child.stderr)


def test_an_offer_of_somebody_who_is_gone_is_declined():
    accept = pickle.dumps("the message")
    name = b"identity of none" + (4194303).to_bytes(4, "little") + bytes(12)

    assert "the message" == pickle.loads(invitations.prefix(name) + accept)
    assert installed.current is None


def test_who_takes_part_already_declines():
    with oobpickle.enabled() as arena:
        assert 1 == pickle.loads(invitations.prefix(bytes(32)) + pickle.dumps(1))
        assert installed.current.shown is arena


def test_a_ctrl_c_within_an_offer_is_not_swallowed(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SharedArena, "find", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pickle.loads(invitations.prefix(b"identity of some" + bytes(16)) + pickle.dumps(1))
