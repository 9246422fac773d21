"""Layers that depart from the common form of a consolidated checkpoint, on disk, loaded, and against a reference.

Router rows that are gone, constants, static gates, experts that are skipped: what each means is worked out here from
the stock model's own blocks, with hooks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import conmoe
from conmoe.ops import plans
from conmoe.source import open_source, read_experts
from conmoe.types import LayerPlan
from tests.conftest import token_data
from tests.families import EXPERTS, TINY, TOP_K
from tests.results import hand_made, load, load_stock, logits, on_disk, silenced

families = pytest.mark.parametrize("family", TINY)
ungrouped = pytest.mark.parametrize("family", [f for f in TINY if f not in ("deepseek_v2", "deepseek_v3", "glm4_moe")])


def moe_indices(folder: Path) -> list[int]:
    return [layer.index for layer in open_source(folder).layers]


def written(folder: Path, out: Path, per_layer: dict[int, LayerPlan]) -> nn.Module:
    plan = hand_made(folder, {(index,): layer for index, layer in per_layer.items()})
    conmoe.apply(folder, plan, out, form="shared")
    conmoe.verify(out, folder, plan, "shared")
    return load(out)


@families
def test_experts_that_a_shared_checkpoint_drops_are_those_the_router_may_not_choose(family, checkpoint, tmp_path):
    folder = checkpoint(family)
    kept = torch.tensor([0, 2, 3, 4, 6, 7])  # three in each half, for routers with two groups
    indices = moe_indices(folder)
    made = written(folder, tmp_path / "shared", {index: plans.prune(kept, EXPERTS) for index in indices})
    stock = load_stock(folder)
    with silenced(stock, {index: [1, 5] for index in indices}):
        torch.testing.assert_close(logits(made), logits(stock), rtol=1e-4, atol=1e-4)


@ungrouped
def test_layers_may_drop_different_numbers_of_experts(family, checkpoint, tmp_path):
    folder = checkpoint(family)
    first, last = moe_indices(folder)[0], moe_indices(folder)[-1]
    dropped = {first: [1], last: [0, 3, 4, 5, 7]}
    per_layer = {
        index: plans.prune(torch.tensor([e for e in range(EXPERTS) if e not in gone]), EXPERTS)
        for index, gone in dropped.items()
    }
    made = written(folder, tmp_path / "ragged", per_layer)
    stock = load_stock(folder)
    with silenced(stock, dropped):
        torch.testing.assert_close(logits(made), logits(stock), rtol=1e-4, atol=1e-4)
    plan = hand_made(folder, {(index,): layer for index, layer in per_layer.items()})
    with pytest.raises(conmoe.UsageError, match="one number of experts for all layers"):
        conmoe.apply(folder, plan, tmp_path / "sliced", form="sliced")


def test_a_shared_router_must_keep_as_many_rows_as_it_chooses(checkpoint, tmp_path):
    folder = checkpoint("olmoe")
    plan = hand_made(folder, {(0,): plans.prune(torch.tensor([3]), EXPERTS)})
    with pytest.raises(conmoe.UsageError, match="1 experts would be left"):
        conmoe.apply(folder, plan, tmp_path / "out", form="shared")


@families
def test_a_router_asked_again_answers_as_one_without_those_rows(family, checkpoint, tmp_path):
    folder = checkpoint(family)
    layer = open_source(folder).layers[0]
    kept = torch.tensor([0, 2, 3, 4, 6, 7])
    reroute = read_experts(open_source(folder), layer).reroute
    assert reroute is not None
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    index_nk, weight_nk = reroute(hidden, kept)
    assert set(index_nk.flatten().tolist()) <= set(kept.tolist())

    per_layer = {index: plans.prune(kept, EXPERTS) for index in moe_indices(folder)}
    plan = hand_made(folder, {(index,): each for index, each in per_layer.items()}, form="sliced")
    conmoe.apply(folder, plan, tmp_path / "sliced", form="sliced")
    model = load_stock(tmp_path / "sliced")
    seen: list[tuple[Tensor, Tensor]] = []
    block, experts = model.get_submodule(layer.block), model.get_submodule(layer.experts)
    experts.register_forward_pre_hook(lambda module, args: seen.append((args[1], args[2])))
    with torch.no_grad():
        block(hidden[None])
    (index, weight), dense = seen[0], torch.zeros(2, 40, EXPERTS)
    dense[0].scatter_(1, index_nk, weight_nk)
    dense[1].scatter_(1, kept[index.reshape(40, TOP_K)], weight.reshape(40, TOP_K).float())
    torch.testing.assert_close(dense[0], dense[1], rtol=1e-5, atol=1e-6)


def test_a_router_asked_for_a_part_counts_in_that_part(checkpoint):
    folder = checkpoint("olmoe")
    source = open_source(folder)
    experts = read_experts(source, source.layers[0])
    part = conmoe.ops.experts.select(experts, torch.tensor([6, 1, 4]))
    assert experts.reroute is not None
    assert part.reroute is not None
    hidden = torch.randn(30, 32, generator=torch.Generator().manual_seed(2))
    index_nk, weight_nk = part.reroute(hidden, torch.tensor([0, 2]))  # without expert 1
    whole_nk, same_nk = experts.reroute(hidden, torch.tensor([0, 2, 3, 4, 5, 6, 7]))
    names = torch.tensor([-1, -1, -1, -1, 2, -1, 0, -1])
    assert torch.equal(index_nk, names[whole_nk])
    assert torch.equal(weight_nk, same_nk)


def routed_sum(block: nn.Module, experts: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices, gates, the routed experts' output and the whole block's output for ``hidden``, as they really are."""
    seen: list[Tensor] = []
    hooks = [
        experts.register_forward_pre_hook(lambda module, args: seen.extend(args[1:3])),
        experts.register_forward_hook(lambda module, args, out: seen.append(out)),
    ]
    out = answer(block, hidden)
    for hook in hooks:
        hook.remove()
    index, weight, routed = seen
    return index.reshape(-1, TOP_K), weight.reshape(-1, TOP_K), routed.reshape(hidden.shape), out


def answer(block: nn.Module, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        out = block(hidden[None])
    return (out[0] if isinstance(out, tuple) else out).reshape(hidden.shape)


def single(experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """One stock expert's answer to every token, by the module itself."""
    n = len(hidden)
    with torch.no_grad():
        out: Tensor = experts(hidden, torch.full((n, 1), expert), torch.ones(n, 1))
    return out


@families
def test_constants_answer_for_experts(family, checkpoint, tmp_path):
    folder = checkpoint(family)
    layer = open_source(folder).layers[-1]
    constant_CD = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    base = plans.prune(torch.tensor([0, 1, 2, 4, 6, 7]), EXPERTS)
    assignment_E = base.assignment_E.clone()
    assignment_E[torch.tensor([3, 5])] = torch.tensor([6, 7])
    plan = replace(base, assignment_E=assignment_E, constant_CD=constant_CD)
    made, stock = written(folder, tmp_path / "out", {layer.index: plan}), load_stock(folder)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(4))
    block, experts = stock.get_submodule(layer.block), stock.get_submodule(layer.experts)
    index, weight, _, whole = routed_sum(block, experts, hidden)
    expected = whole.clone()
    for number, expert in enumerate((3, 5)):
        gate = (weight * (index == expert)).sum(1, keepdim=True).float()
        expected += gate * (constant_CD[number] - single(experts, expert, hidden))
    got = answer(made.get_submodule(layer.block), hidden)
    assert (index == 3).any()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("members", [[5, 2, 7], [1], []])
def test_a_condensed_layer_is_its_experts_with_static_gates_and_no_router(family, members, checkpoint, tmp_path):
    folder = checkpoint(family)
    layer = open_source(folder).layers[-1]
    kept, gates = torch.tensor(sorted(members), dtype=torch.int64), torch.tensor([0.3, 0.05, 0.6])[: len(members)]
    mixing_KE = torch.zeros(len(members), EXPERTS, dtype=torch.float64)
    mixing_KE[torch.arange(len(members)), kept] = 1
    plan = LayerPlan(torch.full((EXPERTS,), -1), mixing_KE, torch.ones(EXPERTS), static_K=gates)
    made, stock = written(folder, tmp_path / "out", {layer.index: plan}), load_stock(folder)
    assert not [name for name in on_disk(tmp_path / "out") if name.startswith(f"{layer.router}.w")]
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(4))
    block, experts = stock.get_submodule(layer.block), stock.get_submodule(layer.experts)
    _, _, routed, whole = routed_sum(block, experts, hidden)
    expected = whole - routed
    for expert, gate in zip(kept.tolist(), gates.tolist(), strict=True):
        expected += gate * single(experts, expert, hidden)
    got = answer(made.get_submodule(layer.block), hidden)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(logits(made)).all()
    with pytest.raises(conmoe.UsageError, match="condenses layers"):  # sliced: test_folding
        conmoe.apply(folder, hand_made(folder, {(layer.index,): plan}), tmp_path / "expanded", form="expanded")


@families
def test_experts_below_a_share_of_the_highest_gate_are_skipped(family, checkpoint, tmp_path):
    folder = checkpoint(family)
    layer = open_source(folder).layers[-1]
    plan = replace(plans.identity(EXPERTS), skip=0.7)
    made, stock = written(folder, tmp_path / "out", {layer.index: plan}), load_stock(folder)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(4))
    block, experts = stock.get_submodule(layer.block), stock.get_submodule(layer.experts)
    index, weight, routed, whole = routed_sum(block, experts, hidden)
    expected = whole - routed
    skipped = 0
    for token in range(len(hidden)):
        gates = weight[token].tolist()
        left = [gate if gate >= 0.7 * max(gates) else 0.0 for gate in gates]
        skipped += left.count(0.0)
        for expert, gate in zip(index[token].tolist(), left, strict=True):
            if gate:
                share = gate * sum(gates) / sum(left)
                expected[token] += share * single(experts, expert, hidden[token : token + 1])[0]
    assert 0 < skipped < 50
    got = answer(made.get_submodule(layer.block), hidden)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@families
def test_evaluation_streams_such_checkpoints(family, checkpoint, tmp_path):
    folder = checkpoint(family)
    indices = moe_indices(folder)
    none = torch.zeros(0, EXPERTS, dtype=torch.float64)
    condensed = LayerPlan(torch.full((EXPERTS,), -1), none, torch.ones(EXPERTS), static_K=torch.zeros(0))
    skipping = replace(plans.identity(EXPERTS), skip=0.5)
    made = written(folder, tmp_path / "out", {indices[0]: skipping, indices[-1]: condensed})
    data = token_data(2, 12, seed=5)
    found = conmoe.evaluate(tmp_path / "out", data)
    with torch.no_grad():
        logp = made(data.ids_NS).logits.float().log_softmax(-1)
    loss = -logp[:, :-1].gather(2, data.ids_NS[:, 1:, None]).mean()
    assert found.loss.value == pytest.approx(float(loss), rel=1e-4)


@families
@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_experts_stored_as_factors_answer_as_their_product(family, structure, checkpoint, tmp_path):
    from conmoe.ops.experts import tensors
    from conmoe.ops.factors import decompose, reconstruct, to_weights

    folder = checkpoint(family)
    layer = open_source(folder).layers[-1]
    kept = torch.tensor([0, 2, 5, 7])
    base = plans.remap(kept, torch.tensor([0, 1, 1, 0, 2, 2, 3, 3]))
    source = tensors(conmoe.ops.experts.select(read_experts(open_source(folder), layer), kept))
    matrices = {name: value for name, value in source.items() if "bias" not in name}
    factors = decompose(matrices, 3, 0.2, structure)
    factored = replace(base, weights=to_weights(factors))
    dense = replace(base, weights={name: reconstruct(item).float() for name, item in factors.items()})
    made = written(folder, tmp_path / "factored", {layer.index: factored})
    other = written(folder, tmp_path / "dense", {layer.index: dense})
    torch.testing.assert_close(logits(made), logits(other), rtol=1e-3, atol=1e-3)
    data = token_data(2, 12, seed=5)
    losses = [conmoe.evaluate(tmp_path / name, data).loss.value for name in ("factored", "dense")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    small, large = on_disk(tmp_path / "factored"), on_disk(tmp_path / "dense")
    elements = sum(v.numel() for n, v in small.items() if v.is_floating_point())
    expected = sum(v.numel() for n, v in large.items() if v.is_floating_point())
    expected += sum(conmoe.ops.factors.elements(item) for item in factors.values())
    expected -= sum(value.numel() for value in matrices.values())
    assert elements == expected
    with pytest.raises(conmoe.UsageError, match="stores experts as factors"):
        conmoe.apply(folder, hand_made(folder, {(layer.index,): factored}), tmp_path / "sliced", form="sliced")
