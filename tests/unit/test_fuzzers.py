"""A small run of the fuzzers, always the same; the long one is ``python -m tests.long.fuzz``."""

import random

import pytest

import fuzzers
from oobpickle import _envelope


@pytest.mark.parametrize(
    ("kind", "n_inputs"), [("Payload", 4000), ("Table", 500), ("Call", 20_000), ("File", 4000)]
)
def test_only_our_own_errors_come_out(kind, n_inputs):
    fuzzer, rng = getattr(fuzzers, f"{kind}Fuzzer")(), random.Random(5)
    try:
        for _ in range(n_inputs):
            fuzzer.one(rng)
    finally:
        getattr(fuzzer, "close", list)()

    assert getattr(fuzzer, "n_accepted", 1) < n_inputs / 2


def test_only_our_own_errors_come_out_of_envelopes():
    fuzzer, rng = fuzzers.EnvelopeFuzzer(), random.Random(5)
    try:
        for _ in range(1500):
            fuzzer.one(rng)
    finally:
        fuzzer.close()

    assert 0 < fuzzer.n_accepted < 750


def test_the_fuzzer_sees_memory_that_two_have(monkeypatch):
    fuzzer, rng = fuzzers.TableFuzzer(), random.Random(5)
    with pytest.raises(AssertionError, match="somebody else"):
        for n in range(3000):
            fuzzer.one(rng)
            if n % 16 == 5 and fuzzer._mine:
                fuzzer._mine[0][1][:8] = bytes(8)
                fuzzer._forged = False
    fuzzer.close()


def test_the_fuzzer_sees_an_envelope_that_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(_envelope, "_parse", lambda data: _envelope._HEADER.unpack_from(data))
    fuzzer, rng = fuzzers.EnvelopeFuzzer(), random.Random(5)
    with pytest.raises(Exception) as caught:
        for _ in range(500):
            fuzzer.one(rng)
    monkeypatch.undo()
    fuzzer.close()

    assert not isinstance(caught.value, _envelope.EnvelopeError)
