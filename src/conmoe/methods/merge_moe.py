"""MergeMoE: merge experts so that their outputs are merged (arXiv 2510.14436)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from conmoe.ops import coverage, least_squares, plans
from conmoe.ops.experts import expert_hidden, mix, tensors
from conmoe.ops.fusion import average_own
from conmoe.ops.scores import share_within, top
from conmoe.ops.similarity import BLOCK_BYTES, gate_up_cosine
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, TokenSample, UsageError

#: The tensors that are fitted; the others are averages.
FITTED = ("down_EDI", "down_bias_ED")


@method("mergemoe", paper="https://arxiv.org/abs/2510.14436", needs=("count", "sample", "weights"))
@torch.no_grad()
def mergemoe(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    ridge: Annotated[float, "tokens per hidden unit that the averaged down counts for; 0: the paper's fit"] = 0.25,
    weighting: Annotated[
        Literal["uniform", "gated"], "fit all tokens alike, or what the layer really adds"
    ] = "uniform",
) -> LayerPlan:
    """Average gate and up of each group, then fit its down projection to the average of the members' outputs.

    The most used experts are centres; each other expert joins the centre whose ``[up; gate]`` has the highest cosine
    (section 3; the paper does not name the measure). With ``b_j`` an expert's share of the uses of its group,
    ``gate' = sum b_j gate_j``, ``up' = sum b_j up_j``, and ``down'`` is the least-squares fit of ``sum b_j E_j(x)`` by
    ``down' h'(x)``, ``h' = activate(gate' x, up' x)``, over the token sample. The paper solves for a compression
    matrix ``T1 = Q pinv(P)`` and multiplies the stacked down projections by it, which is the same matrix.

    Departures. The fit starts from ``sum b_j down_j``, which counts for as much as ``ridge`` tokens for each hidden
    unit (``lam = ridge I / n`` times the mean square sum of a hidden unit): the paper's own fit, ``ridge=0``, is worse
    than that average until there are several tokens for each hidden unit. ``weighting="gated"`` fits
    ``(sum g_j E_j) / (sum g_j)`` on the tokens routed to the group, weighted by ``(sum g_j)^2``: the group's own
    squared error in the layer's output; it needs as many tokens, but of those routed to it. A bias of down is fitted
    with it, as the coefficient of a constant. Groups of one used expert are copies. In a scope, experts of another
    layer than their centre are answered for, but not mixed in. The paper merges the last layer first, so that merging
    does not disturb the statistics of layers still to come; ours are those of the unmodified model, and the order is
    free.

    ``predicted_error`` is ``sum_n ||y_n - y'_n||^2 / sum_n ||y_n||^2`` of the routed experts' output on that sample.
    Cost, beside ``2 E^2 D I`` multiplications for the cosines: ``n (E + K)`` expert evaluations (gated: ``2 n k``) and
    ``n I (I + D)`` multiplications per group. Of 128 experts with D = 2048 and I = 768, half of them kept, on 4,096
    tokens: 9e12 operations, a minute on one CPU core, and a quarter of that gated.
    """
    if ridge < 0:
        raise UsageError(f"Option 'ridge' cannot be negative, as {ridge:g} is.")
    owner_E, count_E, sample = statistics.owner_E, statistics.sums["count"].cpu(), statistics.sample
    if keep == owner_E.numel():
        return plans.identity(keep)
    centre_K = top(share_within(count_E, owner_E), keep)
    assignment_E = coverage.nearest(1 - gate_up_cosine(experts), centre_K)
    plan = plans.compose(assignment_E, average_own(centre_K, assignment_E, count_E, owner_E))

    fitted: dict[str, list[Tensor]] = defaultdict(list)
    output_nD = torch.zeros(sample.hidden_nD.shape, device=experts.gate_EID.device)
    error_nD = torch.zeros_like(output_nD)
    for prototype, recipe_E in enumerate(plan.mixing_KE):
        members = (plan.assignment_E == prototype).nonzero().flatten()
        gate_nM = _gates(sample, members)
        merged = _average(experts, recipe_E)
        if int(recipe_E.count_nonzero()) > 1:
            share_nM = gate_nM if weighting == "gated" else _same_for_all(sample, members, recipe_E)
            merged = _fit(merged, experts, sample, members, share_nM, ridge)
        for name in FITTED:
            if name in tensors(merged):
                fitted[name].append(tensors(merged)[name].cpu())
        for block, x_cD in _blocks(sample, experts, gate_nM):
            y_cD = _outputs(experts, members, x_cD, gate_nM[block])
            output_nD[block] += y_cD
            error_nD[block] += y_cD - gate_nM[block].sum(dim=1, keepdim=True) * _output(merged, 0, x_cD)
    weights = {name: torch.cat(rows) for name, rows in fitted.items()}
    relative = error_nD.double().square().sum() / output_nD.double().square().sum().clamp_min(1e-300)
    return replace(plan, weights=weights, predicted_error=float(relative))


def _fit(
    merged: Experts, experts: Experts, sample: TokenSample, members: Tensor, share_nM: Tensor, ridge: float
) -> Experts:
    """``merged`` with the ``down'`` whose outputs are nearest to the shares of the members' outputs."""
    _, D, width = merged.down_EDI.shape
    bias_ED = merged.down_bias_ED
    gram = least_squares.zeros(width, D, intercept=bias_ED is not None, device=merged.down_EDI.device)
    for block, x_cD in _blocks(sample, experts, share_nM):
        mass_c = share_nM[block].sum(dim=1)
        target_cD = _outputs(experts, members, x_cD, share_nM[block] / mass_c.unsqueeze(1))
        gram = least_squares.add(gram, expert_hidden(merged, 0, x_cD), target_cD, mass_c.square())
    relative = ridge * width / max(least_squares.effective_tokens(share_nM.sum(dim=1).square()), 1.0)
    down_DI, bias_D = least_squares.solve(gram, relative, merged.down_EDI[0], None if bias_ED is None else bias_ED[0])
    return replace(
        merged,
        down_EDI=down_DI.unsqueeze(0).to(merged.down_EDI.dtype),
        down_bias_ED=None if bias_ED is None or bias_D is None else bias_D.unsqueeze(0).to(bias_ED.dtype),
    )


def _average(experts: Experts, recipe_E: Tensor) -> Experts:
    """One prototype, rounded as it will be stored: what the fit makes good includes the rounding of gate and up."""
    made: dict[str, Any] = {name: mix(tensor, recipe_E.unsqueeze(0)) for name, tensor in tensors(experts).items()}
    return replace(experts, **made)


def _same_for_all(sample: TokenSample, members: Tensor, recipe_E: Tensor) -> Tensor:
    """``share_nM``: the recipe for every token of the prototype's layer (others of a scope have no logits there)."""
    known_n = ~sample.logits_nE[:, int(recipe_E.argmax())].isnan()
    return known_n.unsqueeze(1) * recipe_E[members].float().to(known_n.device)


def _gates(sample: TokenSample, members: Tensor) -> Tensor:
    """``gate_nM``: the gate of each member, zero where the token did not choose it."""
    chosen_nMk = sample.index_nk.unsqueeze(1) == members.to(sample.index_nk).reshape(1, -1, 1)
    return (chosen_nMk * sample.weight_nk.float().unsqueeze(1)).sum(dim=2)


def _blocks(sample: TokenSample, experts: Experts, share_nM: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens with any share at all: where they are in the sample, and their inputs."""
    rows = (share_nM.sum(dim=1) > 0).nonzero().flatten()
    for block in rows.split(max(1, BLOCK_BYTES // (16 * sum(experts.down_EDI.shape[1:])))) if rows.numel() else ():
        yield block, sample.hidden_nD[block].to(experts.gate_EID.device)


def _outputs(experts: Experts, members: Tensor, x_cD: Tensor, share_cM: Tensor) -> Tensor:
    """``sum over members of share * E_j(x)``, each member run on the tokens of which it has a share."""
    y_cD = torch.zeros(x_cD.shape, device=x_cD.device)
    for column, member in enumerate(members.tolist()):
        rows = share_cM[:, column].nonzero().flatten()
        y_cD.index_add_(0, rows, share_cM[rows, column].unsqueeze(1) * _output(experts, member, x_cD[rows]))
    return y_cD


def _output(experts: Experts, expert: int, x_cD: Tensor) -> Tensor:
    """The output of one expert in float32: a fit to rounded outputs would learn their rounding."""
    bias_D = None if experts.down_bias_ED is None else experts.down_bias_ED[expert].float()
    return linear(expert_hidden(experts, expert, x_cD).float(), experts.down_EDI[expert].float(), bias_D)
