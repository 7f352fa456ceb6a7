"""A small run of the fuzzers, always the same; the long one is ``python -m tests.long.fuzz``."""

import random

import pytest

import fuzzers
from oobpickle import _envelope
from oobpickle._memory.ledger import Ledger


@pytest.mark.parametrize(("kind", "n_inputs"), [("Payload", 4000), ("Ledger", 800)])
def test_only_our_own_errors_come_out(kind, n_inputs):
    fuzzer, rng = getattr(fuzzers, f"{kind}Fuzzer")(), random.Random(5)

    for _ in range(n_inputs):
        fuzzer.one(rng)

    assert getattr(fuzzer, "n_accepted", 1) < n_inputs / 2


def test_only_our_own_errors_come_out_of_envelopes():
    fuzzer, rng = fuzzers.EnvelopeFuzzer(), random.Random(5)
    try:
        for _ in range(1500):
            fuzzer.one(rng)
    finally:
        fuzzer.close()

    assert 0 < fuzzer.n_accepted < 750


def test_the_fuzzer_sees_a_ledger_that_believes_what_it_reads(monkeypatch):
    monkeypatch.setattr(Ledger, "_is_free", lambda *_: True)
    fuzzer, rng = fuzzers.LedgerFuzzer(), random.Random(5)

    with pytest.raises((AssertionError, IndexError, KeyError, AttributeError)):
        for _ in range(3000):
            fuzzer.one(rng)


def test_the_fuzzer_sees_an_envelope_that_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(_envelope, "_parse", lambda data: _envelope._HEADER.unpack_from(data))
    fuzzer, rng = fuzzers.EnvelopeFuzzer(), random.Random(5)
    with pytest.raises(Exception) as caught:
        for _ in range(500):
            fuzzer.one(rng)
    monkeypatch.undo()
    fuzzer.close()

    assert not isinstance(caught.value, _envelope.EnvelopeError)
