"""The hook of this process: which arena its messages go through, and what was replaced for it.

**What.** `Hook`, the one that is in (`current`), and `start` and `stop`.

**How it works.** Whoever sends or receives looks at `current`; `running` is the same after a look
whether the owner has closed the arena meanwhile, and if so takes the hook out.

**Lifetime.** The process that installs owns the arena and closes it with the last exit. Children
inherit the hook; they take it out when they see the arena closed. An arena that is still needed by
an object lingers until a `sweep` finds that it is not.

**When it cannot.** It cannot fail.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from oobpickle import _arena, _envelope, _fallback, _in_files
from oobpickle._hook.channels import Channels
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._native import core

T = TypeVar("T")

#: Who has the object, its name there, and what makes its replacement from it.
Replacement = tuple[Any, str, Callable[[Any], Any]]

current: Hook | None = None
_MOST_INTERRUPTS: Final = 100
_MOST_LINGERING: Final = 8  # each costs four descriptors and 64 MiB of address space
_MOST_COPIED_NBYTES: Final = 64 << 20
lingering: Final[list[SharedArena]] = []
guard: Final = threading.RLock()


class Block:
    """An `enabled` block."""

    __slots__ = ("__weakref__",)


class Hook:
    """One arena in place under multiprocessing in this process.

    Parameters
    ----------
    arena : SharedArena
        What messages go through.
    channels : Channels
        Where they may go.
    said : Options
        What later uses are compared with: what was said here, with the defaults filled in.
    is_owner : bool
        Whether this process made the arena and closes it.
    inherit : callable
        What a child that is being started calls to join: with the arena's descriptors, and
        `Channels.to_bytes`.
    of_libraries : callable
        Returns what is to be replaced in libraries that are imported by now.
    """

    def __init__(
        self,
        arena: SharedArena,
        channels: Channels,
        said: Options,
        *,
        is_owner: bool,
        inherit: Callable[..., None],
        of_libraries: Callable[[], list[Replacement]],
    ) -> None:
        self.arena = arena
        self.shown = _arena.Arena(arena)  # to the program
        self.said = said
        self.channels = channels
        self.spawned = channels.spawned  # mostly empty; every message asks
        self.threshold = arena.options.threshold or 0
        self.destination: core.Blocks | None = (
            arena.blocks
        )  # for the buffers of the next message; None: memory
        self.n_asking = 0  # how many small messages to come may ask an older process to join
        # The enabled() blocks that are open; one that an interrupt kept from being left is dropped.
        self.blocks: weakref.WeakSet[Block] = weakref.WeakSet()
        # Connections that were made meanwhile: see `after`.
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()
        self.kept = _in_files.Kept(arena.blocks)
        self.not_served: set[str] = set()  # libraries through which large messages went
        self.installed = False  # install() was called
        self.leaving = False
        self.inherit = inherit
        self._of_libraries = of_libraries
        self._is_owner = is_owner
        self._epoch = core.epoch()
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    @property
    def is_owner(self) -> bool:
        """Whether this very process, not one that was forked from it, made the arena."""
        return self._is_owner and core.epoch() == self._epoch

    def put_in(self, replacements: Iterable[Replacement]) -> None:
        """Replace objects of the standard library; `take_out` is the undo."""
        done = {(id(owner), name) for owner, name, _, _ in self._replaced}
        for owner, name, make in replacements:
            if (id(owner), name) in done:
                continue
            done.add((id(owner), name))
            original = _attribute(owner, name)
            ours = make(original)
            self._replaced.append((owner, name, ours, original))
            setattr(owner, name, ours)

    def look_for_libraries(self) -> None:
        """Replace what is to be replaced in libraries that were imported meanwhile."""
        if guard.acquire(blocking=False):  # else somebody is putting it in or taking it out
            try:
                if current is self and not self.leaving:
                    self.put_in(self._of_libraries())
            finally:
                guard.release()

    def has_replaced(self, owner: Any, name: str) -> bool:
        """Tell whether something of ours was put there."""
        return any((owner, name) == (one[0], one[1]) for one in self._replaced)

    def take_out(self) -> None:
        """Restore what was there, unless somebody has put something else in its place since."""
        while self._replaced:
            owner, name, ours, original = self._replaced[-1]
            if _attribute(owner, name) is ours:
                setattr(owner, name, original)
            self._replaced.pop()

    def count_fallback(self, reason: str, nbytes: int) -> None:
        """Count a message of that many bytes that travels in-band for one of the reasons.

        Not one that met the closing of the arena: it travels as without oobpickle, as it would
        have a moment later, and there is nothing to warn of.
        """
        if reason == "detached" and self.arena.closed:
            return
        n_messages_at, nbytes_at = _fallback.fallback_counters(reason)
        self.arena.blocks.count(n_messages_at, 1, nbytes_at, nbytes)


def _attribute(owner: Any, name: str) -> Any:
    """Return what stands there: of a class method the object, not a method that is bound anew."""
    return vars(owner).get(name, getattr(owner, name, None))


def running() -> Hook | None:
    """Return the hook, if its arena is open; take it out if the owner has closed the arena."""
    hook = current
    if hook is None or not hook.arena.blocks.closed:
        return hook
    if guard.acquire(blocking=False):  # else somebody is putting it in or taking it out
        try:
            stop(hook)
        finally:
            guard.release()
    return None


def start(hook: Hook, replacements: Iterable[Replacement]) -> None:
    """Put the hook in."""
    global current
    try:
        _envelope.introduce(hook.arena)
        hook.put_in(replacements)
        hook.put_in(hook._of_libraries())
        current = hook
    except BaseException:  # a Ctrl-C
        current = hook
        stop(hook)
        raise


def stop(hook: Hook) -> None:
    """Take the hook out, if it is in, and close the arena if this process owns it.

    Whatever interrupts it, it is done when this returns or raises.
    """
    if current is not hook or hook.leaving:
        return
    uninterrupted(_leave, hook)


def uninterrupted(call: Callable[..., T], *args: Any) -> T:
    """Return ``call(*args)``, made again for as long as something interrupts it.

    A Ctrl-C that came meanwhile is raised when it is done.
    """
    interrupt: BaseException | None = None
    for _ in range(_MOST_INTERRUPTS):
        try:
            result = call(*args)
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
    return result


def _leave(hook: Hook) -> None:
    """Do what is still to do."""
    global current
    hook.leaving = True
    arena = hook.arena
    if arena not in lingering:
        # While it is closed the hook still says which messages this process is about to read.
        if hook.is_owner:
            arena.close()
        elif not arena.closed:
            # It goes on receiving without saying when: so nothing is reclaimed while it lives.
            arena.blocks.read_for_ever()
        current = None
        hook.kept.messages.clear()
        arena.detach()
        hook.take_out()
        lingering.append(arena)
    sweep()


def sweep() -> None:
    """Unmap the arenas of earlier blocks that nobody needs any more.

    If there are many, the oldest go although something of them is held; not if it is much.
    """
    for arena in list(lingering):
        is_old = len(lingering) > _MOST_LINGERING
        if arena.try_destroy(most_nbytes=_MOST_COPIED_NBYTES if is_old else 0):
            lingering.remove(arena)
            _envelope.forget(arena)
