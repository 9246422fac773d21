"""Small random MoE layers, observed by a loop that shares no code with the package: one token, one slot at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from conmoe.types import EXPERT_TENSORS, Experts, LayerPlan, LayerStatistics, Routing, TokenSample


@dataclass(frozen=True)
class Layer:
    """Experts, the tokens ``x_TD`` they saw, how those were routed, and what a naive loop observed."""

    experts: Experts
    x_TD: Tensor
    routing: Routing
    statistics: LayerStatistics


def swiglu(gate_nI: Tensor, up_nI: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate_nI) * up_nI


def random_experts(
    E: int, D: int = 16, width: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = False
) -> Experts:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    weights = draw(E, width, D), draw(E, width, D), draw(E, D, width)
    return Experts(*weights, swiglu, *((draw(E, width), draw(E, width), draw(E, D)) if bias else ()))


def with_rows(experts: Experts, source_E: list[int]) -> Experts:
    """Expert ``e`` becomes a copy of expert ``source_E[e]``."""
    return replace(
        experts,
        gate_EID=experts.gate_EID[source_E],
        up_EID=experts.up_EID[source_E],
        down_EDI=experts.down_EDI[source_E],
    )


def answer(experts: Experts, expert: int, x_D: Tensor) -> Tensor:
    """One expert's output for one token, from the formula."""

    def product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return weight[expert] @ x + (0 if bias is None else bias[expert])

    gate = product(experts.gate_EID, experts.gate_bias_EI, x_D)
    up = product(experts.up_EID, experts.up_bias_EI, x_D)
    return product(experts.down_EDI, experts.down_bias_ED, gate / (1 + torch.exp(-gate)) * up)


#: What one token adds to expert ``e``'s row, from its gate and output.
PER_EXPERT: Mapping[str, Callable[[float, Tensor], Tensor | float]] = {
    "count": lambda gate, y_D: 1,
    "gate": lambda gate, y_D: gate,
    "gate_squared": lambda gate, y_D: gate * gate,
    "norm": lambda gate, y_D: y_D.norm(),
    "norm_squared": lambda gate, y_D: y_D.norm() ** 2,
    "gate_norm": lambda gate, y_D: gate * y_D.norm(),
    "gate_norm_squared": lambda gate, y_D: gate**2 * y_D.norm() ** 2,
    "output": lambda gate, y_D: y_D,
    "output_squared": lambda gate, y_D: y_D**2,
    "peak": lambda gate, y_D: y_D.abs().max(),
}


def observe(experts: Experts, *, k: int = 2, T: int = 80, seed: int = 0, unused: tuple[int, ...] = ()) -> Layer:
    """Route ``T`` random tokens by a random softmax router (never to ``unused``) and add everything up by hand."""
    generator = torch.Generator().manual_seed(1000 + seed)
    E, _, D = experts.gate_EID.shape
    x_TD = torch.randn(T, D, generator=generator)
    router_DE = torch.randn(D, E, generator=generator)

    def logits_of(hidden_nD: Tensor, rows_ED: Tensor = router_DE.T) -> Tensor:
        logits_nE = hidden_nD @ rows_ED.T
        logits_nE[:, list(unused)] -= 1000.0
        return logits_nE

    def reroute(hidden_nD: Tensor, kept_K: Tensor, router_KD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        left_E = torch.zeros(E, dtype=torch.bool)
        left_E[kept_K] = True
        rows_ED = router_DE.T if router_KD is None else router_DE.T.index_copy(0, kept_K, router_KD)
        weight_nk, index_nk = logits_of(hidden_nD, rows_ED).masked_fill(~left_E, -torch.inf).softmax(dim=-1).topk(k)
        return index_nk, weight_nk

    logits_TE, experts = logits_of(x_TD), replace(experts, reroute=reroute, router_ED=router_DE.T)
    index_Tk, weight_Tk = reroute(x_TD, torch.arange(E))
    routing = Routing(index_Tk, weight_Tk, logits_TE, E)
    sample = TokenSample(x_TD, index_Tk.int(), weight_Tk, logits_TE, torch.rand(T, generator=generator))
    statistics = LayerStatistics(T, naive_sums(experts, x_TD, routing), sample, torch.zeros(E, dtype=torch.int64))
    return Layer(experts, x_TD, routing, statistics)


def naive_sums(experts: Experts, x_TD: Tensor, routing: Routing) -> dict[str, Tensor]:
    E, D = routing.experts, x_TD.shape[1]
    wide = {"output", "output_squared"}
    sums = {name: torch.zeros((E, D) if name in wide else (E,), dtype=torch.float64) for name in PER_EXPERT}
    sums |= {"pair": torch.zeros(E, E).double(), "logit": torch.zeros(E).double()}
    sums["logit_gram"] = torch.zeros(E, E).double()
    for x_D, chosen, gates, z_E in zip(x_TD, routing.index_Tk, routing.weight_Tk, routing.logits_TE, strict=True):
        for expert, gate in zip(chosen.tolist(), gates.tolist(), strict=True):
            y_D = answer(experts, expert, x_D).double()
            for name, added in PER_EXPERT.items():
                row = torch.as_tensor(added(gate, y_D), dtype=torch.float64)
                sums[name][expert] = (
                    torch.maximum(sums[name][expert], row) if name == "peak" else sums[name][expert] + row
                )
        for i, j in combinations_with_replacement(chosen.tolist(), 2):
            sums["pair"][i, j] += 1
            sums["pair"][j, i] += i != j
        sums["logit"] += z_E
        sums["logit_gram"] += torch.outer(z_E.double(), z_E.double())
    return sums


def layer_output(layer: Layer, plan: LayerPlan | None = None) -> Tensor:
    """``y_t = sum over slots of g * E(x)``, summed in float64, in the dtype of the tokens.

    With a plan, the prototype of each slot answers, its gate times the gain; dropped slots are silent.
    """
    E = layer.routing.experts
    answers = layer.experts if plan is None else prototypes(layer.experts, plan)
    answer_E = list(range(E)) if plan is None else plan.assignment_E.tolist()
    gain_E = [1.0] * E if plan is None else plan.gain_E.tolist()
    y_TD = torch.zeros_like(layer.x_TD, dtype=torch.float64)
    slots = zip(layer.x_TD, layer.routing.index_Tk, layer.routing.weight_Tk, strict=True)
    for token, (x_D, chosen, gates) in enumerate(slots):
        for expert, gate in zip(chosen.tolist(), gates.tolist(), strict=True):
            prototypes_held = answers.gate_EID.shape[0]
            if answer_E[expert] >= prototypes_held:
                assert plan is not None
                assert plan.constant_CD is not None
                y_TD[token] += gate * plan.constant_CD[answer_E[expert] - prototypes_held].double()
            elif answer_E[expert] >= 0:
                x_D = x_D.to(answers.gate_EID.dtype)
                y_TD[token] += gain_E[expert] * gate * answer(answers, answer_E[expert], x_D).double()
    return y_TD.to(layer.x_TD.dtype)


def prototypes(experts: Experts, plan: LayerPlan) -> Experts:
    """What a plan says the ``K`` prototypes are, in float64: sums of the experts' tensors, or the plan's own."""
    made: dict[str, Any] = {}
    for name in EXPERT_TENSORS:
        source = getattr(experts, name)
        if source is not None:
            made[name] = torch.zeros(plan.mixing_KE.shape[0], *source.shape[1:], dtype=torch.float64)
            for prototype, recipe in enumerate(plan.mixing_KE.tolist()):
                for expert, share in enumerate(recipe):
                    made[name][prototype] += share * source[expert].double()
        if name in plan.weights:
            assert plan.weights[name].shape == made[name].shape
            made[name] = plan.weights[name].double()
        if f"{name}.left" in plan.weights:
            made[name] = factored(plan.weights, name)
    return replace(experts, **made)


def factored(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """``left @ right`` of each prototype, plus the rows or columns beside it, number by number in float64."""
    left_KOr, right_KrI, index_S = (weights[f"{name}.{part}"] for part in ("left", "right", "index"))
    matrix_KOI = torch.stack([left.double() @ right.double() for left, right in zip(left_KOr, right_KrI, strict=True)])
    _, rows, columns = matrix_KOI.shape
    by_row = f"{name}.values_rows" in weights
    values_SA = weights[f"{name}.values_rows" if by_row else f"{name}.values_columns"]
    for line, values in zip(index_S.tolist(), values_SA.tolist(), strict=True):
        for place, value in enumerate(values):
            if by_row:
                matrix_KOI[line // rows, line % rows, place] += value
            else:
                matrix_KOI[line // columns, place, line % columns] += value
    return matrix_KOI


def sources(plan: LayerPlan) -> list[int]:
    """The source expert that answers for each logical expert, -1 where it was dropped; recipes must be one-hot."""
    kept = [row.nonzero().flatten().tolist() for row in plan.mixing_KE]
    assert all(len(members) == 1 for members in kept)
    return [kept[prototype][0] if prototype >= 0 else -1 for prototype in plan.assignment_E.tolist()]


def recipes(plan: LayerPlan) -> Tensor:
    """``[E, E]``: what each logical expert is now made of; all zero where it was dropped or is a constant."""
    K = plan.mixing_KE.shape[0]
    made = (plan.assignment_E >= 0) & (plan.assignment_E < K)
    return plan.mixing_KE.double()[plan.assignment_E.clamp(0, K - 1)] * made.unsqueeze(1)
