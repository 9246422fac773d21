"""Each statistic equals a loop over single tokens, however the tokens are split into batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conmoe.ops.experts import expert_output
from conmoe.registry import Statistic, statistics
from conmoe.types import Routed, Routing
from tests.layers import Layer, observe, random_experts

REGISTERED = sorted(statistics().values(), key=lambda item: item.name)


def accumulate(item: Statistic, layer: Layer, batches: list[Tensor]) -> Tensor:
    """What an observer does: add the rows of each expert that got tokens, batch after batch."""
    E, D = layer.routing.experts, layer.x_TD.shape[1]
    total = torch.zeros([{"E": E, "D": D}[axis] for axis in item.shape], dtype=torch.float64)

    def add(where: int | slice, value: Tensor) -> None:
        total[where] = total[where] + value if item.reduce == "sum" else torch.maximum(total[where], value)

    for batch in batches:
        index_Tk, weight_Tk = layer.routing.index_Tk[batch], layer.routing.weight_Tk[batch]
        if item.per == "batch":
            add(slice(None), item.function(Routing(index_Tk, weight_Tk, layer.routing.logits_TE[batch], E)))
            continue
        for expert in index_Tk.unique().tolist():
            token_n, slot_n = (index_Tk == expert).nonzero(as_tuple=True)
            y_nD = expert_output(layer.experts, expert, layer.x_TD[batch][token_n])
            routed = Routed(expert, weight_Tk[token_n, slot_n], y_nD, torch.linalg.vector_norm(y_nD, dim=1))
            add(expert, item.function(routed))
    return total


@pytest.mark.parametrize("item", REGISTERED, ids=lambda item: item.name)
def test_statistic_equals_a_loop_over_tokens(item: Statistic):
    layer = observe(random_experts(6, bias=True), unused=(4,))
    everything = [torch.arange(layer.x_TD.shape[0])]
    torch.testing.assert_close(
        accumulate(item, layer, everything), layer.statistics.sums[item.name], rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("item", REGISTERED, ids=lambda item: item.name)
def test_statistic_does_not_depend_on_order_or_split_of_batches(item: Statistic):
    layer = observe(random_experts(6), seed=3)
    tokens = torch.randperm(layer.x_TD.shape[0], generator=torch.Generator().manual_seed(0))
    once = accumulate(item, layer, [tokens.sort().values])
    torch.testing.assert_close(accumulate(item, layer, list(tokens.split([1, 30, 7, 42]))), once, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("item", REGISTERED, ids=lambda item: item.name)
def test_statistic_is_wide_enough_to_be_added_up_for_long(item: Statistic):
    layer = observe(random_experts(4), T=8)
    x_nD = layer.x_TD.bfloat16()
    routed = Routed(0, torch.rand(8), x_nD, torch.linalg.vector_norm(x_nD, dim=1, dtype=torch.float32))
    value = item.function(routed if item.per == "expert" else layer.routing)
    assert value.dtype in (torch.float64, torch.int64)
    assert value.ndim == len(item.shape) - (item.per == "expert")
    assert item.help


def test_half_precision_outputs_are_summed_in_single_precision():
    y_nD = torch.full((4096, 2), 1.01).bfloat16()
    routed = Routed(0, torch.ones(4096), y_nD, torch.ones(4096))
    single = float(y_nD[0, 0])
    assert statistics()["output"].function(routed)[0].item() == pytest.approx(4096 * single, rel=1e-5)
    assert statistics()["output_squared"].function(routed)[0].item() == pytest.approx(4096 * single**2, rel=1e-5)


def test_pairs_hold_counts_on_the_diagonal():
    layer = observe(random_experts(6), k=3)
    pair_EE = statistics()["pair"].function(layer.routing)
    assert pair_EE.diagonal().tolist() == layer.statistics.sums["count"].tolist()
    assert torch.equal(pair_EE, pair_EE.T)
    assert int(pair_EE.sum()) == 9 * layer.x_TD.shape[0]
