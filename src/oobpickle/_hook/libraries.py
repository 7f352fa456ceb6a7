"""Libraries that have picklers of their own: which modules of theirs are imported.

**What.** `of_loky` finds loky's modules, in both places where it may be.

**How it works.** By their names in ``sys.modules``: nothing is imported for anybody.

**Lifetime.** No state.

**When it cannot.** A copy of loky under another name is not found, and its messages travel in-band.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections import ChainMap
from types import FrameType, ModuleType
from typing import Any, Final

LOKY: Final = ("loky", "joblib.externals.loky")
_WITH_POOLS: Final = ("joblib", "loky")
_OURS: Final = "oobpickle"


def of_loky(name: str) -> list[ModuleType]:
    """Return the modules of that name in each loky that is imported.

    Parameters
    ----------
    name : str
        Below the package: ``"backend.queues"``.
    """
    found = [sys.modules.get(f"{package}.{name}") for package in LOKY]
    return [module for module in found if module is not None]


def of_multiprocess() -> list[ModuleType]:
    """Return the module with the queues of multiprocess, if it is imported."""
    found = sys.modules.get("multiprocess.queues")
    return [] if found is None else [found]


def is_known(kind: Any) -> bool:
    """Tell whether a pickler of loky's is in C, and made by nobody else (``set_loky_pickler``)."""
    base = getattr(kind, "_loky_pickler_cls", pickle.Pickler)
    if base is pickle.Pickler:
        return isinstance(kind, type) and issubclass(kind, base)
    table = getattr(base, "dispatch_table", None)  # of cloudpickle: its own, then copyreg's
    return (
        "cloudpickle" in str(base.__module__).split(".")
        and issubclass(base, pickle.Pickler)
        and isinstance(table, ChainMap)
        and table.maps[1:] == [copyreg.dispatch_table]
    )


def serves(name: str) -> bool:
    """Tell whether what a module of joblib or loky reads is made by their pickler, which is served.

    Parameters
    ----------
    name : str
        Of the module.
    """
    if name == "joblib.pool":
        return _is_ours(getattr(sys.modules.get(name), "CustomizablePickler", None))
    for package in LOKY:
        if name.startswith(f"{package}."):
            queues = sys.modules.get(f"{package}.backend.queues")
            reduction = sys.modules.get(f"{package}.backend.reduction")
            is_ours = _is_ours(getattr(queues, "dumps", None))
            return is_ours and is_known(getattr(reduction, "_LokyPickler", None))
    return False


def unserved(name: str) -> str:
    """Return joblib or loky, if a module is of one of them, and is not served; else nothing.

    Parameters
    ----------
    name : str
        Of the module.
    """
    library = name.partition(".")[0]
    return library if library in _WITH_POOLS and not serves(name) else ""


def calls(frame: FrameType | None) -> bool:
    """Tell whether a frame, or the one that has called it, is of joblib or loky.

    They keep their workers for calls to come, whatever block is open then.
    """
    names = [str(one.f_globals.get("__name__")) for one in (frame, frame and frame.f_back) if one]
    return any(name.partition(".")[0] in _WITH_POOLS for name in names)


def _is_ours(function: object) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == _OURS
