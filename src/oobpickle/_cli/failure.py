"""What a command cannot do, since its user has to change something first.

**What.** `CommandError`.

**How it works.** `main` prints its text and returns 2.

**Lifetime.** No state.

**When it cannot.** Its text has to be one line.
"""


class CommandError(Exception):
    """What a user has to change; the text is one line."""
