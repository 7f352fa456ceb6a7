"""Access: which part of a sparse mapping this process may touch.

**What.** `Access` makes ranges of a mapping accessible when they are first used, and inaccessible
when their pages have gone back to the system.

**How it works.** ``mlockall(2)`` makes every mapping resident as a whole, holes and all, but for
what is ``PROT_NONE``. So a sparse file is mapped ``PROT_NONE``, and `open` changes that
(mprotect(2)) for the ranges that are used, in units of 2 MiB: larger ranges have units of their
own, smaller ones share theirs. What was opened is remembered, so that a second use costs a look
into a dict.

**Lifetime.** A forked child inherits the mapping and what is remembered of it. Whatever is open and
not remembered is opened again; so a range is forgotten before it is closed.

**When it cannot.** Each range on its own may be one mapping more than ``vm.max_map_count`` allows:
then everything is opened, which needs none. What the system refuses even then is an ``OSError``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from oobpickle import _system
from oobpickle._foreign import ignoring, pass_on_foreign

_UNIT_NBYTES: Final = 2 << 20


class Access:
    """What is accessible of a mapping.

    Parameters
    ----------
    address, nbytes : int
        The mapping, which was made with ``PROT_NONE``; bytes.
    """

    __slots__ = ("_address", "_everything", "_nbytes", "_opened")

    def __init__(self, address: int, nbytes: int) -> None:
        self._address = address
        self._nbytes = nbytes
        self._everything = False
        self._opened: dict[int, int] = {}  # by offset of a range, its end

    def open(self, offset: int, nbytes: int) -> None:
        """Let this process touch a range.

        Raises
        ------
        OSError
            ENOMEM where the system allows no further mapping.
        """
        end = offset + nbytes
        if self._opened.get(offset, 0) >= end or self._everything:
            return
        start = offset // _UNIT_NBYTES * _UNIT_NBYTES
        rounded = min(-(-end // _UNIT_NBYTES) * _UNIT_NBYTES, self._nbytes)
        try:
            _system.protect(self._address + start, rounded - start, _system.PROT_READ_WRITE)
        except OSError as error:
            pass_on_foreign(error)
            self.open_everything()
            return
        self._opened[offset] = end

    @property
    def protection(self) -> int:
        """How a range must be mapped that is put in the place of one of the mapping."""
        return _system.PROT_READ_WRITE if self._everything else _system.PROT_NONE

    def open_everything(self) -> None:
        """Let this process touch the whole mapping."""
        if not self._everything:
            _system.protect(self._address, self._nbytes, _system.PROT_READ_WRITE)
            self._everything = True

    def forget(self, offset: int) -> None:
        """A range that begins there may be closed: have it opened when it is used next."""
        self._opened.pop(offset, None)

    def close(self, offset: int, nbytes: int) -> None:
        """Let this process touch a range no more, but for units that it shares with others.

        `nbytes` is all that belongs to the range. Nobody may be using it.
        """
        self.forget(offset)
        with ignoring(OSError):
            self.closing_call(offset, nbytes)()

    def closing_call(self, offset: int, nbytes: int) -> Callable[..., object]:
        """Return a call of C that closes a range; whoever hears of it calls `forget`."""
        rounded = 0 if self._everything or offset % _UNIT_NBYTES else nbytes
        rounded = rounded // _UNIT_NBYTES * _UNIT_NBYTES
        return partial(_system.protect_ignoring, self._address + offset, rounded, _system.PROT_NONE)
