"""How many examples hypothesis makes: few and always the same in the suite, many to explore.

The suite judges a change, so it must not fail for what an earlier one has done; new examples are
looked for with ``python -m pytest tests/property --hypothesis-profile explore``.
"""

from hypothesis import settings

_USUAL = 100

settings.register_profile("suite", deadline=None, database=None, derandomize=True)
settings.register_profile("explore", deadline=None, database=None, max_examples=40 * _USUAL)
settings.load_profile("suite")  # `conftest` imports this before the command line is looked at


def examples(n, **more):
    """Return settings for `n` examples in the suite, 40 times as many to explore."""
    return settings(max_examples=n * settings().max_examples // _USUAL, **more)
