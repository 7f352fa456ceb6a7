"""Fallbacks: every reason is counted apart, and the warning says what can be done."""

import pytest

from oobpickle import Fallback
from oobpickle._fallback import (
    COUNTERS_END,
    REASONS,
    describe_fallbacks,
    fallback_counters,
    fallbacks_of,
)


def test_reasons_that_never_occurred_are_left_out():
    found = [0] * COUNTERS_END
    found[fallback_counters("busy")[0]] = 1

    assert fallbacks_of(found) == {"busy": Fallback(1, 0)}
    assert fallbacks_of([0] * COUNTERS_END) == {}


def test_an_unknown_reason_is_no_counter():
    with pytest.raises(ValueError, match=r"unheard|not in list"):
        fallback_counters("unheard")


def test_the_description_says_how_many_how_large_and_why():
    text = describe_fallbacks({"full": Fallback(2, 3 << 20), "busy": Fallback(1, 100)})

    assert text == (
        f"3 messages travelled in-band, none was lost: 2 (3.0 MiB) because {REASONS['full']}; "
        f"1 (100 bytes) because {REASONS['busy']}"
    )


def test_one_message_is_one_message():

    assert describe_fallbacks({"full": Fallback(1, 0)}).startswith("1 message travelled")


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_says_why_and_what_to_do(reason):
    why, _, what_to_do = REASONS[reason].partition(";")

    assert why
    assert what_to_do
