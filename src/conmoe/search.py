"""Evolutionary search over counts: how many experts each scope keeps, their sum fixed (EvoESAP, arXiv 2603.06003).

Nothing here knows models: a candidate is a tuple of counts, its fitness a number from a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator

Counts = tuple[int, ...]
Weights = Sequence[float]

#: A transfer moves at most so many experts (steps) from one scope to another, ...
MOST_MOVED = 4
#: ... and a mutation makes as many transfers as the smaller of two draws up to here.
MOST_TRANSFERS = 3
_ATTEMPTS = 100
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Space:
    """Counts between ``floor`` and ``cap``, in steps from the floor, that add up to ``total``."""

    floor: Counts
    cap: Counts
    total: int
    step: int = 1

    @property
    def room(self) -> list[int]:
        """The steps that each scope can give up."""
        return [(cap - floor) // self.step for floor, cap in zip(self.floor, self.cap, strict=True)]

    def keeping(self, weight: Weights) -> Counts:
        """The counts by which each scope gives up steps in proportion to its weight, as far as it has them."""
        removed = apportion(weight, self.room, (sum(self.cap) - self.total) // self.step)
        return tuple(cap - self.step * gone for cap, gone in zip(self.cap, removed, strict=True))


def apportion(weight: Weights, room: Sequence[int], amount: int) -> list[int]:
    """``amount`` in whole parts, proportional to ``weight`` by largest remainders, none above its ``room``.

    What one cannot take goes to the others; ties go to the lower index.
    """
    given = [0] * len(room)
    while left := min(amount, sum(room)) - sum(given):
        open_ = [i for i, most in enumerate(room) if given[i] < most]
        mass = sum(weight[i] for i in open_)
        ideal = {i: left * (weight[i] / mass if mass > 0 else 1 / len(open_)) for i in open_}
        full = [i for i in open_ if ideal[i] >= room[i]]
        for i in full:
            given[i] = room[i]
        if not full:
            for i in open_:
                given[i] = int(ideal[i] + _ROUNDING)
            for i in sorted(open_, key=lambda i: given[i] - ideal[i])[: min(amount, sum(room)) - sum(given)]:
                given[i] += 1
    return given


def first_population(space: Space, size: int, even: Counts, generator: Generator) -> list[Counts]:
    """The even counts, those of the paper's shapes, and random ones up to ``size``, none twice while there are others.

    A shape says how much more of its experts one scope gives up than another: more with depth or less, most in the
    middle or at both ends, decaying from the front (0.7^i) or growing to the back (1.3^i), twice as much in the first
    or the last quarter or in every second scope.
    """
    S = len(space.cap)
    middle, quarter = (S - 1) / 2, max(1, S // 4)
    shapes: list[Weights] = [
        [i + 1 for i in range(S)],
        [S - i for i in range(S)],
        [middle - abs(i - middle) + 1 for i in range(S)],
        [abs(i - middle) + 1 for i in range(S)],
        [0.7**i for i in range(S)],
        [1.3**i for i in range(S)],
        [2.0 if i < quarter else 1.0 for i in range(S)],
        [2.0 if i >= S - quarter else 1.0 for i in range(S)],
        [2.0 if i % 2 == 0 else 1.0 for i in range(S)],
    ]
    found = list(dict.fromkeys([even, *map(space.keeping, shapes)]))
    for _ in range(_ATTEMPTS * size):
        if len(found) >= size:
            break
        candidate = space.keeping(torch.rand(S, generator=generator, dtype=torch.float64).tolist())
        if candidate not in found:
            found.append(candidate)
    return found[:size]


def mutate(counts: Counts, space: Space, generator: Generator) -> Counts:
    """Move up to :data:`MOST_MOVED` steps from one scope to another, up to :data:`MOST_TRANSFERS` times.

    The number of transfers is the smaller of two draws, so that small changes are the more frequent.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    changed = list(counts)
    wanted = min(draw(1, MOST_TRANSFERS), draw(1, MOST_TRANSFERS))
    for _ in range(_ATTEMPTS):
        if not wanted:
            break
        gives, takes, moved = draw(0, len(counts) - 1), draw(0, len(counts) - 1), space.step * draw(1, MOST_MOVED)
        fits = changed[gives] - moved >= space.floor[gives] and changed[takes] + moved <= space.cap[takes]
        if gives != takes and fits:
            changed[gives] -= moved
            changed[takes] += moved
            wanted -= 1
    return tuple(changed)


def evolve(
    population: Sequence[Counts],
    space: Space,
    fitness: Callable[[Counts], float],
    *,
    size: int,
    generations: int,
    elites: int,
    generator: Generator,
    advance: Callable[[int], None] = lambda candidates: None,
) -> Counts:
    """The fittest counts of all generations; the first generation is ``population``.

    The ``elites`` fittest of a generation live on, and each of their ``size - elites`` children is a mutation of one of
    them, drawn evenly. Equal candidates are measured once, and count once among the elites; ties go to who came first.
    """
    known: dict[Counts, float] = {}
    parents: list[Counts] = []
    newcomers = list(population)
    for generation in range(generations):
        if generation:
            drawn = torch.randint(len(parents), (size - len(parents),), generator=generator).tolist()
            newcomers = [mutate(parents[i], space, generator) for i in drawn]
        for candidate in newcomers:
            if candidate not in known:
                known[candidate] = fitness(candidate)
            advance(1)
        parents = sorted(dict.fromkeys(parents + newcomers), key=lambda candidate: -known[candidate])[:elites]
    return parents[0]
