"""The probes of what not every kernel does."""

import pytest

import kernel


@pytest.mark.parametrize("name", kernel.PROBES)
def test_a_kernel_of_this_day_passes_every_probe(name):
    assert kernel.IS_EMULATED or kernel.has(name), kernel.PROBES[name][1]


def test_what_fails_a_probe_is_skipped_and_says_why(monkeypatch):
    monkeypatch.setitem(kernel.PROBES, "nothing", (lambda: False, "no such thing"))

    mark = kernel.needs_kernel("nothing")

    assert mark.args == (True,)
    assert mark.kwargs == {"reason": "nothing: no such thing"}
