"""Install and uninstall: how oobpickle gets into ``multiprocessing`` and out again.

**What.** `install`, `uninstall`, `enabled` and `statistics`; the warnings at the end of a block.

**How it works.** What is replaced is in `_hook.replacements`; each replacement does what it
replaced unless the hook is in.

**Lifetime.** From `install` to `uninstall`, or as long as one `enabled` block is open; in children
until they see the arena closed.

**When it cannot.** Without an arena `enabled` warns and yields an absent one, and everything stays
as it was.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.process as mp_process
import multiprocessing.util as mp_util
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from oobpickle import _statistics, _system
from oobpickle._arena import AbsentArena, Arena
from oobpickle._errors import ArenaError, FallbackWarning, NotServedWarning, RepeatedWarning
from oobpickle._fallback import Fallback, describe_fallbacks, describe_repeated
from oobpickle._foreign import ignoring
from oobpickle._hook import after, installed, not_served
from oobpickle._hook.channels import Channels
from oobpickle._hook.installed import Block, Hook, running
from oobpickle._hook.main_module import is_absent
from oobpickle._hook.processes import is_being_started
from oobpickle._hook.replacements import of_libraries, of_standard_library
from oobpickle._memory import arena as inner
from oobpickle._memory.options import Options, folder_named
from oobpickle._nbytes import nbytes_of
from oobpickle._statistics import Statistics

_F = TypeVar("_F", bound=Callable[..., Any])
Nbytes = int | float | str | None
Folder = str | bytes | os.PathLike[str] | None

_declined: deque[bytes] = deque(maxlen=64)  # identities of arenas that were offered
_absences: set[object] = set()  # of the blocks, and of an install(), that have to do without


def _inherit(*inherited: Any) -> None:
    """In a child that is being started: join the parent's arena."""
    *duplicates, channels = inherited
    descriptors = [duplicate.detach() for duplicate in duplicates]
    # The parent counts on us, but a process that cannot start is worse than one that cannot load.
    with ignoring(ArenaError, OSError):
        _join(inner.SharedArena.attach(*descriptors), channels, is_spawned=True)


def _hook(arena: inner.SharedArena, channels: Channels, said: Options, *, is_owner: bool) -> Hook:
    return Hook(
        arena, channels, said, is_owner=is_owner, inherit=_inherit, of_libraries=of_libraries
    )


def _join(arena: inner.SharedArena, channels: bytes = b"", *, is_spawned: bool = False) -> None:
    known = Channels(arena, channels)
    if is_spawned and is_absent():
        known.spawned.add(0)  # the parent has a main module that is not ours
    hook = _hook(arena, known, arena.options, is_owner=False)
    hook.installed = True
    _reset_guard_in_children()
    installed.start(hook, of_standard_library())
    if is_spawned:  # once its process object is loaded, and with it what that imports
        mp_util.register_after_fork(hook, Hook.look_for_libraries)
    _absences.discard(install)


def accept(name: bytes) -> None:
    """Join the arena of the process whose message is being loaded; see `_hook.invitations`.

    Not if this process has joined one already. Nothing that goes wrong here loses the message.
    """
    with ignoring(Exception), installed.guard:
        if running() is None and name[:16] not in _declined and not _system.lacking():
            _declined.append(name[:16])  # asked for once: what has failed would fail again
            _join(inner.SharedArena.find(name))


@functools.cache
def _reset_guard_in_children() -> None:
    os.register_at_fork(after_in_child=installed.guard._at_fork_reinit)  # type: ignore[attr-defined]


def _start(options: Options, block: Block | None = None) -> Hook | None:
    """Return the running hook, or put one in; ``None`` if this process has to do without.

    The `block` is noted before it is put in, so that no interrupt can leave a hook without one.
    """
    hook = running()
    if hook is not None:
        options.check_compatible(hook.said)
        if block is not None:
            hook.blocks.add(block)
        return hook
    if is_being_started():
        return None
    _reset_guard_in_children()
    installed.sweep()
    arena = inner.SharedArena.create(options)
    hook = _hook(arena, Channels(arena), options.resolve(), is_owner=True)
    if block is not None:
        hook.blocks.add(block)
    installed.start(hook, of_standard_library())
    return hook


def _options(
    capacity: Nbytes,
    threshold: Nbytes,
    wait_timeout: float | None,
    copies: bool | None,
    spill_dir: Folder,
) -> Options:
    sizes = nbytes_of("capacity", capacity), nbytes_of("threshold", threshold)
    return Options(*sizes, wait_timeout, copies, folder_named("spill_dir", spill_dir))


def install(
    *,
    capacity: Nbytes = None,
    threshold: Nbytes = None,
    wait_timeout: float | None = None,
    copy_on_receive: bool | None = None,
    spill_dir: Folder = None,
) -> Arena:
    """Send large messages of this process and its children out of band from now on.

    Parameters
    ----------
    capacity, threshold, wait_timeout, copy_on_receive, spill_dir
        As for `enabled`.

    Returns
    -------
    Arena
        The arena; the same one if it is installed already. In a process that is only just being
        started (the top level of a spawned child's main module) it is one without memory, since
        that process has joined its parent's.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range, or differs from the running arena's.
    ArenaError
        If this system cannot provide the memory.
    OSError
        If `spill_dir` cannot be used.

    See Also
    --------
    uninstall : the undo.
    """
    options = _options(capacity, threshold, wait_timeout, copy_on_receive, spill_dir)
    with installed.guard:
        older = installed.current
        hook = _start(options)
        if hook is None:
            _absences.add(install)
            return AbsentArena(options)
        hook.installed = True
        if hook is not older:
            try:
                _tell_of_memory(hook)
            except FallbackWarning:  # where warnings are errors
                uninstall()
                raise
        return hook.shown


def uninstall() -> None:
    """Undo `install`: restore what was replaced, and give every free block back to the system.

    Does nothing if nothing is installed. Inside an `enabled` block the end of the block does it.
    Objects that were received stay valid.
    """
    with installed.guard:
        _absences.discard(install)
        hook = installed.current
        if hook is not None:
            hook.installed = False
            if not hook.blocks:
                installed.stop(hook)
                if hook.is_owner:
                    after.watch(hook.made, hook.threshold, after.place_of(sys._getframe(1)))


class _CallMe(type):
    """Says what is wrong with ``with oobpickle.enabled:``."""

    def __enter__(cls) -> NoReturn:
        raise TypeError("enabled is a class; call it: with oobpickle.enabled():")

    def __exit__(cls, *_: object) -> None:
        """Never reached: there is no block."""


class enabled(contextlib.ContextDecorator, metaclass=_CallMe):
    """Send the large buffers of multiprocessing messages through shared memory inside the block.

    Parameters
    ----------
    capacity : int, float or str, optional
        The most bytes that the arena may occupy: ``4 << 30``, ``4e9``, ``"4GB"`` or ``"4GiB"``.
        Default: half of the machine's memory, or of the memory cgroup's limit. What is available
        is looked at again whenever fresh memory is taken.
    threshold : int, float or str, optional
        Messages of fewer bytes in all travel as they always did. Default: 128 KiB, the
        measured crossover.
    wait_timeout : float, optional
        How long a sender waits for room that others hold, seconds, before the message travels
        in-band. Default: as long as a pipe would take for it.
    copy_on_receive : bool, optional
        Whether receivers copy into ordinary memory and give the block back at once. Default: only
        when held blocks pass half of `capacity`; not messages above a quarter of it that fit; and
        with `spill_dir` never.
    spill_dir : str or path-like, optional
        A folder on a disk. When memory is full, messages go to a nameless file there, and come and
        go through the page cache, so that results larger than memory can be held; room on disk
        comes back with their arrays. Default: nothing is ever written to a disk.

    Yields
    ------
    Arena
        The arena; nested uses yield the same. Where the system offers no shared memory, a
        `FallbackWarning` says so, everything works as without oobpickle, and what is yielded is an
        arena without memory, whose statistics are zeros.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range, or differs from the running arena's; before anything starts.
    OSError
        If `spill_dir` is missing, full, read-only, or cannot do what is needed: the kind that the
        system gave, such as `FileNotFoundError`.

    Warns
    -----
    FallbackWarning
        Once, when the block is left, if messages travelled in-band although they were large enough.
        Once again if a large one goes through a pool, queue or pipe of the block after its end.
        When it is entered, if `spill_dir` is memory as well, as a tmpfs is.
    NotServedWarning
        The same if nothing went out of band, and a library was used that is not served.
    RepeatedWarning
        The same if one array went out ten times or more, unchanged, and was most of what was sent:
        `broadcast` stores it once.
    RuntimeWarning
        If what the call returns is dropped and was never entered: then nothing is enabled.

    Examples
    --------
    >>> import multiprocessing, numpy as np, oobpickle
    >>> with oobpickle.enabled() as arena:
    ...     with multiprocessing.get_context("fork").Pool(1) as pool:
    ...         total = pool.map(np.sum, [np.ones(100_000)] * 2)
    ...     arena.statistics().n_messages_out_of_band
    2
    """

    def __init__(
        self,
        *,
        capacity: Nbytes = None,
        threshold: Nbytes = None,
        wait_timeout: float | None = None,
        copy_on_receive: bool | None = None,
        spill_dir: Folder = None,
    ) -> None:
        self._options = _options(capacity, threshold, wait_timeout, copy_on_receive, spill_dir)
        self._blocks: list[Block] = []  # several if it is entered again, as by a decorated function
        self._is_used = False

    def __call__(self, function: _F) -> _F:
        self._is_used = True
        return super().__call__(function)

    def __enter__(self) -> Arena:
        self._is_used = True
        block = Block()
        self._blocks.append(block)
        try:
            return _enter(self._options, block)
        except BaseException:
            self._blocks.remove(block)
            installed.uninterrupted(_leave, block)
            raise

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        place = after.place_of(sys._getframe(1))
        left = installed.uninterrupted(_leave, self._blocks[-1], place)
        fallbacks, libraries, repeated = left
        self._blocks.pop()
        # Where warnings are errors, one must not take the place of an error of the program's.
        with contextlib.suppress(FallbackWarning) if error else contextlib.nullcontext():
            if fallbacks:
                warnings.warn(describe_fallbacks(fallbacks), FallbackWarning, stacklevel=2)
            elif libraries:
                warnings.warn(not_served.describe(libraries), NotServedWarning, stacklevel=2)
            if repeated:
                with contextlib.suppress(RepeatedWarning):  # advice, and never an error
                    warnings.warn(repeated, RepeatedWarning, stacklevel=2)

    def __del__(self) -> None:
        for block in getattr(self, "_blocks", ()):  # a Ctrl-C came before the first line inside
            installed.uninterrupted(_leave, block)
        # Not where the options were refused, nor of what the interpreter drops when it ends.
        if not getattr(self, "_is_used", True) and not sys.is_finalizing():
            warnings.warn(
                "oobpickle.enabled() was called and not entered, so nothing is enabled: write "
                "`with oobpickle.enabled():`, or call oobpickle.install()",
                RuntimeWarning,
                stacklevel=2,
            )


def _enter(options: Options, block: Block) -> Arena:
    with installed.guard:
        hook, older = None, installed.current
        try:
            hook = _start(options, block)
        except ArenaError as error:
            warnings.warn(
                f"oobpickle is not in use: {str(error).rstrip('.')}. "
                "Messages travel as without it.",
                FallbackWarning,
                stacklevel=3,
            )
        if hook is not None:
            if hook is not older:
                _tell_of_memory(hook, stacklevel=4)
            return hook.shown
        _absences.add(block)
        return AbsentArena(options)


def _tell_of_memory(hook: Hook, stacklevel: int = 3) -> None:
    """Warn of a folder on no disk, in which a new arena has its file."""
    if hook.arena.blocks.disk_is_memory:
        warnings.warn(
            f"spill_dir={hook.said.spill_dir!r} is in memory as well (tmpfs): it adds no room. "
            "Name a folder on a disk; `df` tells which those are.",
            FallbackWarning,
            stacklevel=stacklevel,
        )


def _leave(
    block: Block, place: tuple[str, int] | None = None
) -> tuple[dict[str, Fallback], list[str], str]:
    """Leave one block; return what to warn of, if it was the last one of the owner.

    That is the fallbacks, or the libraries that were used and not served, if nothing else was; and
    what is to be said of an array that was sent again and again.
    """
    with installed.guard:
        _absences.discard(block)
        hook = installed.current
        if hook is None or block not in hook.blocks:
            return {}, [], ""
        if len(hook.blocks) > 1 or hook.installed:
            hook.blocks.discard(block)
            return {}, [], ""
        repeated = hook.arena.blocks.repeated()
        is_owner, libraries = hook.is_owner, not_served.names(hook)
        installed.stop(hook)
        if not is_owner:
            return {}, [], ""
        if place is not None:
            after.watch(hook.made, hook.threshold, place)
        done = hook.arena.statistics()
        libraries = [] if done.n_messages_out_of_band else libraries
        return dict(done.fallbacks), libraries, describe_repeated(repeated, done.nbytes_out_of_band)


def statistics() -> Statistics:
    """Return the statistics of the arena in use; see `Arena.statistics`.

    Raises
    ------
    ArenaError
        If this process is not inside `enabled`, and `install` was not called. In a child process
        without arena there are zeros instead.
    """
    hook = running()
    if hook is not None:
        return hook.arena.statistics()
    if _absences or mp_process.parent_process() is not None:  # perhaps the parent has to do without
        return _statistics.nothing()
    raise ArenaError(
        "oobpickle is not enabled in this process. Call it inside enabled(); after the block, "
        "call statistics() of the arena that it yielded."
    )
