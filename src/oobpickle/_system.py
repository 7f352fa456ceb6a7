"""What this system offers: whether there can be an arena, and numbers that Python does not name.

**What.** `lacking` says why there can be no arena here; two queries of pipes and sockets.

**How it works.** Looked at once. The system calls themselves are in the extension module.

**Lifetime.** No state.

**When it cannot.** `SUPPORTED` is false on anything but 64-bit Linux with ``/proc``.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from oobpickle._native import core, reason

SUPPORTED: Final = (
    sys.platform == "linux" and sys.maxsize > 2**32 and os.path.isdir("/proc/self/fd")
)
#: What the extension module was made for; on ARM there are kernels with larger pages.
PAGE_NBYTES: Final = 4096
#: Of the build: with ``PYTHON_GIL=1`` its collector and reference counts are still other ones.
FREE_THREADED: Final = "t" in getattr(sys, "abiflags", "")
#: Source: ioctl_tty(2), tcp(7) and the kernel's sockios.h.
FIONREAD: Final = 0x541B
SIOCOUTQ: Final = 0x5411


def _has_gil() -> bool:
    return not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled()


def lacking() -> str | None:
    """Return what an arena needs and is not here, and what to do; ``None`` if all is here."""
    if not SUPPORTED:
        return "this needs 64-bit Linux with /proc"
    page_nbytes = os.sysconf("SC_PAGE_SIZE")
    if page_nbytes != PAGE_NBYTES:
        return (
            f"the pages of this kernel have {page_nbytes} bytes, and shared memory is laid out for "
            f"{PAGE_NBYTES}. Use a kernel with pages of that size"
        )
    if FREE_THREADED or not _has_gil():
        return (
            "this is a free-threaded Python, whose threads run at the same time, and what is done "
            "to shared memory between two bytecodes has not been made safe for that. Use the "
            "ordinary build of the same version (python3.14, not python3.14t)"
        )
    if core is None:
        return (
            f"the extension module oobpickle._core is not here ({reason}). Install a wheel of "
            "oobpickle for this platform, or install a C compiler and build it again: "
            "pip install --force-reinstall oobpickle"
        )
    return None
