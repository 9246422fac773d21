"""A token sample as two halves: the same decision, made twice on tokens that have nothing to do with each other.

``n`` tokens, ``E`` experts, ``K`` prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conmoe.ops.experts import expert_output
from conmoe.registry import statistics as registered_statistics
from conmoe.types import Experts, LayerPlan, LayerStatistics, Routed, Routing, TokenSample, sample_tensors

#: What :func:`answers` says of an expert that a constant answers for.
CONSTANT = -2


def first_half(sample: TokenSample) -> Tensor:
    """Which tokens are in the first half: every second one by priority, which is a random number."""
    return sample.priority_n.argsort(stable=True).argsort(stable=True) % 2 == 0


def first_drawn(sample: TokenSample, tokens: int) -> TokenSample:
    """The ``tokens`` tokens of lowest priority, in their order: what a smaller sample would have been."""
    chosen_n = torch.zeros(sample.priority_n.numel(), dtype=torch.bool)
    chosen_n[sample.priority_n.argsort(stable=True)[:tokens]] = True
    return part(sample, chosen_n)


def part(sample: TokenSample, chosen_n: Tensor) -> TokenSample:
    """The tokens ``chosen_n`` (a mask) of a sample."""
    return replace(sample, **{name: value[chosen_n] for name, value in sample_tensors(sample).items()})


@torch.no_grad()
def recount(sample: TokenSample, experts: Experts) -> LayerStatistics:
    """All registered statistics of one layer over the tokens of its sample, as if these were the calibration text.

    Equal to what calibration adds up on these tokens, but that sampled gates are float32. Cost: ``n k`` expert
    evaluations.
    """
    E, _, D = experts.gate_EID.shape
    device, sizes = experts.gate_EID.device, {"E": E, "D": D}
    x_nD, index_nk = sample.hidden_nD.to(device), sample.index_nk.long().to(device)
    weight_nk = sample.weight_nk.float().to(device)
    known = registered_statistics()
    sums = {
        name: torch.zeros([sizes[axis] for axis in item.shape], dtype=torch.float64) for name, item in known.items()
    }
    routing = Routing(index_nk, weight_nk, sample.logits_nE.to(device), E)
    for name, item in known.items():
        if item.per == "batch":
            sums[name] += item.function(routing).cpu()
    for expert in index_nk.unique().tolist():
        rows, slots = (index_nk == expert).nonzero(as_tuple=True)
        y_nD = expert_output(experts, expert, x_nD[rows])
        norm_n = torch.linalg.vector_norm(y_nD, dim=1, dtype=torch.float32)
        routed = Routed(expert, weight_nk[rows, slots], y_nD, norm_n)
        for name, item in known.items():
            if item.per == "expert":
                sums[name][expert] = item.function(routed).cpu()
    return LayerStatistics(len(x_nD), sums, sample, torch.zeros(E, dtype=torch.int64))


def kept_alike(left: LayerPlan, right: LayerPlan, held: Sequence[int] = ()) -> tuple[float, float] | None:
    """The share of kept experts that two plans have in common, and what two random choices would; None for no choice.

    Of a mixture, the expert with the largest share counts as kept. Those ``held`` had to stay, and do not count.
    """
    named = [set(_named(plan).tolist()) - set(held) for plan in (left, right)]
    size = max(map(len, named))
    if not size:
        return None
    return len(named[0] & named[1]) / size, size / (left.assignment_E.numel() - len(held))


def answers_alike(left: LayerPlan, right: LayerPlan) -> float | None:
    """The share of experts with the same fate in two plans: the same prototype (by its largest share), a constant, or
    dropped. None for condensed layers, which have nothing to assign."""
    if left.static_K is not None or right.static_K is not None:
        return None
    return float((_answers(left) == _answers(right)).double().mean())


def _named(plan: LayerPlan) -> Tensor:
    return plan.mixing_KE.abs().argmax(dim=1)


def _answers(plan: LayerPlan) -> Tensor:
    named_K, K = _named(plan), plan.mixing_KE.shape[0]
    answer_E = named_K[plan.assignment_E.clamp(0, K - 1)].masked_fill(plan.assignment_E < 0, -1)
    return answer_E.masked_fill(plan.assignment_E >= K, CONSTANT)
