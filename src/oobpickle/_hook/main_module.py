"""The main module of a program, and whether the processes that it spawns can import it.

**What.** `is_lost` tells that they cannot. `hooked_preparation` has them not even try.

**How it works.** A spawned child gets the main module by its file or its name. A notebook, ``python
-c`` and standard input have neither, and the ``__main__`` of a package is left alone by
`multiprocessing`. What such a module has goes by value to these children.

**Lifetime.** No state; the replacement asks whether the hook is in, and else does what it replaced.

**When it cannot.** What was defined after a file was read, in an interactive session, is not seen.
"""

from __future__ import annotations

import multiprocessing.process as mp_process
import os
import sys
from typing import Any, Final

from oobpickle._hook.installed import running

_BY_PATH: Final = "init_main_from_path"


def is_lost() -> bool:
    """Tell whether processes that are spawned now cannot import the main module of this one."""
    main = sys.modules.get("__main__")
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:
        return bool(name == "__main__" or name.endswith(".__main__"))
    path = getattr(main, "__file__", None)
    return path is None or not _is_run_again(path)


def is_absent() -> bool:
    """Tell whether this process was spawned without the main module of its parent."""
    return "__mp_main__" not in sys.modules


def _is_run_again(path: str) -> bool:
    folder = getattr(mp_process, "ORIGINAL_DIR", None)
    is_there = os.path.exists(os.path.join(folder or "", path))
    return is_there and os.path.splitext(os.path.basename(path))[0] != "ipython"


def hooked_preparation(original: Any) -> Any:
    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = original(name)
        # Standard input has "<stdin>" for its file, and the child would end in looking for it.
        if running() is not None and not os.path.exists(data.get(_BY_PATH, "/")):
            del data[_BY_PATH]
        return data

    return get_preparation_data
