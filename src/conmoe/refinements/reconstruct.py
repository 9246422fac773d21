"""Reconstruction: prototypes, gains and the rows of a cut router fitted by gradient to the layer's own output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from conmoe.ops.accumulate import add_at
from conmoe.ops.answers import Answers, answer, prototype, revised, square, tokens_of
from conmoe.ops.evidence import surely_lower
from conmoe.ops.experts import tensors
from conmoe.registry import refinement
from conmoe.types import LayerPlan, UsageError

#: How often, in a run, the fit is measured on the held-out tokens.
LOOKS = 10
#: So many looks in a row without progress end a run.
PATIENCE = 3
#: Higher rates mean nothing: one step is a million times as long as what it changes.
HIGHEST = 1e6
#: The share of the steps over which the rate rises.
WARM_UP = 0.05
#: A run that may have made nothing better is repeated at a fourth of the rate, so often at most.
REPEATS = 4

#: What is fitted, by name: tensors of all prototypes, ``gain_E``, ``router_KD``.
Values = dict[str, Tensor]


def check(*, steps: int, batch: int, rate: float, **_others: object) -> None:
    """Raise a UsageError unless there is something to do, at a rate that means something."""
    if steps < 1 or batch < 1 or not 0 < rate <= HIGHEST:
        raise UsageError(
            "reconstruct takes one step or more, a batch of one token or more, and a rate above 0, but no higher "
            f"than {HIGHEST:g}."
        )


@refinement("reconstruct", check=check)
def reconstruct(
    answers: Answers,
    held_n: Tensor,
    frozen: tuple[int, ...],
    *,
    steps: Annotated[int, "steps of Adam for each layer"] = 300,
    batch: Annotated[int, "tokens of a step"] = 2048,
    rate: Annotated[float, "how far a step may turn a unit: 1 is as far as its own size"] = 1.0,
    router: Annotated[bool, "fit the rows of a router that lost some, too"] = True,
    seed: Annotated[int, "seed of the order of the tokens"] = 0,
) -> LayerPlan:
    """All weights of the prototypes, by gradient descent on ``||y - y'||^2``, one layer at a time.

    Adam on gate, up and down projections and their biases; on the gains of experts that share a prototype; and on the
    rows that are left of a router that lost some (a router that is whole stays untouched). The rate rises over a
    twentieth of the steps and falls to zero along a cosine. The layer is measured on the held-out tokens ten times on
    the way, its weights rounded as they will be stored, and the best of these is the result; three looks in a row
    without progress end the run, and one that makes the held-out error lower by less than two standard errors is
    repeated at a fourth of the rate, four times at most. No gradient leaves the layer, and nothing is trained on the
    text itself: the target is what the source's layer adds.

    The step of a weight matrix of ``fan`` inputs is ``rate`` times the root of its mean square over ``sqrt(fan)``: if
    the signs of all its elements agreed, a step would change a unit by its own size (so rates carry over between
    widths, as in arXiv 2203.03466). Constants, and prototypes that are ``frozen``, stay.

    Cost, in multiplications: ``9 k D I`` for a token and a step, ``9 steps batch k D I`` in all, and ``3 n k D I`` for
    a look; in float32 on a CPU, in bfloat16 on a GPU. ``16 * 3 K D I`` bytes for weights, gradients and the two moments
    of Adam, half of that again for what is kept, and ``8 n D`` bytes of the layer's outputs.
    """
    layer = _open(answers, held_n, frozen, router)
    start_n = answers.residual_nD[held_n].double().square().sum(dim=1)
    for repeat in range(1 + REPEATS):
        best, error_n = _run(layer, steps, batch, rate / 4**repeat, seed)
        if surely_lower(error_n, start_n):
            break
    return best


@dataclass(frozen=True, slots=True)
class _Layer:
    answers: Answers
    held_n: Tensor
    first: Values  # what the plan has now, in float32
    held: Values  # of each, the rows that stay
    scale: float  # of the loss: the energy of an average token of the source
    target_nD: Tensor  # what the prototypes should add: the source's output less constants
    expert_nk: Tensor  # as in the answers, where the routing is not fitted
    gate_nk: Tensor  # without gains


def _open(answers: Answers, held_n: Tensor, frozen: tuple[int, ...], router: bool) -> _Layer:
    plan, experts = answers.plan, answers.experts
    K, device = plan.mixing_KE.shape[0], answers.x_nD.device
    rows = [prototype(answers, number) for number in range(K)]
    first = {name: torch.cat([tensors(row)[name] for row in rows]) for name in tensors(experts)}
    gain_E = plan.gain_E.float().to(device)
    held = dict.fromkeys(first, torch.tensor(frozen, dtype=torch.int64, device=device))
    free_E = _free_gains(plan, frozen).to(device)
    if bool(free_E.any()):
        first["gain_E"], held["gain_E"] = gain_E.clone(), (~free_E).nonzero().flatten()
    left_E = plan.assignment_E >= 0
    cut = experts.router_ED is not None and not bool(left_E.all())
    if router and cut and not plan.skip and plan.constant_CD is None:
        assert experts.router_ED is not None
        rows_KD = experts.router_ED[left_E] if plan.router_KD is None else plan.router_KD
        first["router_KD"], held["router_KD"] = rows_KD.float().to(device), held["down_EDI"][:0]
    target_nD = answers.source_nD
    if plan.constant_CD is not None:
        target_nD = target_nD.clone()
        for number in range(K, K + plan.constant_CD.shape[0]):
            tokens, share_c = tokens_of(answers, number)
            target_nD.index_add_(0, tokens, -share_c.unsqueeze(1) * answer(answers, number, tokens))
    gate_nk = answers.gate_nk
    if "gain_E" in first:  # a gain of 0 leaves nothing to learn from, and stays
        gate_nk = gate_nk / gain_E.where(gain_E != 0, 1.0)[answers.expert_nk.clamp_min(0)]
    scale = square(answers.source_nD) / answers.source_nD.shape[0] or 1.0
    return _Layer(answers, held_n, first, held, scale, target_nD, answers.expert_nk, gate_nk)


def _free_gains(plan: LayerPlan, frozen: tuple[int, ...]) -> Tensor:
    """The logical experts whose prototype answers for others too, and is not frozen."""
    K = plan.mixing_KE.shape[0]
    made_E = (plan.assignment_E >= 0) & (plan.assignment_E < K)
    answer_E = plan.assignment_E.clamp(0, K - 1)
    shared_K = torch.bincount(answer_E[made_E], minlength=K) > 1
    shared_K[list(frozen)] = False
    return made_E & shared_K[answer_E]


@torch.enable_grad()
def _run(layer: _Layer, steps: int, batch: int, rate: float, seed: int) -> tuple[LayerPlan, Tensor]:
    """One run; the plan of lowest held-out error, and that error, token by token."""
    values = {name: value.clone().requires_grad_() for name, value in layer.first.items()}
    optimizer = torch.optim.Adam(
        [{"params": [value], "lr": rate * _reach(name, value)} for name, value in values.items()], betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    best, lowest_n = layer.answers.plan, layer.target_nD.new_full((int(layer.held_n.sum()),), math.inf)
    patience = PATIENCE
    looks = {round(steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    for step, rows_b in zip(range(1, steps + 1), _batches(layer, batch, seed), strict=False):
        lost = (layer.target_nD[rows_b] - _added(layer, values, rows_b)).square().sum(dim=1).mean() / layer.scale
        optimizer.zero_grad()
        if lost.requires_grad:  # no prototype may answer any of these tokens
            lost.backward()
        for name, value in values.items():
            if value.grad is not None:
                value.grad[layer.held[name]] = 0.0
        optimizer.step()
        schedule.step()
        if step in looks:
            rounded = _rounded(layer, values)
            if not all(bool(torch.isfinite(value).all()) for value in rounded.values()):
                break
            made = _with(layer, rounded)
            with torch.no_grad():
                error_n = revised(layer.answers, made).residual_nD[layer.held_n].double().square().sum(dim=1)
            if float(error_n.sum()) < float(lowest_n.sum()):
                best, lowest_n, patience = made, error_n, PATIENCE
            else:
                patience -= 1
            if not patience or not math.isfinite(float(error_n.sum())):
                break
    return best, lowest_n


def _added(layer: _Layer, values: Mapping[str, Tensor], rows_b: Tensor) -> Tensor:
    """What the prototypes add to these tokens, as a function of ``values``."""
    answers, plan = layer.answers, layer.answers.plan
    x_bD, device = answers.x_nD[rows_b], answers.x_nD.device
    expert_bk, gate_bk = layer.expert_nk[rows_b], layer.gate_nk[rows_b]
    if "router_KD" in values:
        assert answers.experts.reroute is not None
        left = (plan.assignment_E >= 0).nonzero().flatten()
        expert_bk, gate_bk = answers.experts.reroute(x_bD, left, values["router_KD"])
        expert_bk = expert_bk.long()
        if "gain_E" not in values:
            gate_bk = gate_bk * plan.gain_E.float().to(device)[expert_bk]
    if "gain_E" in values:
        gate_bk = gate_bk * values["gain_E"][expert_bk.clamp_min(0)]
    answer_bk = plan.assignment_E.to(device)[expert_bk].masked_fill(expert_bk < 0, -1)
    K = plan.mixing_KE.shape[0]
    y_bD = torch.zeros(x_bD.shape, device=device)
    # one sort instead of a search for each prototype's tokens
    slot_s = answer_bk.flatten().argsort(stable=True)
    counts = torch.bincount(answer_bk.flatten() + 1, minlength=K + 1).tolist()
    parts = slot_s.split(counts)[1 : K + 1]
    rows = _by_prototype(values, K)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    for number, slots in enumerate(parts):
        if slots.numel():
            tokens = slots // expert_bk.shape[1]
            with half:
                output_cD = _output(layer, rows[number], x_bD[tokens])
            add_at(y_bD, 0, tokens, gate_bk.flatten()[slots].unsqueeze(1) * output_cD.float())
    return y_bD


def _by_prototype(values: Mapping[str, Tensor], K: int) -> list[Values]:
    """The tensors of each prototype; all are taken at once, for the gradient of taking one is a tensor of them all."""
    taken = {name: value.unbind() for name, value in values.items() if name not in ("gain_E", "router_KD")}
    return [{name: rows[number] for name, rows in taken.items()} for number in range(K)]


def _output(layer: _Layer, named: Values, x_cD: Tensor) -> Tensor:
    x_cD = x_cD.float()
    gate_cI = linear(x_cD, named["gate_EID"], named.get("gate_bias_EI"))
    up_cI = linear(x_cD, named["up_EID"], named.get("up_bias_EI"))
    hidden_cI = layer.answers.experts.activate(gate_cI, up_cI)
    return linear(hidden_cI, named["down_EDI"], named.get("down_bias_ED"))


def _rounded(layer: _Layer, values: Mapping[str, Tensor]) -> Values:
    """These values as they will be stored: in the dtype of the source, gains in float32. Copies, for steps go on."""
    kinds = {name: value.dtype for name, value in tensors(layer.answers.experts).items()}
    if layer.answers.experts.router_ED is not None:
        kinds["router_KD"] = layer.answers.experts.router_ED.dtype
    return {name: value.detach().to(kinds.get(name, value.dtype), copy=True) for name, value in values.items()}


def _with(layer: _Layer, rounded: Mapping[str, Tensor]) -> LayerPlan:
    plan, made = layer.answers.plan, {name: value.cpu() for name, value in rounded.items()}
    changes: dict[str, Any] = {}
    if "gain_E" in made:
        held = layer.held["gain_E"].cpu()
        changes["gain_E"] = made.pop("gain_E").double().index_copy(0, held, plan.gain_E.double()[held])
    if "router_KD" in made:
        changes["router_KD"] = made.pop("router_KD")
    return replace(plan, weights=dict(plan.weights) | made, **changes)


def _reach(name: str, value: Tensor) -> float:
    """The step of rate 1."""
    size = float(value.detach().square().mean().sqrt())
    if value.ndim == 1:  # gains
        return 0.03 * size
    fan = value.shape[-1]
    if value.ndim == 2 and name != "router_KD":  # a bias of each unit stands for one input
        return 0.1 * size
    return size / math.sqrt(fan)


def _share(step: int, steps: int) -> float:
    """Of the full rate, at a step counted from 0."""
    return min(1.0, (step + 1) / (1 + WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(layer: _Layer, batch: int, seed: int) -> Iterator[Tensor]:
    """Tokens that are not held out, in rounds, each in another order."""
    generator = torch.Generator().manual_seed(seed)
    train = (~layer.held_n).nonzero().flatten().cpu()
    while True:
        order = train[torch.randperm(train.numel(), generator=generator)]
        size = min(batch, order.numel())
        for start in range(0, order.numel() - size + 1, size):
            yield order[start : start + size].to(layer.target_nD.device)
