"""M-SMoE and MC-SMoE against the steps of the paper (arXiv 2310.01334, section 3), written as loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conmoe.methods.mc_smoe import m_smoe, mc_smoe
from conmoe.ops import plans, similarity, subsets
from conmoe.ops.alignment import permute
from conmoe.ops.experts import select, tensors
from conmoe.ops.factors import from_weights
from conmoe.types import Experts, LayerPlan
from tests.layers import Layer, layer_output, observe, prototypes, random_experts, recipes, with_rows


def run(layer: Layer, keep: int, **options) -> LayerPlan:
    return m_smoe(layer.statistics, layer.experts, keep, **options)


def uses(layer: Layer) -> list[int]:
    return [int((layer.routing.index_Tk == expert).sum()) for expert in range(layer.routing.experts)]


def permuted_copies(E: int, *, bias: bool = False) -> Experts:
    """Experts that are one expert with its hidden units in different orders."""
    experts = with_rows(random_experts(E), [0] * E)
    if bias:
        biased = random_experts(1, bias=True)
        experts = replace(
            biased, **{name: tensor.expand(E, *tensor.shape[1:]) for name, tensor in tensors(biased).items()}
        )
    generator = torch.Generator().manual_seed(5)
    shuffled = [
        permute({name: tensor[e] for name, tensor in tensors(experts).items()}, torch.randperm(12, generator=generator))
        for e in range(E)
    ]
    return replace(experts, **{name: torch.stack([part[name] for part in shuffled]) for name in shuffled[0]})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grouping", ["router_logits", "weight", "mean_output", "functional"])
def test_grouping_and_shares_follow_the_paper(seed: int, grouping: str):
    layer = observe(random_experts(8, seed=seed), seed=seed)
    count = uses(layer)
    dominant = sorted(sorted(range(8), key=lambda e: (-count[e], e))[:3])
    z_ET = layer.routing.logits_TE.double().T
    if grouping == "router_logits":
        alike_EE = torch.tensor([[float(a @ b / a.norm() / b.norm() + 1) / 2 for b in z_ET] for a in z_ET])
    else:
        alike_EE = -getattr(similarity, f"{grouping}_distance")(layer.statistics.sample, layer.experts)
    group = [e if e in dominant else max(dominant, key=lambda d: float(alike_EE[e, d])) for e in range(8)]
    expected_EE = torch.zeros(8, 8, dtype=torch.float64)
    for e in range(8):
        members = [m for m in range(8) if group[m] == group[e]]
        for member in members:
            expected_EE[e, member] = count[member] / sum(count[m] for m in members)
    plan = run(layer, 3, grouping=grouping, align="none")
    torch.testing.assert_close(recipes(plan), expected_EE)
    assert not plan.weights
    assert plan.scores["frequency"].tolist() == pytest.approx([c / max(count) for c in count])


def test_a_worked_example():
    """Four experts with logit columns along two directions: uses 5, 4, 3, 1; the first two are dominant."""
    layer = observe(random_experts(4), T=2)
    gram_EE = torch.tensor([[4.0, 0, -1, 6], [0, 1, 2, 0], [-1, 2, 9, 0], [6, 0, 0, 16]])
    sums = {**layer.statistics.sums, "count": torch.tensor([5.0, 4, 3, 1]), "logit_gram": gram_EE}
    plan = m_smoe(replace(layer.statistics, sums=sums), layer.experts, 2)
    # cosines of expert 2: -1/6 with 0, 2/3 with 1; of expert 3: 6/8 with 0, none with 1
    assert plan.assignment_E.tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(plan.mixing_KE, torch.tensor([[5 / 6, 0, 0, 1 / 6], [0, 4 / 7, 3 / 7, 0]]).double())


@pytest.mark.parametrize("align", ["weight", "activation"])
@pytest.mark.parametrize("reference", ["dominant", "first"])
@pytest.mark.parametrize("bias", [False, True])
def test_copies_in_another_order_merge_without_loss_once_aligned(align: str, reference: str, bias: bool):
    layer = observe(permuted_copies(6, bias=bias))
    aligned = run(layer, 2, align=align, reference=reference)
    torch.testing.assert_close(layer_output(layer, aligned), layer_output(layer), rtol=1e-4, atol=1e-5)
    lossy = layer_output(layer, run(layer, 2, align="none")) - layer_output(layer)
    assert lossy.norm() > 0.1 * layer_output(layer).norm()


def test_the_reference_gives_the_order_of_hidden_units():
    layer = observe(permuted_copies(5), seed=1)
    busiest = max(range(5), key=lambda e: uses(layer)[e])
    assert busiest != 0
    for reference, expert in (("dominant", busiest), ("first", 0)):
        merged = run(layer, 1, reference=reference).weights
        torch.testing.assert_close(merged["gate_EID"][0], layer.experts.gate_EID[expert])
        torch.testing.assert_close(merged["down_EDI"][0], layer.experts.down_EDI[expert])


@pytest.mark.parametrize("reference", ["dominant", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_one_are_copied_bit_for_bit(dtype: torch.dtype, reference: str):
    layer = observe(random_experts(8))
    layer = replace(layer, experts=random_experts(8, dtype=dtype))
    plan = run(layer, 6, reference=reference)
    single = [row.argmax() for row in plan.mixing_KE if int((row != 0).sum()) == 1]
    assert plan.weights
    assert len(single) >= 4
    for expert in single:
        prototype = int(plan.assignment_E[expert])
        for name, tensor in tensors(layer.experts).items():
            assert torch.equal(plan.weights[name][prototype], tensor[expert])
            assert plan.weights[name].dtype == dtype


def test_merged_weights_are_the_weighted_mean_of_permuted_members():
    layer = observe(random_experts(6, width=5), seed=2)
    plan = run(layer, 2)
    for prototype, recipe_E in enumerate(plan.mixing_KE):
        members = recipe_E.nonzero().flatten().tolist()
        dominant = max(members, key=lambda e: recipe_E[e])
        for name in ("gate_EID", "up_EID"):  # whatever the order of units, their sum is that of the members
            mean_D = sum(recipe_E[e] * getattr(layer.experts, name)[e].double().sum(dim=0) for e in members)
            torch.testing.assert_close(plan.weights[name][prototype].double().sum(dim=0), mean_D, rtol=1e-5, atol=1e-6)

        def spread(gate_ID: Tensor, dominant: int = dominant) -> float:
            return float((gate_ID - layer.experts.gate_EID[dominant]).norm())

        plain_ID = sum(recipe_E[e] * layer.experts.gate_EID[e] for e in members)
        assert len(members) == 1 or spread(plan.weights["gate_EID"][prototype]) < spread(plain_ID)


def test_experts_already_in_order_are_a_mere_mixture():
    assert run(observe(with_rows(random_experts(6), [0, 0, 0, 3, 3, 3])), 1).weights
    assert not run(observe(with_rows(random_experts(6), [0] * 6)), 2).weights


def test_a_layer_nobody_used_keeps_the_first_experts_and_averages_evenly():
    layer = observe(random_experts(5), T=8)
    silent = {name: torch.zeros_like(tensor) for name, tensor in layer.statistics.sums.items()}
    plan = m_smoe(replace(layer.statistics, sums=silent), layer.experts, 2)
    assert plan.assignment_E.tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(plan.mixing_KE, torch.tensor([[1, 0, 1, 1, 1], [0, 4, 0, 0, 0]]).double() / 4)
    assert plan.scores["frequency"].tolist() == [0.0] * 5


def test_unused_members_weigh_nothing():
    layer = observe(random_experts(6), unused=(1, 4))
    plan = run(layer, 2)
    assert not plan.mixing_KE[:, [1, 4]].any()
    assert (plan.assignment_E >= 0).all()


def test_a_scope_chooses_by_uses_over_those_of_the_most_used_and_stays_within_layers():
    layers = [observe(random_experts(4, seed=seed), seed=seed, T=tokens) for seed, tokens in ((1, 60), (2, 20))]
    frequency = [count / max(uses(layer)) for layer in layers for count in uses(layer)]
    statistics = [replace(layer.statistics, tokens=80) for layer in layers]
    joined, pool = subsets.join_layers(statistics, [layer.experts for layer in layers])
    for keep in (2, 3, 5):
        for align in ("none", "weight", "activation"):
            plan = m_smoe(joined, pool, keep, align=align)
            dominant = sorted(sorted(range(8), key=lambda e: (-frequency[e], e))[:keep])
            assert sorted(int(row.argmax()) for row in plan.mixing_KE) == dominant
            recipe_EE = recipes(plan)
            assert not recipe_EE[:4, 4:].any()
            assert not recipe_EE[4:, :4].any()


def test_a_layer_of_a_scope_that_nobody_used_keeps_one_expert():
    layers = [observe(random_experts(4, seed=seed), seed=seed) for seed in (1, 2)]
    joined, pool = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    count_E = joined.sums["count"].clone()
    count_E[4:] = 0
    plan = m_smoe(replace(joined, sums={**joined.sums, "count": count_E}), pool, 3)
    assert [int(row.argmax()) >= 4 for row in plan.mixing_KE] == [False, False, True]
    assert plan.assignment_E[4:].tolist() == [2] * 4


MATRICES = ("gate_EID", "up_EID", "down_EDI")


def compress(layer: Layer, keep: int, **options) -> LayerPlan:
    return mc_smoe(layer.statistics, layer.experts, keep, **options)


def relative_error(layer: Layer, plan: LayerPlan) -> float:
    reference_TD = layer_output(layer)
    return float((layer_output(layer, plan) - reference_TD).norm() / reference_TD.norm())


@pytest.mark.parametrize("align", ["weight", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_compression_of_full_rank_is_the_merge(align: str, bias: bool, structure: str):
    layer = observe(random_experts(8, bias=bias))
    merged, plan = run(layer, 3, align=align), compress(layer, 3, align=align, rank=99, ratio=0.0, structure=structure)
    assert not set(MATRICES) & plan.weights.keys()
    assert (bias and align == "weight") == ("gate_bias_EI" in plan.weights)
    assert torch.equal(plan.mixing_KE, merged.mixing_KE)
    torch.testing.assert_close(layer_output(layer, plan), layer_output(layer, merged), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_what_is_stored_is_the_truncated_decomposition_and_the_largest_lines(structure: str):
    layer = observe(random_experts(8))
    merged = prototypes(layer.experts, run(layer, 3))
    plan = compress(layer, 3, rank=2, ratio=0.3, structure=structure)
    stored = prototypes(layer.experts, plan)
    energies, losses = [], []
    for name in MATRICES:
        for k in range(3):
            u, s, v = torch.linalg.svd(getattr(merged, name)[k], full_matrices=False)
            residual = getattr(merged, name)[k] - u[:, :2] * s[:2] @ v[:2]
            left_over = getattr(merged, name)[k] - getattr(stored, name)[k]
            axis = 1 if structure == "rows" else 0
            energies += residual.square().mean(dim=axis).tolist()
            losses += left_over.square().mean(dim=axis).tolist()
    kept = sorted(range(len(energies)), key=lambda line: -energies[line])[: int(0.3 * len(energies) + 0.5)]
    expected = [0.0 if line in kept else energy for line, energy in enumerate(energies)]
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_more_rank_and_more_rows_lose_less():
    layer = observe(random_experts(6, seed=3), seed=3)
    by_rank = [relative_error(layer, compress(layer, 3, rank=rank, ratio=0.0)) for rank in (1, 4, 8, 12)]
    by_ratio = [relative_error(layer, compress(layer, 3, rank=2, ratio=ratio)) for ratio in (0.0, 0.4, 0.8, 1.0)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_ratio == sorted(by_ratio, reverse=True)
    assert by_rank[-1] == pytest.approx(by_ratio[-1], rel=1e-3)


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_by_output_the_lines_stay_whose_loss_the_layer_would_hear_most(structure: str):
    layer = observe(random_experts(6), T=40)
    plan = compress(layer, 3, rank=1, ratio=0.3, structure=structure, importance="output")
    merged = prototypes(layer.experts, run(layer, 3))
    inputs: dict[str, list[list[Tensor]]] = {name: [[], [], []] for name in MATRICES}
    for x_D, chosen, gates in zip(layer.x_TD, layer.routing.index_Tk, layer.routing.weight_Tk, strict=True):
        for k in range(3):
            gate = sum(float(g) for e, g in zip(chosen, gates, strict=True) if plan.assignment_E[e] == k)
            if gate:
                before_I = merged.gate_EID[k] @ x_D.double()
                hidden_I = before_I * torch.sigmoid(before_I) * (merged.up_EID[k] @ x_D.double())
                for name in MATRICES:
                    inputs[name][k].append(gate * (hidden_I if name == "down_EDI" else x_D.double()))
    scored = []
    for name in MATRICES:
        whole = sum(float((getattr(merged, name)[k] @ x).square().sum()) for k in range(3) for x in inputs[name][k])
        for k in range(3):
            u, s, v = torch.linalg.svd(getattr(merged, name)[k], full_matrices=False)
            residual = getattr(merged, name)[k] - u[:, :1] * s[:1] @ v[:1]
            rows, columns = residual.shape
            for line in range(rows if structure == "rows" else columns):
                if structure == "rows":
                    energy = sum(float(residual[line] @ x) ** 2 for x in inputs[name][k]) / columns
                else:
                    energy = sum(float((residual[:, line] * x[line]).square().sum()) for x in inputs[name][k]) / rows
                scored.append((energy / whole, name, k * (rows if structure == "rows" else columns) + line))
    kept = sorted(scored, reverse=True)[: int(0.3 * len(scored) + 0.5)]
    found, _ = from_weights(plan.weights)
    for name in MATRICES:
        assert found[name].index_S.tolist() == sorted(place for _, owner, place in kept if owner == name)


def test_stable_ranks_before_and_after_merging():
    layer = observe(with_rows(random_experts(6), [0, 1, 2, 3, 4, 4]))
    plan = compress(layer, 3, align="none")

    def rank(experts: Experts, expert: int) -> float:
        values = [torch.linalg.svdvals(getattr(experts, name)[expert].double()) for name in MATRICES]
        return sum(float(value.square().sum() / value[0] ** 2) for value in values) / 3

    merged = prototypes(layer.experts, run(layer, 3, align="none"))
    after = [rank(merged, prototype) for prototype in plan.assignment_E.tolist()]
    assert plan.scores["stable_rank_before"].tolist() == pytest.approx([rank(layer.experts, e) for e in range(6)])
    assert plan.scores["stable_rank_after"].tolist() == pytest.approx(after)
    assert "frequency" in plan.scores


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_protected_experts_beside_factors_stay_exact(structure: str):
    layer = observe(random_experts(7), T=60)
    part = torch.tensor([6, 0, 2, 5, 3])
    rest = torch.tensor([1, 4])
    free = Layer(select(layer.experts, part), layer.x_TD, layer.routing, subsets.restrict(layer.statistics, part))
    for importance in ("energy", "output"):
        planned = compress(free, 2, rank=2, ratio=0.2, structure=structure, importance=importance)
        joined = plans.embed([planned, plans.identity(2)], [part, rest], 7, experts=layer.experts)
        stored, alone = prototypes(layer.experts, joined), prototypes(free.experts, planned)
        for name in MATRICES:
            for expert in rest.tolist():
                kept = getattr(stored, name)[joined.assignment_E[expert]]
                assert torch.equal(kept, getattr(layer.experts, name)[expert].double())
            for place, expert in enumerate(part.tolist()):
                now, then = joined.assignment_E[expert], planned.assignment_E[place]
                torch.testing.assert_close(getattr(stored, name)[now], getattr(alone, name)[then])


def test_slots_of_experts_outside_the_set_say_nothing():
    layer = observe(random_experts(5), k=2)
    known = subsets.restrict(layer.statistics, torch.arange(4))
    outside_nk = known.sample.index_nk < 0
    silent = replace(known.sample, weight_nk=known.sample.weight_nk.masked_fill(outside_nk, 0.0))
    inside = select(layer.experts, torch.arange(4))
    plans_of = [
        mc_smoe(replace(known, sample=sample), inside, 2, rank=1, ratio=0.3, importance="output")
        for sample in (known.sample, silent)
    ]
    assert outside_nk.any()
    for name, tensor in plans_of[0].weights.items():
        assert torch.equal(tensor, plans_of[1].weights[name])


def test_half_precision_stays_half():
    layer = observe(random_experts(6, bias=True))
    layer = replace(layer, experts=random_experts(6, dtype=torch.bfloat16, bias=True))
    plan = compress(layer, 3, rank=4, importance="output")
    kinds = {tensor.dtype for name, tensor in plan.weights.items() if not name.endswith(".index")}
    assert kinds == {torch.bfloat16}
