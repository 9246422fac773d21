"""What is told of a generation from its tokens, against the definitions written out naively."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe.evaluate.health import LOOP_ROUNDS, LOOP_TOKENS, agreed, distinct, loop_period, repetition

TOKENS = st.lists(st.integers(0, 3), max_size=60)


def naive_period(tokens):
    for period in range(1, len(tokens) + 1):
        stretch = max(LOOP_ROUNDS * period, LOOP_TOKENS)
        cycle = tokens[len(tokens) - stretch :][:period]
        if stretch <= len(tokens) and tokens[len(tokens) - stretch :] == (cycle * stretch)[:stretch]:
            return period
    return None


@given(TOKENS, st.integers(1, 5))
def test_distinct_and_repetition_count_what_was_seen_before(tokens, n):
    seen: list[list[int]] = []
    repeated = total = 0
    for start in range(len(tokens) - n + 1):
        gram = tokens[start : start + n]
        repeated += gram in seen
        total += 1
        seen.append(gram)
    assert repetition(tokens, n) == pytest.approx(repeated / total if total else 0.0)
    assert distinct(tokens, n) == pytest.approx(1 - repetition(tokens, n))


@given(TOKENS)
def test_a_loop_is_what_its_definition_says(tokens):
    assert loop_period(tokens) == naive_period(tokens)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12), st.integers(0, 11))
def test_a_sequence_that_goes_round_is_a_loop_of_its_period(before, period, extra):
    cycle = list(range(100, 100 + period))
    rounds = max(LOOP_ROUNDS, -(-LOOP_TOKENS // period))
    assert loop_period([*before, *cycle * rounds, *cycle[: extra % period]]) == period
    assert loop_period([*before, *cycle * rounds, 7]) is None


@given(st.integers(0, 200))
def test_tokens_that_all_differ_are_no_loop(length):
    tokens = list(range(length))
    assert loop_period(tokens) is None
    assert (repetition(tokens), distinct(tokens, 1)) == (0.0, 1.0)


def test_a_short_run_is_no_loop_and_nothing_repeats_in_nothing():
    assert loop_period([1, 2, 3, 9, 9, 9]) is None
    assert loop_period([]) is None
    assert (repetition([]), distinct([], 1), agreed([], [])) == (0.0, 1.0, 0)


@given(TOKENS, TOKENS)
def test_generations_agree_in_their_common_beginning(first, second):
    common = list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    assert agreed(first, second) == agreed(second, first) == len(common)
    assert agreed(first, first + second) == len(first)
