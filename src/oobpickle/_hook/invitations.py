"""Invitations: how a process that is older than the block comes to join.

**What.** `prefix` makes the bytes to put before an ordinary pickle.

**How it works.** They are opcodes of pickle that run one line of Python and drop its result; so
whoever loads the message attaches to the arena first, if it can. Whatever goes wrong there, a
library that cannot be imported or a limit of descriptors or address space, is swallowed, and the
object behind it is loaded as ever. ::

    GLOBAL builtins.exec | (code, {}) | REDUCE | POP | the pickle

**Lifetime.** The invitation names the process that made it; it is good while that lives.

**When it cannot.** The receiver goes on as it is, and gets its messages in-band.
"""

from __future__ import annotations

import struct
from typing import Final

_CODE: Final = """\
try:
 from oobpickle._api import accept
except Exception: pass
else: accept({name!r})
"""


def prefix(name: bytes) -> bytes:
    """Return what to put before a pickle.

    Parameters
    ----------
    name : bytes
        `Arena.name` of the sender.
    """
    code = _CODE.format(name=name).encode()
    return _START + struct.pack("<I", len(code)) + code + _END


_START: Final = b"\x80\x05cbuiltins\nexec\nX"
_END: Final = b"}\x86R0"


def without_prefix(message: memoryview) -> memoryview:
    """Return the pickle behind an invitation, or the message, if it is none."""
    if bytes(message[: len(_START)]) != _START:
        return message
    (nbytes,) = struct.unpack_from("<I", message, len(_START))
    return message[len(_START) + 4 + nbytes + len(_END) :]
