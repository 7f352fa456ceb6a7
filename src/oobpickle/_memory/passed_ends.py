"""Which ends of channels participants have passed on: what others know of those is out of date.

**What.** `PassedEnds` counts them in the ledger's header, and lists the last ones.

**How it works.** A ring of ends and a number that only grows. A reader compares the number with the
one it has seen, reads the ends between, and looks at the number again: what was overwritten
meanwhile it does not believe.

**Lifetime.** That of the ledger. Whoever dies in the middle of a step has listed an end that is not
counted; the next one overwrites it.

**When it cannot.** Without the lock the number jumps past the whole ring: all participants look
again at everything."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from oobpickle._errors import ArenaFullError
from oobpickle._foreign import pass_on_foreign
from oobpickle._memory.layout import H_HANDED, H_HANDED_ENDS, N_PASSED_ENDS
from oobpickle._memory.membership import Membership

if TYPE_CHECKING:
    from collections.abc import Collection


class PassedEnds:
    """The list of passed-on ends in the ledger's header.

    Parameters
    ----------
    words : memoryview
        Of the ledger; once that is closed, the arena puts a copy of the header in its place.
    membership : Membership
        For the lock.
    """

    def __init__(self, words: memoryview, membership: Membership) -> None:
        self.words = words
        self._membership = membership

    @property
    def n(self) -> int:
        """How many there have been."""
        return self.words[H_HANDED]

    def note(self, ends: Collection[int]) -> None:
        """Let all participants look again at who can read there."""
        try:
            self._membership.run(self._note, ends)
        except (ArenaFullError, OSError) as error:
            pass_on_foreign(error)
            # Too many to be listed: they look again at all.
            jump = N_PASSED_ENDS + 1 + secrets.randbits(62)
            self.words[H_HANDED] = (self.words[H_HANDED] + jump) % (1 << 63)

    def _note(self, ends: Collection[int]) -> None:
        for end in ends:
            n = self.words[H_HANDED]
            self.words[H_HANDED_ENDS + n % N_PASSED_ENDS] = end
            self.words[H_HANDED] = (n + 1) % (1 << 63)

    def since(self, n_seen: int) -> list[int] | None:
        """Return the ends that were passed on since there were `n_seen`; ``None`` for "any"."""
        numbers = range(n_seen, self.words[H_HANDED])
        ends = [self.words[H_HANDED_ENDS + n % N_PASSED_ENDS] for n in numbers[-N_PASSED_ENDS:]]
        # Read first, then looked whether they were overwritten meanwhile.
        n_new = self.words[H_HANDED] - n_seen
        return ends if 0 <= n_new <= N_PASSED_ENDS else None
