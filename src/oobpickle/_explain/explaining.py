"""Explain: where the bytes and the seconds of an object go, before it is sent.

**What.** `explain`.

**How it works.** The object is walked over as the pickler would, and each reducer is called once;
nothing is written, loaded or sent. `walking` counts, `measuring` knows what that costs here.

**Lifetime.** What it returns refers to nothing of the object.

**When it cannot.** A structure that is deeper than pickle can go is tried, to see whether it is:
then reducers run a second time."""

from __future__ import annotations

import pickle
from typing import Any, Final

from oobpickle._explain.explanation import Explanation, explanation_of
from oobpickle._explain.measuring import costs
from oobpickle._explain.walking import Walk
from oobpickle._foreign import pass_on_foreign
from oobpickle._hook.installed import running
from oobpickle._memory import options
from oobpickle._pickling.reducers import Sink
from oobpickle._pickling.serializer import take_apart

_DEEP: Final = 150


def explain(obj: object, *, name: str = "$") -> Explanation:
    """Say where the bytes and the seconds of an object go when it is sent.

    Parameters
    ----------
    obj : object
        Anything. What pickle refuses is named, and does not raise.
    name : str, optional
        What the object is called in the paths of its parts.

    Returns
    -------
    Explanation
        A tree by path, the largest parts first: sizes, in the stream or out of band and why,
        seconds, and what to do. ``print`` it, or leave it as the last line of a notebook's cell.

    Notes
    -----
    Reducers (``__reduce__``, ``__getstate__``) run once, as when it is pickled; nothing else of
    the object runs, and nothing is loaded. Seconds are predicted from a measurement of this
    machine, which takes a second or two in the first call. The threshold is that of the arena
    in use, or the default.

    Examples
    --------
    >>> import numpy as np, oobpickle
    >>> model = {"weights": np.ones((500, 500)), "names": [str(i) for i in range(50_000)]}
    >>> explanation = oobpickle.explain(model)
    >>> [(part.path, part.placement) for part in explanation.children]
    [("$['weights']", 'out of band'), ("$['names']", 'stream')]
    >>> explanation.children[1].type
    'list of 50,000 Python strings'
    """
    hook = running()
    threshold = options.DEFAULT_THRESHOLD if hook is None else hook.threshold
    known = costs()
    walk = Walk(obj, threshold)
    try:
        if walk.deepest > _DEEP and not walk.refused:
            _try(obj, walk)
        return explanation_of(walk, name, threshold, known)
    finally:
        walk.forget()


def _try(obj: Any, walk: Walk) -> None:
    """Note whether the pickler can go as deep as the object is."""
    sink = Sink(0)
    try:
        take_apart(obj, sink, by_value=True)
    except (RecursionError, pickle.PicklingError) as error:
        pass_on_foreign(error)
        walk.refuse_all(error)
