"""What is replaced while a hook is in: twenty objects of the standard library, and some of others.

**What.** `of_standard_library` and `of_libraries`.

**How it works.** Each object is replaced by a function of its own, made from it, which does what it
replaced unless the hook is in.

**Lifetime.** `Hook.put_in` and `Hook.take_out` (`installed`).

**When it cannot.** A library in which a place is missing is left as it is.
"""

from __future__ import annotations

import multiprocessing.connection as mp_connection
import multiprocessing.process as mp_process
import multiprocessing.queues as mp_queues
import multiprocessing.reduction as mp_reduction
import multiprocessing.spawn as mp_spawn
import multiprocessing.util as mp_util
import os
import subprocess
from typing import Any

from oobpickle._hook import loky, multiprocess, not_served
from oobpickle._hook.connections import hooked_pickler, hooked_recv, hooked_send_bytes
from oobpickle._hook.fileno import hooked_fileno
from oobpickle._hook.installed import Replacement
from oobpickle._hook.main_module import hooked_preparation
from oobpickle._hook.process_arguments import hooked_bootstrap
from oobpickle._hook.processes import (
    SPAWNING,
    hooked_dump,
    hooked_dup_fd,
    hooked_launch,
    hooked_pipe,
)
from oobpickle._hook.programs import (
    hooked_exec,
    hooked_execute_child,
    hooked_posix_spawn,
    hooked_spawnv_passfds,
    hooked_spawnvef,
    hooked_system,
)


def of_standard_library() -> list[Replacement]:
    """Return what is replaced in the standard library."""
    connection: Any = mp_connection.Connection
    return [
        (mp_connection, "_ForkingPickler", hooked_pickler),
        (mp_queues, "_ForkingPickler", hooked_pickler),
        (connection, "_send_bytes", hooked_send_bytes),
        (connection, "_recv", hooked_recv),
        (mp_connection._ConnectionBase, "fileno", hooked_fileno),
        (mp_connection, "Pipe", hooked_pipe),
        (mp_reduction, "dump", hooked_dump),
        (mp_reduction, "DupFd", hooked_dup_fd),
        *((popen, "_launch", hooked_launch) for popen in SPAWNING),
        (mp_spawn, "get_preparation_data", hooked_preparation),
        (mp_process.BaseProcess, "_bootstrap", hooked_bootstrap),
        (subprocess.Popen, "_execute_child", hooked_execute_child),
        (os, "execv", hooked_exec),
        (os, "execve", hooked_exec),
        (os, "posix_spawn", hooked_posix_spawn),
        (os, "posix_spawnp", hooked_posix_spawn),
        (os, "_spawnvef", hooked_spawnvef),
        (os, "system", hooked_system),
        (mp_util, "spawnv_passfds", hooked_spawnv_passfds),
    ]


def of_libraries() -> list[Replacement]:
    """Return what is replaced in libraries that are imported by now."""
    return loky.replacements() + multiprocess.replacements() + not_served.replacements()
