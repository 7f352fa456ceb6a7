"""Starts programs as forks of a process that has NumPy imported already: see `harness`.

**What.** ``python starter.py FD``: for each request that comes by the socket, a process that is
what ``python PROGRAM ARGUMENTS`` would be, a third of a second earlier. It leads a session.

**How it works.** A request is JSON, ``{"program", "arguments", "environment"}``, with three
descriptors: standard input, output and error. The answers are the pid, and when the process has
ended, its exit code. One at a time. What is imported here is of the standard library and NumPy,
which have no threads and no hooks at a fork (logging has, and concurrent.futures imports it);
oobpickle is imported by each program anew.

**Lifetime.** Until the other end of the socket is closed.
"""

import gc
import json
import multiprocessing.connection
import multiprocessing.managers
import multiprocessing.pool
import multiprocessing.shared_memory  # noqa: F401
import os
import socket
import sys
from pathlib import Path

import numpy.random  # noqa: F401


def serve(requests):
    """Answer requests; return the program and its code in each process that is to run it."""
    codes = {}
    while True:
        text, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not text:
            os._exit(0)
        request = json.loads(text)
        program = request["program"]
        if program not in codes:
            codes[program] = compile(Path(program).read_bytes(), program, "exec")
        pid = os.fork()
        if pid == 0:
            os.setsid()
            requests.send(b"%d" % os.getpid())
            requests.close()
            for to, fd in enumerate(fds):
                os.dup2(fd, to)
                os.close(fd)
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.argv[:] = [program, *request["arguments"]]
            sys.path[0] = os.path.dirname(program)
            return program, codes[program]
        for fd in fds:
            os.close(fd)
        _, status = os.waitpid(pid, 0)
        requests.send(b"%d" % os.waitstatus_to_exitcode(status))


def become(program, code):
    """Run a program's code as the main module, which has nothing else."""
    module = vars(sys.modules["__main__"])
    builtins = module["__builtins__"]
    module.clear()
    module.update(
        {
            "__name__": "__main__",
            "__doc__": None,
            "__package__": None,
            "__loader__": None,
            "__spec__": None,
            "__file__": program,
            "__cached__": None,
            "__builtins__": builtins,
        }
    )
    exec(code, module)


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # so that what only this process uses is not copied at each fork's first collection
    become(*serve(socket.socket(fileno=int(sys.argv[1]))))
