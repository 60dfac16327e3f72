"""The ledger of one certifier: the random starts that its claim rests on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from lipjax.norms.cohorts import Norms


@dataclasses.dataclass
class Ledger:
    """What the norms of one certifier have cost, and how tight they came out.

    Attributes:
        planned: starts that delta was divided by.
        starts: starts drawn.
        delta_per_start: probability of failure of each, not a number where it has none.
        products: products with a layer or its transpose, of one example.
        largest_gap: the largest upper / lower - 1 of a norm, not a number for estimates.
    """

    planned: int
    delta_per_start: float
    starts: int = 0
    products: int = 0
    largest_gap: float = math.nan

    def enter(self, found: Norms) -> None:
        """Count what was spent on some norms."""
        self.starts += int(found.drawn.sum())
        self.products += int(found.products.sum())
        self.largest_gap = float(np.fmax.reduce(found.gap, initial=self.largest_gap))

    def facts(self) -> dict[str, float | None]:
        """Ready for JSON; None where a figure has no meaning at this level."""
        facts = {
            "starts_planned": self.planned,
            "starts_drawn": self.starts,
            "delta_per_start": self.delta_per_start,
            "products": self.products,
            "largest_gap": self.largest_gap,
        }
        return {name: None if math.isnan(value) else value for name, value in facts.items()}
