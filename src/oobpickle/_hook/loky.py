"""What is replaced in joblib and loky, so that their messages go out of band too.

**What.** `replacements` lists what is replaced in those that are imported: ``dumps`` of loky's
queues, what starts its workers, how it measures a worker's memory, and the pickler of joblib's
``multiprocessing`` backend. joblib has a loky of its own, ``joblib.externals.loky``.

**How it works.** Both pickle by themselves, and give the bytes to connections of multiprocessing,
which are hooked already. Their pickler, with their reducers, writes into a
`oobpickle._core.Message`. Where joblib would send an array by value our reducer takes its place;
an array that joblib keeps in a file stays there.

loky makes the descriptors that a worker inherits inheritable for good. So it gets duplicates of
the arena's, which are closed when the worker is launched. It replaces workers whose memory grows;
pages of shared memory and of files are not counted.

**Lifetime.** Each asks at call time whether the hook is in. What is imported inside the block is
replaced when it makes its first pipe (`processes.hooked_pipe`); in a worker, when its process
object is loaded.

**When it cannot.** What a release of theirs does not have is not replaced, nor a pickler that is
not in C: those messages travel as they would without us.
"""

from __future__ import annotations

import multiprocessing.context as mp_context
import multiprocessing.process as mp_process
import os
import pickle
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Final

from oobpickle import _envelope
from oobpickle._foreign import ignoring
from oobpickle._hook import installed
from oobpickle._hook.connections import to_send
from oobpickle._hook.installed import Hook, Replacement, running
from oobpickle._hook.libraries import is_known, of_loky
from oobpickle._hook.processes import Inheritance, dropped, hooked_dup_fd
from oobpickle._memory.descriptors import File, close_if, file_of
from oobpickle._native import core

_PROTOCOL: Final = 5
_DISPATCH_TABLE: Final[Any] = vars(pickle.Pickler)["dispatch_table"]  # as the pickler in C has it
_MOMENT_S: Final = 0.05
_NOT_ITS_OWN: Final = ("RssShmem:", "RssFile:")  # pages of the arena, and of mapped files
_MADE_IN: Final = "_oobpickle_arena"  # of an executor: the identity of the arena

#: By process object: the duplicates of our descriptors that its worker inherits.
_inherited: Final[weakref.WeakKeyDictionary[Any, _Duplicates]] = weakref.WeakKeyDictionary()


def replacements() -> list[Replacement]:
    """Return what is to be replaced in what is imported by now."""
    wanted: list[tuple[Any, str, Callable[[Any], Any]]] = [
        *((module, "dumps", hooked_dumps) for module in of_loky("backend.queues")),
        *((module, "dump", hooked_dump) for module in of_loky("backend.reduction")),
        *((module, "DupFd", hooked_dup_fd) for module in of_loky("backend._posix_reduction")),
        *(
            (module.LokyProcess, "_Popen", hooked_popen)
            for module in of_loky("backend.process")
            if hasattr(module, "LokyProcess")
        ),
        *(
            (module, "_get_memory_usage", hooked_memory_usage)
            for module in of_loky("process_executor")
        ),
        *(
            (module._ReusablePoolExecutor, "get_reusable_executor", hooked_get)
            for module in of_loky("reusable_executor")
            if hasattr(module, "_ReusablePoolExecutor")
        ),
    ]
    pool: Any = sys.modules.get("joblib.pool")
    if hasattr(pool, "BytesIO") and hasattr(pool, "CustomizablePickler"):
        wanted += [(pool, "BytesIO", hooked_buffer), (pool, "CustomizablePickler", hooked_pickler)]
    return [one for one in wanted if hasattr(one[0], one[1])]


# --- taking messages apart


def hooked_dumps(original: Any) -> Any:
    namespace = getattr(original, "__globals__", {})  # of loky.backend.reduction

    def dumps(obj: object, reducers: Any = None, protocol: int | None = None) -> Any:
        hook = installed.current
        kind = namespace.get("_LokyPickler")
        if hook is None or protocol is not None or hook.arena.blocks.closed or not is_known(kind):
            running()
            return original(obj, reducers=reducers, protocol=protocol)
        start_ns = time.perf_counter_ns()
        message = _taken_apart(hook, obj, kind, namespace.get("_dispatch_table", {}), reducers)
        return to_send(hook, message, sys._getframe(1), start_ns)

    return dumps


def _taken_apart(
    hook: Hook, obj: object, kind: Any, own: Mapping[type, Any], reducers: Any
) -> core.Message:
    """Pickle with their pickler, which has reducers and a way with functions of its own.

    Its constructor has no argument for the callback, and copies a table of which most is the same
    for each message: so what it does is done here, and `own` are the reducers of all its messages.
    """
    base: Any = getattr(kind, "_loky_pickler_cls", pickle.Pickler)
    special: dict[type, Any] = {} if base is pickle.Pickler else {**base.dispatch_table.maps[0]}
    special.update(own)
    arrays = _Arrays()
    for cls, reducer in (reducers or {}).items():
        special[cls] = arrays.instead_of(reducer)
    message = core.Message(
        hook.destination, hook.threshold, _envelope.tables(special), hook.arena.blocks
    )
    message.keeps_flags = True  # as the protocol that they use
    pickler = kind.__new__(kind)
    base.__init__(pickler, message, protocol=_PROTOCOL, buffer_callback=message.take)
    _DISPATCH_TABLE.__set__(pickler, message.table)
    try:
        arrays.message = message
        pickler.dump(obj)
    except BaseException:
        message.clear()
        raise
    finally:
        arrays.message = None
    return message


class _Arrays:
    """Reducers in the place of joblib's, for arrays that it would send by value.

    Attributes
    ----------
    message : Message or None
        What is being taken apart. Not for longer: it has these reducers, and nobody would find the
        cycle.
    """

    message: core.Message | None = None

    def instead_of(self, reducer: Any) -> Any:
        """Return ours in the place of a reducer of joblib's, and any other reducer as it is."""
        joblib: Any = sys.modules.get("joblib._memmapping_reducer")
        if not hasattr(joblib, "_get_backing_memmap") or not hasattr(joblib, "JOBLIB_MMAPS"):
            return reducer
        forward = getattr(joblib, "ArrayMemmapForwardReducer", None)
        if forward is not None and type(reducer) is forward:
            return _with(self, _forward, joblib, reducer)
        if reducer is getattr(joblib, "reduce_array_memmap_backward", self):
            return _with(self, _backward, joblib, reducer)
        return reducer

    def by_value(self, array: Any) -> Any:
        """Reduce an array as one that no file has."""
        import numpy as np

        assert self.message is not None, "the reducers outlive their message"
        return self.message.reduce_array(np.asarray(array))


def _with(arrays: _Arrays, call: Callable[..., Any], joblib: Any, reducer: Any) -> Any:
    def reduce(array: Any) -> Any:
        return call(arrays, joblib, reducer, array)

    return reduce


def _forward(arrays: _Arrays, joblib: Any, reducer: Any, array: Any) -> Any:
    """An argument: above a size joblib writes it to a file, which all workers map."""
    most = getattr(reducer, "_max_nbytes", 0)
    in_file = joblib._get_backing_memmap(array) is not None
    if in_file or array.dtype.hasobject or (most is not None and array.nbytes > most):
        return reducer(array)
    return arrays.by_value(array)


def _backward(arrays: _Arrays, joblib: Any, reducer: Any, array: Any) -> Any:
    """A result: what is in a file of the user's is mapped again, all else is sent by value."""
    in_file = joblib._get_backing_memmap(array)
    is_users = in_file is not None and getattr(in_file, "filename", None) not in joblib.JOBLIB_MMAPS
    if array.dtype.hasobject or (is_users and hasattr(in_file, "filename")):
        return reducer(array)
    return arrays.by_value(array)


# --- joblib's own pool


def hooked_buffer(original: Any) -> Any:
    class Buffer(original):  # type: ignore[misc]
        """What joblib's queue pickles into, and then sends the value of."""

        taken: tuple[Hook, core.Message, int] | None = None

        def getvalue(self) -> Any:
            taken, self.taken = self.taken, None
            if taken is None:
                return super().getvalue()
            hook, message, start_ns = taken
            return to_send(hook, message, sys._getframe(1), start_ns)

    return Buffer


def hooked_pickler(original: Any) -> Any:
    def CustomizablePickler(writer: Any, reducers: Any = None, *args: Any, **kwargs: Any) -> Any:
        hook = running()
        is_ours = hook is not None and hasattr(writer, "taken") and not (args or kwargs)
        if is_ours and is_known(original):
            return _Dumper(hook, writer, original, reducers)
        return original(writer, reducers, *args, **kwargs)

    return CustomizablePickler


class _Dumper:
    """In the place of a pickler that is made for one object."""

    def __init__(self, hook: Any, buffer: Any, kind: Any, reducers: Any) -> None:
        self._given = hook, buffer, kind, reducers

    def dump(self, obj: object) -> None:
        hook, buffer, kind, reducers = self._given
        start_ns = time.perf_counter_ns()
        buffer.taken = hook, _taken_apart(hook, obj, kind, {}, reducers), start_ns


# --- workers


class _Duplicates:
    """Duplicates of descriptors, which are closed with this object."""

    def __init__(self) -> None:
        self._files: list[tuple[int, File]] = []

    def make(self, descriptors: Sequence[int]) -> None:
        for fd in descriptors:
            duplicate = os.dup(fd)
            self._files.append((duplicate, file_of(duplicate)))

    @property
    def numbers(self) -> list[int]:
        return [fd for fd, _ in self._files]

    def __del__(self) -> None:
        for fd, file in self._files:
            close_if(fd, file)


def hooked_dump(original: Any) -> Any:
    def dump(obj: object, file: IO[bytes], *args: Any, **kwargs: Any) -> None:
        popen: Any = mp_context.get_spawning_popen()
        hook = running() if popen is not None and isinstance(obj, mp_process.BaseProcess) else None
        if hook is not None and hook.arena.can_be_inherited():
            duplicates = _Duplicates()
            with ignoring(OSError):  # none is left: the worker starts all the same
                duplicates.make(hook.arena.descriptors)
                _inherited[obj] = duplicates
                file.write(dropped(Inheritance(hook, duplicates.numbers)))
        original(obj, file, *args, **kwargs)

    return dump


def hooked_popen(original: Any) -> Any:
    function = getattr(original, "__func__", original)

    def _Popen(process_obj: object) -> Any:
        try:
            return function(process_obj)
        finally:
            _inherited.pop(process_obj, None)

    return staticmethod(_Popen)


def hooked_get(original: Any) -> Any:
    """An executor that is older than the block is replaced, if nobody is using it."""
    function = getattr(original, "__func__", None)
    if function is None:
        return original  # no class method any more

    def get_reusable_executor(cls: Any, *args: Any, **kwargs: Any) -> Any:
        hook = running()
        if hook is None:
            return function(cls, *args, **kwargs)
        storage, name = _storage_in(function.__globals__)
        older: Any = storage.get(name)
        is_older = older is not None and getattr(older, _MADE_IN, None) != hook.arena.identity
        # Whoever asks for the older one as it is says no arguments; joblib always says them.
        is_wanted = kwargs.get("reuse") is True and "get_reusable_executor" in vars(cls)
        is_kept = is_older and (is_wanted or not _becomes_idle(older))
        if is_older and not is_kept:
            kwargs["reuse"] = False  # as if other arguments were given
        older = None
        found = function(cls, *args, **kwargs)
        if not is_kept:
            made = found[0] if isinstance(found, tuple) else found
            setattr(made, _MADE_IN, hook.arena.identity)
        return found

    return classmethod(get_reusable_executor)


def _becomes_idle(executor: Any) -> bool:
    """Tell whether an executor has nothing to do, in a moment at most.

    To shut down one that is in use would be to wait for its user, perhaps for ever.
    """
    until = time.monotonic() + _MOMENT_S
    while getattr(executor, "_pending_work_items", True):
        if time.monotonic() > until:
            return False
        time.sleep(_MOMENT_S / 50)
    return True


def _storage_in(namespace: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return where loky has its reusable executor: one for each thread, before 3.7 one for all."""
    if "_executor_storage" in namespace:
        return vars(namespace["_executor_storage"]), "executor"
    return namespace, "_executor"


def hooked_memory_usage(original: Any) -> Any:
    def _get_memory_usage(pid: int, *args: Any, **kwargs: Any) -> int:
        nbytes = int(original(pid, *args, **kwargs))
        if installed.current is None:
            return nbytes
        with ignoring(OSError, ValueError), open(f"/proc/{pid}/status") as file:
            sizes = [line.split()[1] for line in file if line.startswith(_NOT_ITS_OWN)]
            return max(0, nbytes - 1024 * sum(map(int, sizes)))
        return nbytes

    return _get_memory_usage
