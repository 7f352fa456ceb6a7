"""One object, stored once, for every process that a message brings it to.

**What.** `broadcast`, which is the public side of `_published`.

**How it works.** Inside a block the object goes into the arena in use.

**Lifetime.** See `_published`.

**When it cannot.** Then the handle sends the object by value, which is counted as a fallback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from oobpickle import _published
from oobpickle._errors import ArenaFullError
from oobpickle._hook.installed import running

if TYPE_CHECKING:
    from oobpickle._published import Broadcast

T = TypeVar("T")


def broadcast(obj: T, *, readonly: bool = False) -> Broadcast[T]:
    """Store an object once, for every process that is to have it.

    Send the handle in the place of the object, at any depth of a message: in arguments and
    results of a pool, in ``initargs``, in ``functools.partial``, in a closure, through queues
    and pipes. The receiver's function gets the object itself, without a copy, so it stays as it
    is.

    Parameters
    ----------
    obj : object
        Anything that pickles. It is the value of now: later changes to `obj` are not seen.
    readonly : bool, optional
        Whether arrays arrive so that NumPy refuses to write to them. Slices of such arrays travel
        as references, too. By default what arrives is writable and independent: a page that a
        receiver writes to becomes its own.

    Returns
    -------
    Broadcast
        The handle. In this process `Broadcast.value` is the object.

    Raises
    ------
    Exception
        Whatever pickling `obj` raises; nothing stays stored.

    Notes
    -----
    The memory is free when the last handle, message and array of it is gone, in any process,
    however those processes end; `Broadcast.close` drops a handle's part at once. What a killed
    process had is found when the next handle is dropped, or when somebody needs room. It counts
    towards the arena's ``capacity``. A process that is forked while this one has the handle, or
    an array of it, may use what it inherits for as long as it likes, and no page is copied for
    that.

    The object is copied once, here. What arrives costs page tables, and a page of its own for
    each page that is written to. Objects that are mostly small Python objects gain nothing:
    they are unpickled by each receiver.

    Outside of `enabled`, where memory is full, for a receiver that has not joined, over TCP,
    and in a plain ``pickle.dumps``, the handle travels as the object, by value.

    Examples
    --------
    >>> import multiprocessing, numpy as np, oobpickle
    >>> def weigh(table, row):
    ...     return float(table[row].sum())
    >>> from functools import partial
    >>> with oobpickle.enabled(), oobpickle.broadcast(np.ones((1000, 1000))) as table:
    ...     with multiprocessing.get_context("fork").Pool(2) as pool:
    ...         pool.map(partial(weigh, table), [0, 1])
    [1000.0, 1000.0]
    """
    hook = running()
    if hook is not None:
        try:
            return _published.store(obj, hook.arena, readonly=readonly)
        except ArenaFullError as error:
            handle = _published.store(obj, None, readonly=readonly)
            hook.count_fallback(error.reason, handle.nbytes)
            return handle
    return _published.store(obj, None, readonly=readonly)
