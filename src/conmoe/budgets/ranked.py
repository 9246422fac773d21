"""Budgets that rank the experts of all layers together."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from conmoe.allocate import spread
from conmoe.artifacts import read_layer
from conmoe.budgets import Context
from conmoe.ops.scores import share_within
from conmoe.registry import budget
from conmoe.types import UsageError

#: The names under which methods report what they rank experts by, the first that is there counts.
SCORES = ("score", "contribution", "frequency")


@budget("global")
def global_(
    context: Context,
    *,
    score: Annotated[str, "which of the numbers that the method reports of experts; by default what it ranks by"] = "",
) -> list[int]:
    """The experts of highest score over all layers stay, each score a share of its layer's.

    Scores grow with depth, as the norms of outputs do; as shares (times the experts of the layer) those of two layers
    can be compared. A layer in which a few experts do most of the work keeps few. Every layer keeps what its router
    needs. To hear the scores, the method plans every layer once more, at the even count.
    """
    return spread(_shares(context, score), context.total, context.floor, context.cap, context.step)


@budget("dominant", paper="https://arxiv.org/abs/2310.01334")
def dominant(
    context: Context,
    *,
    over: Annotated[Literal["most", "all"], "take uses over those of the most used expert, or of all experts"] = "most",
) -> list[int]:
    """The experts most used over all layers stay, each one's uses over those of the most used of its layer.

    M-SMoE, section 3: so every layer has an expert of frequency 1, and keeps at least that one (here also what its
    router needs, where rows are cut). A layer that uses its experts evenly keeps many. The paper leaves the first MoE
    layer whole; --layers does that, and --keep then counts the other layers alone.

    ``over="all"`` is what the authors' code does: an expert's share of the uses of its layer, and 1 for the most used
    one. Counts differ less between layers.
    """
    frequency = []
    for scope in context.scopes:
        counts = [read_layer(context.statistics, layer.index).sums["count"].double() for layer in scope]
        frequency.append(torch.cat([_frequency(count_E, over) for count_E in counts]))
    return spread(frequency, context.total, context.floor, context.cap, context.step)


def _frequency(count_E: Tensor, over: str) -> Tensor:
    """Uses of the experts of one layer, 1 for the most used."""
    if over == "most":
        return count_E / count_E.max().clamp_min(1)
    share_E = count_E / count_E.sum().clamp_min(1)
    share_E[count_E.argmax()] = 1.0
    return share_E


def _shares(context: Context, name: str) -> list[Tensor]:
    """Of each scope, its experts' scores over the mean of their layer; infinite for protected experts."""
    shares = []
    for position, scope in enumerate(context.scopes):
        floor, cap = context.floor[position], context.cap[position]
        if floor == cap:
            shares.append(torch.full((cap,), torch.inf))
            continue
        keep = min(max(context.uniform[position], floor), cap - context.step)
        scores = context.plan_scope(position, keep).plan.scores
        found = next((each for each in ((name,) if name else SCORES) if each in scores), None)
        if found is None:
            known = f"reports only {', '.join(sorted(scores))}" if scores else "reports no score of experts"
            raise UsageError(
                f"{context.method.name!r} {known}, so its experts cannot be ranked by {name or 'one'} over all layers; "
                "use another --budget."
            )
        score_E = scores[found].double()
        known_E = score_E.nan_to_num(nan=0.0)  # protected experts are not scored
        if bool((known_E < 0).any()):
            raise UsageError(f"The score {found!r} of {context.method.name!r} can be negative, and has no shares.")
        owner_E = torch.repeat_interleave(torch.arange(len(scope)), torch.tensor([layer.logical for layer in scope]))
        size_E = torch.bincount(owner_E)[owner_E]
        shares.append((share_within(known_E, owner_E) * size_E).masked_fill(score_E.isnan(), torch.inf))
    return shares
