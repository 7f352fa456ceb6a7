"""What not every kernel does, tried out: ``needs_kernel("sock_diag")`` marks what needs it.

A probe does the thing itself, with system calls of its own and nothing of the library, and says
whether it had its effect. An emulator such as qemu-user fails some of them; a Linux of this day
must fail none, which is a test too (``unit/test_kernel.py``): so nothing is left out unnoticed.
``OOBPICKLE_KERNEL=emulated`` says that it is no Linux of this day.
"""

import ctypes
import functools
import mmap
import os
import socket
import struct

import pytest

IS_EMULATED = os.environ.get("OOBPICKLE_KERNEL") == "emulated"


def sock_diag():
    """Whether netlink names the peer of a Unix socket."""
    # struct nlmsghdr, struct unix_diag_req: all states, UDIAG_SHOW_PEER, no cookie.
    request = struct.Struct("<IHHIIBBHIIIII")
    left, right = socket.socketpair()
    with left, right:
        inode = os.fstat(left.fileno()).st_ino
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:  # NETLINK_SOCK_DIAG
                diag.settimeout(1)
                any_ = 0xFFFFFFFF
                head = (request.size, 20, 1, 1, 0)  # SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST
                diag.send(request.pack(*head, 1, 0, 0, any_, inode & any_, 4, any_, any_))
                answer = diag.recv(4096)
        except OSError:
            return False
        peer = os.fstat(right.fileno()).st_ino & any_
        return struct.pack("<HHI", 8, 2, peer) in answer  # UNIX_DIAG_PEER


def populate():
    """Whether advice makes pages at once."""
    libc = ctypes.CDLL(None)
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        anchor = ctypes.c_char.from_buffer(page)
        is_there = ctypes.create_string_buffer(1)
        try:
            address = ctypes.c_void_p(ctypes.addressof(anchor))
            nbytes = ctypes.c_size_t(mmap.PAGESIZE)
            refused = libc.madvise(address, nbytes, 23)  # MADV_POPULATE_WRITE
            unknown = libc.mincore(address, nbytes, is_there)
        finally:
            del anchor
    return not refused and not unknown and is_there.raw[0] & 1 == 1


#: Each probe, and what is missing where it fails.
PROBES = {
    "populate": (populate, "no advice (MADV_POPULATE_WRITE) that makes pages at once"),
    "sock_diag": (sock_diag, "no netlink that names the peer of a Unix socket"),
}


@functools.cache
def has(name):
    """Whether the kernel passes a probe."""
    return PROBES[name][0]()


def needs_kernel(name):
    """Return a mark: skip the test where the kernel fails the probe."""
    return pytest.mark.skipif(not has(name), reason=f"{name}: {PROBES[name][1]}")
