"""The extension module `oobpickle._core`, or the reason why it is not here.

**What.** `core`, and `reason`: empty if it could be imported.

**How it works.** A package that was built where nothing can be compiled has none: it imports and
works, and everything travels in-band. `_system.lacking` says so.

**Lifetime.** Looked for once.

**When it cannot.** `core` is ``None`` then; nobody may use it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

reason = ""
if TYPE_CHECKING:
    from oobpickle import _core

    core = _core
else:
    try:
        core = importlib.import_module("oobpickle._core")
        core.Blocks  # noqa: B018  a folder of that name is a package without content
    except (ImportError, AttributeError) as error:
        core, reason = None, str(error)
