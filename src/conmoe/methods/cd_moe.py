"""CD-MoE: condensed layers, a few experts that answer every token without a router (arXiv 2412.00069)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from conmoe.ops import least_squares, plans
from conmoe.ops.divergence import divergence_with
from conmoe.ops.experts import expert_output
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, TokenSample, UsageError

#: The static gate of an expert that no token chose.
NEVER_CHOSEN = 0.06
#: How firmly fitted gates are held to the mean gates, as a share of the experts' mean energy.
RIDGE = 1e-4


@method(
    "cd-moe",
    paper="https://arxiv.org/abs/2412.00069",
    needs=("count", "gate", "sample", "weights"),
    condenses=True,
    budget="condense",
)
@torch.no_grad()
def cd_moe(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    gates: Annotated[
        Literal["mean", "least_squares"], "static gates: the mean gate of an expert, or fitted to the layer's output"
    ] = "mean",
    tokens: Annotated[int, "tokens of the sample on which the experts that stay are chosen"] = 512,
) -> LayerPlan:
    """Condense the layer: ``keep`` experts answer every token with constant gates, and the router goes.

    The static gate ``w_e`` is the mean gate over the tokens that chose ``e``, 0.06 if none did. Experts are added one
    by one: each time the one that minimises the mean over tokens of the Jensen-Shannon divergence between softmaxes,
    over the hidden dimension, of the layer's own output and of ``sum w_e E_e(x)``, both with what the layer adds beside
    its routed experts. ``keep=0`` leaves those shared experts alone (variant S). Which layers are condensed is for the
    budget to say.

    ``gates="least_squares"`` is ours: once the experts are chosen, the gates minimise ``||sum w_e E_e - y||^2`` over
    the same tokens, with a faint pull towards the mean gates. The errors of both are in the scores, and how they
    change with each expert that is added: at an expert's place the error once it was in, elsewhere that of all.

    Departure: the authors compare the residual stream after the layer, which is not in the token sample; we compare
    what the layer adds to it.
    """
    E = statistics.owner_E.numel()
    if int(statistics.owner_E.max()) != int(statistics.owner_E.min()):
        raise UsageError("Condensed layers share nothing with their neighbours; use --scope 1.")
    if keep == E:
        return plans.identity(E)
    count_E, gate_E = statistics.sums["count"], statistics.sums["gate"].double()
    mean_E = torch.where(count_E > 0, gate_E / count_E.clamp_min(1), NEVER_CHOSEN).cpu()
    if keep == 0:
        return replace(plans.condense(torch.zeros(0, dtype=torch.int64), mean_E[:0], E), predicted_error=1.0)
    if not statistics.sample.hidden_nD.shape[0]:
        raise UsageError("CD-MoE chooses experts on the token sample, and there is none; calibrate with --sample.")

    output_EnD, routed_nD, rest_nD = _outputs(statistics.sample, experts, tokens)
    order, divergences = _forward_selection(output_EnD, routed_nD, rest_nD, mean_E, keep)
    mean_errors, fitted, fitted_errors = _errors(output_EnD, routed_nD, mean_E, order)
    gate_K = mean_E[order] if gates == "mean" else fitted
    kept_K, rank_K = torch.tensor(order).sort()
    return replace(
        plans.condense(kept_K, gate_K[rank_K], E),
        predicted_error=(mean_errors if gates == "mean" else fitted_errors)[-1],
        scores={
            "mean_gate": mean_E,
            "step": _along(order, [float(step) for step in range(1, keep + 1)], E, 0.0),
            "divergence": _along(order, divergences, E),
            "error_mean_gates": _along(order, mean_errors, E),
            "error_least_squares": _along(order, fitted_errors, E),
        },
    )


def _outputs(sample: TokenSample, experts: Experts, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first tokens (which are a sample of the sample): every expert's answer, the routed sum, and the rest.

    ``E * n * D`` numbers in the experts' own dtype: with 512 tokens less than the weights of the layer.
    """
    x_nD = sample.hidden_nD[:tokens].to(experts.gate_EID.device)
    n, D = x_nD.shape
    E, dtype = experts.gate_EID.shape[0], experts.gate_EID.dtype
    output_EnD = torch.empty(E, n, D, dtype=dtype, device=x_nD.device)
    routed_nD = torch.zeros(n, D, dtype=torch.float64, device=x_nD.device)
    index_nk, weight_nk = (value[:tokens].to(x_nD.device) for value in (sample.index_nk, sample.weight_nk))
    for expert in range(E):
        output_EnD[expert] = expert_output(experts, expert, x_nD)
        gate_n = (weight_nk * (index_nk == expert)).sum(1, keepdim=True)
        routed_nD.addcmul_(gate_n.double(), output_EnD[expert].double())
    rest_nD = torch.zeros_like(routed_nD) if sample.rest_nD is None else sample.rest_nD[:tokens].to(routed_nD)
    return output_EnD, routed_nD, rest_nD


def _forward_selection(
    output_EnD: Tensor, routed_nD: Tensor, rest_nD: Tensor, gate_E: Tensor, keep: int
) -> tuple[list[int], list[float]]:
    """The experts in the order in which they are added, and the divergence once each is in; ties to the lower index."""
    order: list[int] = []
    divergences: list[float] = []
    base_nD = rest_nD.clone()
    for _ in range(keep):
        left_E = torch.ones(len(gate_E), dtype=torch.bool)
        left_E[order] = False
        candidates = left_E.nonzero().flatten().tolist()
        js = divergence_with(routed_nD + rest_nD, base_nD, [output_EnD[e] for e in candidates], gate_E[candidates])
        best = int(js.argmin())
        order.append(candidates[best])
        divergences.append(float(js[best]))
        base_nD.add_(output_EnD[order[-1]].double(), alpha=float(gate_E[order[-1]]))
    return order, divergences


def _errors(
    output_EnD: Tensor, routed_nD: Tensor, mean_E: Tensor, order: list[int]
) -> tuple[list[float], Tensor, list[float]]:
    """Relative squared errors with mean gates and with fitted ones for every number of experts; the fitted gates.

    Every component of every token is one observation, the experts' values there are its regressors.
    """
    C = len(order)
    chosen = [output_EnD[expert].double().flatten() for expert in order]
    inner_CC = torch.stack([torch.stack([left @ right for right in chosen]) for left in chosen]).cpu()
    cross_C = torch.stack([routed_nD.flatten() @ value for value in chosen]).cpu()
    energy = routed_nD.square().sum().cpu()
    mean_C, fitted_C = mean_E[order], mean_E[order]
    scale = float(energy) or 1.0
    mean_errors, fitted_errors = [], []
    for size in range(1, C + 1):
        gram = least_squares.Gram(inner_CC[:size, :size], cross_C[None, :size], energy, intercept=False)
        solution, _ = least_squares.solve(gram, RIDGE, mean_C[None, :size])
        fitted_C = solution[0]
        mean_errors.append(least_squares.squared_error(gram, mean_C[None, :size]) / scale)
        fitted_errors.append(least_squares.squared_error(gram, solution) / scale)
    return mean_errors, fitted_C, fitted_errors


def _along(order: list[int], value: list[float], E: int, other: float | None = None) -> Tensor:
    """``value`` at the places of the experts that were added; at all others ``other``, or its last one."""
    value_E = torch.full((E,), value[-1] if other is None else other, dtype=torch.float64)
    value_E[order] = torch.tensor(value, dtype=torch.float64)
    return value_E
