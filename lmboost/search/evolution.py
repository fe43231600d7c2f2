"""The search for a cut: random, or evolutionary as in "Where to Begin" (arXiv 2510.07227), which leaves the rates open.

A search is asked for a generation of candidates and told their losses. What it asks is a function of its seed, the
generation and the losses told so far, so a search that was cut off goes on after it has been told the same again.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lmboost.errors import UserError, one_of
from lmboost.search.space import Space
from lmboost.surgery.subnet import Cut

METHODS = ("evolution", "random")
MISSES = 8  # candidates in a row that were asked before, after which one is drawn afresh
TRIES = 16  # draws for each candidate of a generation, before it is left with fewer


@dataclasses.dataclass(kw_only=True, eq=False)
class Search:
    """Asks for candidates, none twice. A UserError names the config's field where a value is not possible.

    "evolution": children of the best candidates so far, after a first generation at random; "random": all at random.
    """

    method: str  # of METHODS
    space: Space
    seed: int
    population: int  # candidates of a generation
    elites: int  # how many of the best are kept: the parents of an evolution, which alone has the numbers below
    mutation: float  # rate at which parts of a child are changed; at least one is
    crossover: float  # share of a generation that has two parents
    fresh: float  # share that is drawn at random

    def __post_init__(self):
        one_of("search.method", self.method, METHODS)
        for name in ("population", "elites"):
            if getattr(self, name) < 1:
                raise UserError(f"search.{name}={getattr(self, name)} must be at least 1.")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0.")
        for name in ("mutation", "crossover", "fresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"search.{name}={getattr(self, name)} must be from 0 to 1.")
        if self.crossover + self.fresh > 1:
            raise UserError(
                f"search.crossover={self.crossover} and search.fresh={self.fresh} are shares of a generation, but make "
                f"{self.crossover + self.fresh:g} of it: together they must be at most 1."
            )
        self.generation = 0
        self._asked: set[int] = set()  # hashes: a cut of a large model is large
        self._best: list[tuple[float, int, Cut]] = []  # (loss, number of the candidate, cut), the best first
        self._told = 0

    def ask(self) -> list[Cut]:
        """The next generation: fewer than `population` where new ones are hard to find, none where there are none.

        A UserError where the space has no cut in its bin.
        """
        rng = np.random.default_rng((self.seed, self.generation))
        self.generation += 1
        cuts: list[Cut] = []
        misses = 0
        for _ in range(TRIES * self.population):
            if len(cuts) == self.population:
                break
            cut = self.space.sample(rng) if misses >= MISSES else self._draw(rng, len(cuts))
            misses += 1
            if hash(cut) not in self._asked:
                self._asked.add(hash(cut))
                cuts.append(cut)
                misses = 0
        return cuts

    def tell(self, cuts: Sequence[Cut], losses: Sequence[float]) -> None:
        """The losses of candidates, in the order in which they were asked; one that is not finite is never an elite."""
        told = range(self._told, self._told + len(cuts))
        ranked = [(float(loss), i, cut) for loss, i, cut in zip(losses, told, cuts, strict=True) if math.isfinite(loss)]
        self._told += len(cuts)
        self._best = sorted([*self._best, *ranked], key=lambda one: one[:2])[: self.elites]

    @property
    def best(self) -> tuple[Cut, float]:
        """The best candidate of all and its loss. A UserError where no finite loss was told."""
        if not self._best:
            raise UserError(
                f"search: none of the {self._told} candidates evaluated so far has a finite loss. Check the model in "
                "init.path and the validation data."
            )
        loss, _, cut = self._best[0]
        return cut, loss

    def _draw(self, rng: np.random.Generator, index: int) -> Cut:
        """The candidate at an index of the generation."""
        fresh = round(self.fresh * self.population)
        crossed = min(round(self.crossover * self.population), self.population - fresh)
        if self.method == "random" or not self._best or index < fresh:
            return self.space.sample(rng)
        cut = self._parent(rng)
        if index < fresh + crossed:
            cut = self.space.crossover(rng, cut, self._parent(rng))
        return self.space.mutate(rng, cut, self.mutation)

    def _parent(self, rng: np.random.Generator) -> Cut:
        """An elite: the better of two drawn at random."""
        return self._best[min(rng.integers(len(self._best), size=2))][2]
