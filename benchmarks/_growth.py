"""Growth: how the cost of an operation follows the number that was varied, and what is too much.

What
    A `Series` is one measured line: for each step of a number, what an operation took. It says
    what a unit of work cost, with which exponent the cost grew, and by how much the last step is
    dearer than the cheapest one.

How it works
    The *work* of a step is its number if the operation touches each of them (``is_each``), else
    one. The cost of a step is that of its fastest batch, since other work on the machine only makes
    batches slower; a batch is the mean of so many operations that what comes only now and then is
    in it. `Series.growth` divides the cost of a unit of work at the last step by the smallest of
    all steps: a fixed part, which makes the units of small steps dear, hides nothing.

Lifetime
    Values only.

When it cannot
    A part that grows faster than the work is seen once it is as large as half of what does not:
    see `BOUND`. What a line is compared with may grow too (the system, or Python's collector, which
    has more objects to look at): a line may grow as much as that does. With one step there is
    nothing to compare, and the growth is 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

#: The most that a unit of work may cost at the last step, relative to the cheapest step. Caches
#: and page tables that no longer fit take their part of it: 64 KiB of L1 against gigabytes. A
#: superfluous factor of n is 10 at the next decade, so it cannot stay below this for long.
BOUND = 1.5
_FITTED_DECADES = 2.0  # what is small has a fixed cost, and would flatten the fit


@dataclass
class Step:
    """What one number took: per batch, the mean seconds of the operation."""

    n: int
    ours_s: list[float]
    reference_s: list[float] = field(default_factory=list)


@dataclass
class Series:
    """One line of a plot.

    Attributes
    ----------
    name : str
        As in the table.
    unit : str
        What the number counts.
    reference : str
        What it is compared with; empty if with nothing.
    is_each : bool
        The operation does something for each of the number, so that its work is the number.
    bound : float
        Of `growth`.
    most_of_reference : float or None
        The most that any step may take relative to what it is compared with.
    steps : list of Step
        In ascending order.
    facts : dict
        What else is to be stored with it.
    """

    name: str
    unit: str
    reference: str = ""
    is_each: bool = False
    bound: float = BOUND
    most_of_reference: float | None = None
    steps: list[Step] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, n: int, ours_s: list[float], reference_s: list[float] | None = None) -> None:
        self.steps.append(Step(n, ours_s, reference_s or []))

    def work(self, n: int) -> int:
        return n if self.is_each else 1

    def cost_s(self, step: Step) -> float:
        """Seconds of the operation."""
        return min(step.ours_s)

    def reference_cost_s(self, step: Step) -> float:
        """Seconds of what it is compared with."""
        return min(step.reference_s)

    def unit_s(self, step: Step) -> float:
        """Seconds for each unit of work."""
        return self.cost_s(step) / self.work(step.n)

    def growth(self) -> float:
        """How much dearer a unit of work is at the last step than where it is cheapest."""
        return self.unit_s(self.steps[-1]) / min(map(self.unit_s, self.steps))

    def reference_growth(self) -> float | None:
        """The same of what it is compared with."""
        steps = [step for step in self.steps if step.reference_s]
        if len(steps) < 2:
            return None
        unit_s = [self.reference_cost_s(step) / self.work(step.n) for step in steps]
        return unit_s[-1] / min(unit_s)

    def exponent(self) -> float | None:
        """The exponent of the number in the cost, fitted over the last two decades."""
        last = self.steps[-1].n
        fitted = [step for step in self.steps if step.n * 10**_FITTED_DECADES >= last]
        if len(fitted) < 2:
            return None
        x = [math.log(step.n) for step in fitted]
        y = [math.log(self.cost_s(step)) for step in fitted]
        return statistics.linear_regression(x, y).slope

    def shortfall(self) -> str:
        """Why it falls short: it grows faster than its work; empty if it does not."""
        reasons = []
        bound = max(self.bound, self.reference_growth() or 0)
        if self.growth() > bound:
            reasons.append(f"growth {self.growth():.2f}, bound {bound:.3g}")
        most = self.most_of_reference
        for step in self.steps:
            if most is not None and self.cost_s(step) > most * self.reference_cost_s(step):
                ratio = self.cost_s(step) / self.reference_cost_s(step)
                reasons.append(f"{ratio:.2f} of {self.reference} at {step.n:,}")
        return "; ".join(reasons)

    def figures(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Return what it comes to, and what an operation costs at each step."""
        own = {"growth": self.growth(), "exponent": self.exponent()}
        yield self.name, {**own, "verdict": self.shortfall() or "ok"}
        for step in self.steps:
            costs = {"ours": self.cost_s(step)}
            if step.reference_s:
                costs["reference"] = self.reference_cost_s(step)
            each = {f"{who}_each_s": cost_s / self.work(step.n) for who, cost_s in costs.items()}
            totals = {f"{who}_s": cost_s for who, cost_s in costs.items()}
            yield f"{self.name} {step.n}", {**totals, **each}

    def stored(self) -> dict[str, Any]:
        """What goes into the JSON file."""
        return {**asdict(self), "growth": self.growth(), "exponent": self.exponent()}
