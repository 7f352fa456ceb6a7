"""Names of the main module: what a file must not refer to, since no other program finds it.

**What.** `refuse_main` raises if a stream refers to a class or function of ``__main__``.

**How it works.** A stream without these letters does not. Otherwise its opcodes are read, and the
two strings compared that each ``STACK_GLOBAL`` takes; nothing is loaded.

**Lifetime.** No state.

**When it cannot.** A name that is put together when it is loaded is not seen."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Final

#: Of the program itself, and what it is in children that are spawned.
_MAIN: Final = ("__main__", "__mp_main__")


def refuse_main(stream: Sequence[bytes]) -> None:
    """Raise ``pickle.PicklingError`` if a stream refers to the main module."""
    if not any(name.encode() in piece for piece in stream for name in _MAIN):
        return
    found = sorted({name for module, name in _globals_in(b"".join(stream)) if module in _MAIN})
    if found:
        names = ", ".join(found[:5])
        raise pickle.PicklingError(
            f"oobpickle.dump: {names} of the main module: only this program finds that by its "
            "name, and the file could not be loaded by another one. Put it in a module of its own "
            "and import it."
        )


def _globals_in(stream: bytes) -> Iterator[tuple[str, str]]:
    """Yield module and name of each global that a stream of protocol 5 refers to."""
    import pickletools

    memo: list[str] = []
    before = last = ""  # what was put on the stack, and "" for what is no text
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "MEMOIZE":
            memo.append(last)
        elif opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            yield module, name
            last = ""
        elif opcode.name == "STACK_GLOBAL":
            yield before, last
            last = ""
        elif opcode.name.endswith("BINGET"):
            before, last = last, memo[int(argument or 0)]
        elif opcode.name != "FRAME":
            before, last = last, argument if isinstance(argument, str) else ""
