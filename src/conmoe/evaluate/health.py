"""What can be told of a generation from its tokens alone: repetition, loops, variety, where two of them part.

All functions take the new tokens of one generation, without the prompt and without the end-of-text token. A generation
may be empty: it repeats nothing, is no loop, and all that it says is distinct.
"""

from __future__ import annotations

from collections.abc import Sequence

#: The n-grams by which repetition is counted.
REPEATED_N = 4

#: A loop has gone round this often, and for at least so many tokens: "..." and a blank line are no loops.
LOOP_ROUNDS, LOOP_TOKENS = 3, 16


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams as a share of all n-grams (Li et al. 2016); 1 if there are none."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[int], n: int = REPEATED_N) -> float:
    """The share of n-grams that stood earlier in the same generation, ``1 - distinct`` (Welleck et al. 2020)."""
    return 1.0 - distinct(tokens, n)


def loop_period(tokens: Sequence[int], rounds: int = LOOP_ROUNDS, least: int = LOOP_TOKENS) -> int | None:
    """The shortest period of the cycle that a generation ends in, or None.

    It ends in a cycle of period ``p`` if its last ``max(rounds * p, least)`` tokens each equal the one ``p`` before,
    within that stretch.
    """
    for period in range(1, len(tokens) // rounds + 1):
        stretch = max(rounds * period, least)
        if stretch > len(tokens):
            break
        end = tokens[len(tokens) - stretch :]
        if all(end[i] == end[i - period] for i in range(period, stretch)):
            return period
    return None


def agreed(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two generations begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
