"""A process that loads what it is sent, and says when it has.

What
    `worker` starts it, `timed` sends it something.

How it works
    It answers each message with the CPU seconds that it took.

Lifetime
    It ends when the connection to it is closed.

When it cannot
    An object that cannot be loaded there ends it.
"""

from __future__ import annotations

import multiprocessing.reduction
import time
from multiprocessing.connection import Connection
from typing import Any


def serve(connection: Connection) -> None:
    """Load messages until there are none."""
    while True:
        start_s = time.process_time()
        try:
            message = connection.recv()
        except EOFError:
            return
        connection.send(time.process_time() - start_s)
        del message


def worker(context: Any) -> tuple[Connection, Any]:
    """Start a process that loads; return the connection to it, and the process."""
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()
    return ours, process


def timed(connection: Connection, obj: object, *, is_plain: bool = False) -> float:
    """Return the seconds until the other side has rebuilt the object.

    With `is_plain` it is pickled as without a hook, also by a process that has one.
    """
    return timed_both(connection, obj, is_plain=is_plain)[0]


def timed_both(
    connection: Connection, obj: object, *, is_plain: bool = False
) -> tuple[float, float]:
    """Return the same, and the CPU seconds of both sides."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    if is_plain:
        connection.send_bytes(multiprocessing.reduction.ForkingPickler.dumps(obj))
    else:
        connection.send(obj)
    other_s: float = connection.recv()
    return time.perf_counter() - start_s, time.process_time() - start_cpu_s + other_s
