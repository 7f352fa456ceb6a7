"""The explanation of an object: a tree of its parts, the largest first.

**What.** `Explanation`, `Duplicate`, and `explanation_of`, which makes the tree of a `Walk`.

**How it works.** Of each part the largest parts are shown, and the others counted. A part that has
only one, which has no name, is shown as that one: a wrapper is no news.

**Lifetime.** It refers to nothing of the object: it is text and numbers.

**When it cannot.** Which two paths lead to the same memory is looked for among what has 4 KiB or
more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final

from oobpickle._explain import amounts as of
from oobpickle._explain import parts
from oobpickle._explain.advice import advice_for, copies_of, placement_of, reason_for
from oobpickle._explain.measuring import Costs, Seconds, predict
from oobpickle._explain.naming import is_array, is_wrapper, label_of, type_of, type_within
from oobpickle._explain.parts import Part
from oobpickle._explain.text import as_text, cut
from oobpickle._explain.walking import Walk
from oobpickle._pickling.reducers import byte_bounds

_MOST_DUPLICATES: Final = 20
_LEAST_SHARED_NBYTES: Final = 4096
_WRAPPED_SHARE: Final = 0.9
_MOST_PATH: Final = 500
_NEVER: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The same memory by two paths: it is sent twice, and arrives as two.

    Attributes
    ----------
    paths : (str, str)
        The parts.
    nbytes : int
        What they share, bytes; of arrays with steps, what lies between their ends.
    """

    paths: tuple[str, str]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """What becomes of an object, or of a part of it, when it is sent.

    Made by `explain`. ``str()`` shows it in 80 columns, a notebook as a table that unfolds.

    Attributes
    ----------
    path : str
        Where the part is, as it is written in Python; ``$`` is the object itself.
    type : str
        Its type, and what is in it.
    nbytes : int
        What it takes when it is sent, with all its parts, bytes.
    placement : str
        ``"out of band"``, ``"stream"``, or ``"both"`` if its parts differ; ``"refused"`` if pickle
        cannot take it.
    reason : str
        Why it is there.
    seconds : Seconds
        ``pickle`` and ``load``: to pickle it and to rebuild it; ``plain`` and ``oobpickle``: from
        sender to receiver, without and with it. Predicted from a short measurement.
    advice : str
        What to do about it; empty if there is nothing to gain.
    children : tuple of Explanation
        Its largest parts, the largest first.
    n_parts : int
        Objects that pickle meets in it, itself included.
    nbytes_out_of_band : int
        Of its bytes, those that are copied once into shared memory.
    n_copies : (int, int)
        How often its bytes are copied from sender to receiver: plain, and with oobpickle.
    n_cut, nbytes_cut : int
        Parts that are not among the children, and their bytes.
    duplicates : tuple of Duplicate
        Of the whole object: memory that is in it twice.
    refused : tuple of str
        Of the whole object: paths of what pickle cannot take.
    """

    path: str
    type: str
    nbytes: int
    placement: str
    reason: str
    seconds: Seconds
    advice: str
    children: tuple[Explanation, ...]
    n_parts: int
    nbytes_out_of_band: int
    n_copies: tuple[int, int]
    n_cut: int
    nbytes_cut: int
    duplicates: tuple[Duplicate, ...] = field(default=())
    refused: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {self.path}: {self.type}, {self.nbytes} bytes, {self.placement}>"

    def _repr_html_(self) -> str:
        from oobpickle._explain.html import as_html

        return as_html(self)

    def __iter__(self) -> Iterator[Explanation]:
        """Yield the part and all parts of it that are kept, from the outside in."""
        todo = [self]
        while todo:
            one = todo.pop()
            yield one
            todo += reversed(one.children)


class Maker:
    """Makes the explanation of a walk."""

    def __init__(self, walk: Walk, name: str, threshold: int, known: Costs) -> None:
        self._walk, self._name, self._threshold, self._known = walk, name, threshold, known
        self._is_small = walk.root.nbytes < threshold

    def make(self) -> Explanation:
        """Return the explanation of the whole."""
        walk = self._walk
        return self._of(
            walk.root,
            self._name,
            duplicates=tuple(self._duplicates()),
            refused=tuple(map(self._path, walk.refused)),
        )

    def _of(self, part: Part, path: str, **of_the_whole: Any) -> Explanation:
        amounts = part.amounts
        inner = _unwrapped(part)
        told = _told(part, inner)
        kept = sorted(inner.kept, key=lambda one: (-one[0], one[1]))
        start = path + self._between(inner, part)
        children = [self._of(one, start + label_of(one)) for *_, one in kept]
        n_shown = sum(one.n_parts for one in children)
        shown_nbytes = sum(one.nbytes for one in children)
        placement = placement_of(part)
        return Explanation(
            path=path,
            type=type_of(part) if told is part else type_within(part, told),
            nbytes=part.nbytes,
            placement=placement,
            reason=reason_for(
                told, self._threshold, is_small=self._is_small, is_leaf=not inner.kept
            ),
            seconds=predict(amounts, _NEVER if self._is_small else self._threshold, self._known),
            advice=advice_for(told, inner),
            children=tuple(children),
            n_parts=amounts[of.PARTS],
            nbytes_out_of_band=amounts[of.OUT],
            n_copies=copies_of(part, is_small=self._is_small),
            n_cut=amounts[of.PARTS] - n_shown - 1,
            nbytes_cut=max(0, part.nbytes - shown_nbytes) if amounts[of.PARTS] > 1 + n_shown else 0,
            **of_the_whole,
        )

    def _between(self, inner: Part, outer: Part) -> str:
        labels = []
        part: Part | None = inner
        while part is not None and part is not outer:
            labels.append(label_of(part))
            part = part.parent
        return "".join(reversed(labels))

    def _path(self, part: Part) -> str:
        path = self._name + self._between(part, self._walk.root)
        return cut(path, _MOST_PATH)

    def _duplicates(self) -> list[Duplicate]:
        spans = []
        for place, (source, part) in enumerate(self._walk.buffers):
            low, high = byte_bounds(source)
            spans.append((low, -high, place, source, part))
        spans.sort(key=itemgetter(0, 1, 2))
        found: list[tuple[int, Part, Part]] = []
        last = spans[:1]
        for span in spans[1:]:
            outer = last[0]
            shared = min(-outer[1], -span[1]) - span[0]
            if shared >= _LEAST_SHARED_NBYTES and _do_share(outer[3], span[3]):
                first, second = sorted((outer, span), key=itemgetter(2))
                found.append((shared, first[4], second[4]))
            if span[1] < outer[1]:  # it reaches further
                last = [span]
        found.sort(key=itemgetter(0), reverse=True)
        return [
            Duplicate((self._path(first), self._path(second)), nbytes)
            for nbytes, first, second in found[:_MOST_DUPLICATES]
        ]


def _do_share(one: Any, other: Any) -> bool:
    """Tell whether two arrays share an element; what lies between others' is not shared."""
    import numpy as np

    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return True
    try:
        return bool(np.shares_memory(one, other, max_work=10_000))
    except np.exceptions.TooHardError:
        return True


def _unwrapped(part: Part) -> Part:
    """Return the part whose parts are shown: not that of a wrapper around one thing."""
    inner = part
    while inner.kept:
        *_, largest = max(inner.kept, key=itemgetter(0, 1))
        is_inside = inner is not part and largest.style == parts.INDEX and not _is_shown(inner)
        if not (is_wrapper(largest) or is_inside) or largest.refusal:
            break
        if largest.nbytes < _WRAPPED_SHARE * part.nbytes:
            break
        inner = largest
    return inner


def _told(part: Part, inner: Part) -> Part:
    """Return the part that says what a wrapper is about: its array."""
    chain = [inner]
    while chain[-1] is not part and chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    arrays = [one for one in reversed(chain) if is_array(one.obj)]
    if arrays:
        return arrays[0]
    return part


def _is_shown(part: Part) -> bool:
    """Tell whether a tuple or list is more than the wrapper of one thing."""
    return part.style == parts.INDEX and len(part.kept) > 1


def explanation_of(walk: Walk, name: str, threshold: int, known: Costs) -> Explanation:
    """Return the explanation of what was walked over."""
    return Maker(walk, name, threshold, known).make()
