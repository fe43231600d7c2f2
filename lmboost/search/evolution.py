"""The search for a cut: random, or evolutionary as in "Where to Begin" (arXiv 2510.07227), which leaves the rates open.

A search is asked for a generation of candidates and told their losses. What it asks is a function of its seed, the
generation and the losses told so far, so a search that was cut off goes on after it has been told the same again.
"""

import math
from collections.abc import Sequence

import numpy as np

from lmboost.errors import UserError, one_of
from lmboost.search.space import Space
from lmboost.surgery.subnet import Cut

MISSES = 8  # candidates in a row that were asked before, after which one is drawn afresh
TRIES = 16  # draws for each candidate of a generation, before it is left with fewer


class RandomSearch:
    """Candidates drawn at random, none twice."""

    def __init__(self, space: Space, *, seed: int, population: int, elites: int):
        """Args:
        population: candidates of a generation.
        elites: how many of the best are kept.
        """
        self.space, self.seed, self.population, self.elites = space, seed, population, elites
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
        return self.space.sample(rng)


class Evolution(RandomSearch):
    """Children of the best candidates so far, after a first generation at random."""

    def __init__(
        self,
        space: Space,
        *,
        seed: int,
        population: int,
        elites: int,
        mutation: float,
        crossover: float,
        fresh: float,
    ):
        """Args:
        population: candidates of a generation.
        elites: the best of all so far, which are the parents.
        mutation: rate at which parts of a child are changed; at least one is.
        crossover: share of a generation that has two parents.
        fresh: share that is drawn at random.
        """
        super().__init__(space, seed=seed, population=population, elites=elites)
        self.mutation = mutation
        self._fresh = round(fresh * population)
        self._crossed = min(round(crossover * population), population - self._fresh)

    def _draw(self, rng: np.random.Generator, index: int) -> Cut:
        if not self._best or index < self._fresh:
            return self.space.sample(rng)
        cut = self._parent(rng)
        if index < self._fresh + self._crossed:
            cut = self.space.crossover(rng, cut, self._parent(rng))
        return self.space.mutate(rng, cut, self.mutation)

    def _parent(self, rng: np.random.Generator) -> Cut:
        """An elite: the better of two drawn at random."""
        return self._best[min(rng.integers(len(self._best), size=2))][2]


METHODS = {"evolution": Evolution, "random": RandomSearch}


def make(
    method: str,
    space: Space,
    *,
    seed: int,
    population: int,
    elites: int,
    mutation: float,
    crossover: float,
    fresh: float,
) -> RandomSearch:
    """The search that a config's `search` asks for; a UserError that names the field where a number is not possible."""
    one_of("search.method", method, METHODS)
    for name, number in (("search.population", population), ("search.elites", elites)):
        if number < 1:
            raise UserError(f"{name}={number} must be at least 1.")
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0.")
    shares = {"search.mutation": mutation, "search.crossover": crossover, "search.fresh": fresh}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name}={share} must be from 0 to 1.")
    if crossover + fresh > 1:
        raise UserError(
            f"search.crossover={crossover} and search.fresh={fresh} are shares of a generation, but make "
            f"{crossover + fresh:g} of it: together they must be at most 1."
        )
    if method == "random":
        return RandomSearch(space, seed=seed, population=population, elites=elites)
    return Evolution(
        space,
        seed=seed,
        population=population,
        elites=elites,
        mutation=mutation,
        crossover=crossover,
        fresh=fresh,
    )
