"""Methods work where weights and the token sample are on a GPU and sums are on the CPU; the GPU is pretended."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from conmoe.ops import subsets
from conmoe.ops.accumulate import add_at
from conmoe.ops.experts import tensors
from conmoe.refine import refine
from conmoe.registry import Method, bind_options, methods
from conmoe.types import Experts, LayerPlan, LayerStatistics, UsageError, sample_tensors
from tests.layers import observe, random_experts
from tests.pretended_gpu import PretendedGpu, is_there, put

#: Options without which a method would not compute much on layers as small as these.
SMALL: dict[str, dict[str, Any]] = {
    "mc-smoe": {"rank": 2, "ratio": 0.3},
    "sub-moe": {"rank": 0.5},
    "dern": {"threshold": 0.1},
}
#: Methods that plan each layer alone.
EACH_ALONE = {"cd-moe", "naee"}
plan_layer = import_module("conmoe.plan").plan_layer


def cases() -> list[Any]:
    """Every method by its defaults, alone and in a scope, and alone with every other choice of every option."""
    found = []
    for method in methods().values():
        found += [pytest.param(method, {}, scope, id=f"{method.name}-{scope}") for scope in (1, 2)]
        for option in method.options.values():
            values = option.choices or ((True, False) if option.type is bool else ())
            found += [
                pytest.param(method, {option.name: value}, 1, id=f"{method.name}-{option.name}={value}")
                for value in values
                if value != option.default
            ]
    return found


def on_gpu(seed: int) -> tuple[LayerStatistics, Experts]:
    layer = observe(random_experts(8, seed=seed, bias=True), seed=seed, T=40, unused=(3,))
    original = layer.experts.reroute
    assert original is not None

    def reroute(hidden_nD: Tensor, kept_K: Tensor, router_KD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = () if router_KD is None else (router_KD.cpu(),)
        index_nk, weight_nk = original(hidden_nD.cpu(), kept_K.cpu(), *rows)
        return index_nk.to(hidden_nD.device), weight_nk.to(hidden_nD.device)

    weights: dict[str, Any] = {name: put(tensor.clone()) for name, tensor in tensors(layer.experts).items()}
    sample = layer.statistics.sample
    moved: dict[str, Any] = {name: put(tensor.clone()) for name, tensor in sample_tensors(sample).items()}
    statistics = replace(layer.statistics, sample=replace(sample, **moved))
    return statistics, replace(layer.experts, **weights, reroute=reroute)


@pytest.mark.parametrize(("method", "options", "scope"), cases())
def test_every_method_plans_on_a_gpu_and_brings_the_plan_back(method: Method, options: dict[str, Any], scope: int):
    parts = [on_gpu(seed) for seed in range(scope)]
    held = () if method.condenses else (1,)
    with PretendedGpu():
        statistics, experts = subsets.join_layers([part for part, _ in parts], [part for _, part in parts])
        bound = bind_options(method, {**SMALL.get(method.name, {}), **options})
        if scope == 2 and method.name in EACH_ALONE:
            with pytest.raises(UsageError, match="--scope 1"):
                plan_layer(method, statistics, experts, 10, held, 1, bound)
            return
        plan = plan_layer(method, statistics, experts, 5 * scope, held, 1, bound)
    assert not [name for name, tensor in contents(plan).items() if is_there(tensor)], "left on the GPU"


@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
@pytest.mark.parametrize(
    ("kind", "options"), [("gains", {}), ("refit", {}), ("reconstruct", {"steps": 10, "batch": 16})]
)
@pytest.mark.parametrize("name", ["conmoe", "reap", "mone", "m-smoe"])
def test_plans_are_refined_on_a_gpu(name: str, kind: str, options: dict[str, Any]):
    statistics, experts = on_gpu(0)
    with PretendedGpu():
        plan = plan_layer(methods()[name], statistics, experts, 4, (1,), 1, bind_options(methods()[name], {}))
        frozen = plan.assignment_E[[1]].tolist()
        refined = refine(kind, statistics.sample, experts, plan, frozen=frozen, options=options)
    assert not [name for name, tensor in contents(refined).items() if is_there(tensor)], "left on the GPU"


def contents(plan: LayerPlan) -> dict[str, Tensor]:
    names = ("assignment_E", "mixing_KE", "gain_E", "constant_CD", "static_K", "router_KD")
    named = {name: getattr(plan, name) for name in names}
    return {name: value for name, value in named.items() if value is not None} | {**plan.weights, **plan.scores}


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    here = torch.ones(3)
    with PretendedGpu():
        there = here.to("cuda")
        assert there.device.type == "cuda"
        assert (there * 2).sum().device.type == "cuda"
        assert there[torch.tensor([1])].cpu().device.type == "cpu"
        for mistake in (
            lambda: here + there,
            there.numpy,
            lambda: here[there.long()],
            lambda: torch.cat([here, there]),
        ):
            with pytest.raises(AssertionError):
                mistake()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sums_at_places_are_the_same_on_both_devices(axis: int):
    generator = torch.Generator().manual_seed(axis)
    total = torch.randn(3, 4, 5, generator=generator).double()
    index_n = torch.tensor([1, 0, 1, 2, 1])
    values = torch.randn([5 if place == axis else size for place, size in enumerate(total.shape)], generator=generator)
    expected = total.clone()
    for row, place in enumerate(index_n.tolist()):
        expected.select(axis, place).add_(values.double().select(axis, row))
    torch.testing.assert_close(add_at(total.clone(), axis, index_n, values.double()), expected)
    with PretendedGpu():
        there = add_at(total.to("cuda"), axis, index_n.to("cuda"), values.double().to("cuda")).cpu()
    torch.testing.assert_close(there, expected)
