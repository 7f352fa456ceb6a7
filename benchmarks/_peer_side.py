"""One side of the comparison against peers: a process that measures one peer.

What
    `main` answers the coordinator's requests; each public method of `Side` is one.

How it works
    As in ``_driver.py``: a line of JSON for each request, one for each answer. A message is timed
    from the call until every byte of what arrived was read, and checked afterwards.

Lifetime
    A side ends at the end of its stdin. What arrived is dropped, and what it leaves is released,
    before the next message, untimed.

When it cannot
    An exception is answered with its text; one that begins with ``MISMATCH`` means damaged data.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
import traceback
from typing import Any

import _peers
from _driver import MISMATCH
from _peers._peer import Peer
from _peers._work import Model, change, probe, take

N_PARTS = 8
CHECKED_STAMP = 1  # The stamp of the message of which everything is compared.


@functools.cache
def expect(nbytes: int) -> dict[str, int]:
    """What a model of this size must look like when it arrives."""
    model = Model(nbytes)
    expected = {"checksum": model.checksum(), "total": model.total(), "second": int(model.words[1])}
    model.stamp(CHECKED_STAMP)
    expected["digest"] = model.digest()
    expected["changed_digest"] = change(model).digest()
    return expected


class Side:
    """The commands; each public method is one."""

    def __init__(self, name: str) -> None:
        self._peer: Peer = _peers.make(name)
        self._workload = ""
        self._n_workers = 0
        self._expected: dict[str, int] = {}
        self._model: Model | None = None
        self._stamp = CHECKED_STAMP

    def open(self, workload: str, nbytes: int, n_workers: int, expected: dict[str, int]) -> None:
        """Start the workers, and make the model where it is sent from."""
        self._workload, self._n_workers, self._expected = workload, n_workers, expected
        self._peer.start(n_workers, nbytes)
        is_sent = workload in ("argument", "broadcast", "roundtrip")
        self._model = Model(nbytes) if is_sent else None

    def close(self) -> None:
        """End the workers."""
        self._model = None
        self._peer.stop()

    def end(self) -> None:
        """Nothing is sent any more."""
        self._peer.end()

    def send(self, n_messages: int) -> list[float]:
        """Transfer so often; return the seconds of each."""
        once = getattr(self, f"_{self._workload}")
        self._peer.wake()
        try:
            return [self._tidily(once) for _ in range(n_messages)]
        finally:
            self._peer.rest()

    def facts(self) -> dict[str, int]:
        """What the peer's library counted."""
        return self._peer.facts()

    def _tidily(self, once: Any) -> float:
        try:
            self._stamp += 1
            duration_s: float = once(self._stamp)
            return duration_s
        finally:
            self._peer.tidy()

    def _result(self, stamp: int) -> float:
        start_s = time.perf_counter()
        model = self._peer.result(stamp)
        checksum = model.checksum()
        duration_s = time.perf_counter() - start_s
        self._compare([checksum], [self._expected["checksum"] ^ stamp])
        return duration_s

    def _argument(self, stamp: int) -> float:
        model = self._own(stamp)
        start_s = time.perf_counter()
        checksums = self._peer.send(take, model)
        duration_s = time.perf_counter() - start_s
        self._compare(checksums, [self._expected["checksum"] ^ stamp] * self._n_workers)
        return duration_s

    _broadcast = _argument

    def _roundtrip(self, stamp: int) -> float:
        model = self._own(stamp)
        start_s = time.perf_counter()
        changed = self._peer.exchange(model)
        checksum = changed.checksum()
        duration_s = time.perf_counter() - start_s
        sent = self._expected["checksum"] ^ stamp
        second = self._expected["second"]
        expected = sent ^ second ^ ((second + 1) % (1 << 64))
        self._compare([checksum, int(changed.name, 16)], [expected, sent])
        return duration_s

    def _map(self, stamp: int) -> float:
        start_s = time.perf_counter()
        models = self._peer.collect(N_PARTS, stamp)
        checksums = [model.checksum() for model in models]
        duration_s = time.perf_counter() - start_s
        self._compare(checksums, [self._expected["checksum"] ^ stamp] * N_PARTS)
        return duration_s

    def _merge(self, stamp: int) -> float:
        start_s = time.perf_counter()
        total = None
        for part in self._peer.results(N_PARTS, stamp):
            total = part if total is None else total + part
        duration_s = time.perf_counter() - start_s
        del part
        assert total is not None
        expected = N_PARTS * (self._expected["total"] + stamp)
        self._compare([total.total()], [expected % (1 << 64)])
        return duration_s

    def verify(self) -> None:
        """Transfer once and compare everything: the order of all words, and the attributes."""
        self._peer.wake()
        if self._workload in ("argument", "broadcast"):
            digests = self._peer.send(Model.digest, self._own(CHECKED_STAMP))
            self._compare(digests, [self._expected["digest"]] * self._n_workers)
        elif self._workload == "roundtrip":
            changed = self._peer.exchange(self._own(CHECKED_STAMP))
            self._compare([changed.digest()], [self._expected["changed_digest"]])
        else:
            self._compare([self._peer.result(CHECKED_STAMP).digest()], [self._expected["digest"]])
        self._peer.tidy()
        self._peer.rest()

    def probe(self) -> dict[str, bool]:
        """Write to what arrives: is that allowed, and does anybody else see it?"""
        self._peer.wake()
        if self._workload in ("argument", "broadcast"):
            found = self._probe_argument()
        else:
            found = self._probe_result()
        self._peer.tidy()
        self._peer.rest()
        return {"is_writable": found[0], "is_private": found[1]}

    def _probe_argument(self) -> tuple[bool, bool]:
        model = self._own(CHECKED_STAMP)
        before = model.checksum()
        with tempfile.TemporaryDirectory() as folder:
            task = functools.partial(probe, folder, self._n_workers)
            answers = self._peer.send(task, model)
        is_untouched = model.checksum() == before
        is_writable = all(answer[0] for answer in answers)
        return is_writable, is_untouched and all(answer[1] for answer in answers)

    def _probe_result(self) -> tuple[bool, bool]:
        received, other = self._receive_again(), None
        written = (int(received.words[1]) + 12345) % (1 << 64)
        try:
            received.words[1] = written
        except ValueError:
            return False, False
        other = self._receive_again()  # The sender's own copy, as it is now.
        is_kept = int(received.words[1]) == written
        return True, is_kept and int(other.words[1]) != written

    def _receive_again(self) -> Model:
        if self._workload == "roundtrip":
            return self._peer.exchange(self._own(CHECKED_STAMP))
        return self._peer.result(CHECKED_STAMP)

    def _own(self, stamp: int) -> Model:
        assert self._model is not None
        self._model.stamp(stamp)
        return self._model

    def _compare(self, found: list[int], expected: list[int]) -> None:
        if found != expected:
            raise ValueError(f"{MISMATCH}: {self._workload}: expected {expected}, found {found}")


def main(name: str) -> None:
    """Answer requests until stdin ends."""
    if name.startswith("mpi4py"):
        from _peers import mpi_ranks

        if mpi_ranks.is_worker():
            mpi_ranks.serve()
            return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever else prints must not get among the answers.
    side: Side | None = None
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            side = side or Side(name)
            answer = {"ok": getattr(side, command)(*arguments)}
        except BaseException as error:
            text = str(error) if MISMATCH in str(error) else f"{type(error).__name__}: {error}"
            answer = {"error": text, "traceback": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    if side is not None:
        side.end()
