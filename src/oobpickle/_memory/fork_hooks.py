"""The fork hooks: one registration for the life of the process.

**What.** `start` has `oobpickle._core` told of every later fork of this process.

**How it works.** Before a fork what this process holds becomes ordinary memory; the child takes the
slot that was prepared for it (``_core/birth.c``). The work is in ``_core/fork.c``: in functions of
C no signal handler runs, and a pending Ctrl-C comes when they are done.

**Lifetime.** ``os.register_at_fork`` cannot be undone; with no arena the hooks do nothing. They run
for ``os.fork`` and everything built on it, not for ``subprocess`` or ``posix_spawn``, which need
nothing: the new program inherits no mapping.

**When it cannot.** A hook cannot prevent a fork. Of one from C code that runs no hooks the handlers
of ``pthread_atfork`` know (``_core/birth.c``); of a raw ``clone`` nobody does, and in its child
nothing is sent, received or released."""

from __future__ import annotations

import functools
import os

from oobpickle._native import core


@functools.cache
def start() -> None:
    """Register the hooks, once."""
    os.register_at_fork(
        before=core.fork_before,
        after_in_parent=core.fork_in_parent,
        after_in_child=core.fork_in_child,
    )
