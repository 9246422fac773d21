"""The doctor against what a written checkpoint really loses, against loops over tokens, and against what it says of
statistics that are known to be good or bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import conmoe
from conmoe.artifacts import read_layer, read_manifest, write_layer
from conmoe.cli.tables import planned_table, uses_table
from conmoe.diagnosis import FITTED, NOISY, PLENTY, Advice, Diagnosis, Estimate, Halves, Planned, Use, advise
from conmoe.doctor import first_look, layer_use
from conmoe.ops import plans
from conmoe.ops.experts import concatenate
from conmoe.ops.factors import decompose, to_weights
from conmoe.ops.halves import answers_alike, first_half, kept_alike, part, recount
from conmoe.ops.leftover import leftover, ratio, reached
from conmoe.registry import methods, refinements
from conmoe.source import open_source, read_experts
from conmoe.types import LayerPlan, Plan, TokenSample, sample_tensors
from tests.commands import runner, tree, write_text
from tests.conftest import Checkpoint, token_data
from tests.families import EXPERTS, tiny_model, tiny_tokenizer
from tests.layers import Layer, answer, observe, prototypes, random_experts
from tests.pretended_gpu import PretendedGpu
from tests.results import load

ALL = conmoe.Calibration(sample=10_000, batch=4)


def stay(folder: Path, statistics: Path, out: Path, **request: Any) -> Plan:
    return conmoe.plan(folder, statistics, out, conmoe.Request(**request))


def kinds(found: Diagnosis) -> set[str]:
    return {advice.kind for advice in found.warnings}


# The parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_recounted_statistics_are_those_of_a_loop(bias: bool):
    layer = observe(random_experts(6, bias=bias), unused=(4,))
    found = recount(layer.statistics.sample, layer.experts)
    assert found.tokens == layer.statistics.tokens
    for name, expected in layer.statistics.sums.items():
        torch.testing.assert_close(found.sums[name], expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_a_sample_of_all_tokens_recounts_to_the_calibration(family: str, checkpoint: Checkpoint, tmp_path: Path):
    conmoe.calibrate(checkpoint(family), tmp_path / "all", token_data(), ALL)
    source = open_source(checkpoint(family))
    for layer in source.layers:
        known = read_layer(tmp_path / "all", layer.index)
        found = recount(known.sample, read_experts(source, layer))
        assert found.sums.keys() == known.sums.keys()
        for name, expected in known.sums.items():
            torch.testing.assert_close(found.sums[name], expected.double(), rtol=1e-4, atol=1e-3, msg=name)


def test_the_halves_are_disjoint_equally_large_and_drawn_by_priority():
    sample = observe(random_experts(4), T=81).statistics.sample
    first_n = first_half(sample)
    assert int(first_n.sum()) == 41
    assert len(part(sample, first_n).hidden_nD) == 41
    order = torch.randperm(81, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first_half(part(sample, order)), first_n[order])
    ranked = sample.priority_n.argsort()
    assert first_n[ranked].tolist() == [place % 2 == 0 for place in range(81)]


def naive_error(layer: Layer, plan: LayerPlan, rows: slice = slice(None)) -> tuple[float, float]:
    """``sum ||y - y'||^2`` and ``sum ||y||^2``, token by token and slot by slot in float64, from the definitions."""
    sample, K = layer.statistics.sample, plan.mixing_KE.shape[0]
    made = prototypes(layer.experts, plan)
    exact = replace(
        layer.experts, **{name: getattr(layer.experts, name).double() for name in ("gate_EID", "up_EID", "down_EDI")}
    )
    index_nk, weight_nk = sample.index_nk, sample.weight_nk
    left = [expert for expert, prototype in enumerate(plan.assignment_E.tolist()) if prototype >= 0]
    if left and len(left) < plan.assignment_E.numel():
        assert layer.experts.reroute is not None
        index_nk, weight_nk = layer.experts.reroute(sample.hidden_nD, torch.tensor(left))
    lost = energy = 0.0
    for token in range(len(sample.hidden_nD))[rows]:
        x_D, gates = sample.hidden_nD[token].double(), weight_nk[token].tolist()
        y_D, z_D = torch.zeros_like(x_D), torch.zeros_like(x_D)
        for expert, gate in zip(sample.index_nk[token].tolist(), sample.weight_nk[token].tolist(), strict=True):
            y_D += gate * answer(exact, expert, x_D)
        slots = list(zip(index_nk[token].tolist(), gates, strict=True))
        shown = [(expert, gate) for expert, gate in slots if gate >= plan.skip * max(gates)]
        scale = sum(gates) / sum(gate for _, gate in shown)
        for expert, gate in shown if plan.static_K is None else []:
            prototype, share = int(plan.assignment_E[expert]), scale * gate * float(plan.gain_E[expert])
            if prototype >= K:
                assert plan.constant_CD is not None
                z_D += share * plan.constant_CD[prototype - K].double()
            else:
                z_D += share * answer(made, prototype, x_D)
        for prototype, share in enumerate([] if plan.static_K is None else plan.static_K.tolist()):
            z_D += share * answer(made, prototype, x_D)
        lost, energy = lost + float((y_D - z_D).square().sum()), energy + float(y_D.square().sum())
    return lost, energy


def factored(layer: Layer) -> LayerPlan:
    plan = plans.remap(torch.tensor([1, 4]), torch.tensor([0, 0, 1, 1, 1, 0]))
    matrices = {name: getattr(layer.experts, name)[[1, 4]] for name in ("gate_EID", "up_EID", "down_EDI")}
    return replace(plan, weights=to_weights(decompose(matrices, 4, 0.2)))


def all_kinds(layer: Layer) -> Mapping[str, LayerPlan]:
    map_E, gain_E = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, 0.7, 1.0, 1.2, 1.0, 0.5], dtype=torch.float64)
    remapped = plans.remap(torch.tensor([0, 2, 4]), map_E)
    with_constant = plans.remap(torch.tensor([0, 2]), torch.tensor([0, 0, 1, 1, 0, 1]))
    return {
        "remapped": remapped,
        "merged": plans.merge(map_E, torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.5),
        "dropped": plans.prune(torch.tensor([0, 2, 3, 5]), 6),
        "gains": replace(remapped, gain_E=gain_E),
        "constants": replace(with_constant, assignment_E=map_E, constant_CD=torch.randn(1, 16)),
        "skipping": replace(plans.prune(torch.tensor([0, 2, 3, 5]), 6), skip=0.5),
        "condensed": plans.condense(torch.tensor([1, 5]), torch.tensor([0.4, 0.2]), 6),
        "shared experts alone": plans.condense(torch.tensor([], dtype=torch.int64), torch.tensor([]), 6),
        "factored": factored(layer),
    }


@pytest.mark.parametrize("name", all_kinds(observe(random_experts(6))))
def test_what_a_plan_leaves_is_that_of_a_loop(name: str):
    layer = observe(random_experts(6), T=60)
    plan = all_kinds(layer)[name]
    residual_n, source_n = leftover([layer.statistics.sample], [layer.experts], layer.experts, plan)
    for rows in (slice(0, 60), slice(7, 8)):
        expected = naive_error(layer, plan, rows)
        assert (float(residual_n[rows].sum()), float(source_n[rows].sum())) == pytest.approx(expected, rel=1e-3)


def test_layers_of_a_scope_are_measured_with_their_own_routers():
    """Two layers of one scope whose plan is that of each for itself: the errors add up, dropped experts and all."""
    layers = [observe(random_experts(6, seed=seed), T=40, seed=seed) for seed in (0, 1)]
    alone = [plans.prune(torch.tensor(kept), 6) for kept in ([0, 2, 3], [1, 2, 4, 5])]
    both = plans.embed(alone, [torch.arange(6), torch.arange(6, 12)], 12)
    wide = concatenate([layer.experts for layer in layers])
    samples = [layer.statistics.sample for layer in layers]
    residual_n, source_n = leftover(samples, [layer.experts for layer in layers], wide, both)
    expected = [naive_error(layer, plan) for layer, plan in zip(layers, alone, strict=True)]
    assert float(residual_n.sum()) == pytest.approx(sum(lost for lost, _ in expected), rel=1e-3)
    assert float(source_n.sum()) == pytest.approx(sum(energy for _, energy in expected), rel=1e-3)


def test_the_standard_error_is_how_much_the_ratio_of_other_tokens_varies():
    generator = torch.Generator().manual_seed(0)
    below = torch.rand(4000, 100, generator=generator, dtype=torch.float64) + 0.5
    above = below * torch.rand(4000, 100, generator=generator, dtype=torch.float64)
    found = [ratio(above[:, i], below[:, i]) for i in range(100)]
    spread = float(torch.tensor([value for value, _ in found]).std())
    assert found[0][0] == pytest.approx(float(above[:, 0].sum() / below[:, 0].sum()))
    assert sum(stderr for _, stderr in found) / 100 == pytest.approx(spread, rel=0.25)
    assert ratio(torch.ones(1), torch.ones(1))[1] != ratio(torch.ones(1), torch.ones(1))[1]
    assert ratio(torch.zeros(3), torch.zeros(3)) == (0.0, 0.0)


def test_what_two_plans_have_in_common_is_counted():
    left = plans.remap(torch.tensor([0, 2, 4]), torch.tensor([0, 0, 1, 1, 2, 2]))
    right = plans.remap(torch.tensor([0, 3, 4]), torch.tensor([0, 2, 1, 1, 2, 2]))
    assert kept_alike(left, left) == (1.0, 0.5)
    assert kept_alike(left, right) == pytest.approx((2 / 3, 0.5))
    assert kept_alike(left, right, held=[0]) == pytest.approx((1 / 2, 2 / 5))
    assert kept_alike(left, right, held=[0, 2, 3, 4]) is None
    assert answers_alike(left, left) == 1
    assert answers_alike(left, right) == pytest.approx(3 / 6)  # 0, 4 and 5
    dropping = plans.prune(torch.tensor([0, 1, 4]), 6)
    assert answers_alike(dropping, dropping) == 1
    assert answers_alike(left, dropping) == pytest.approx(2 / 6)  # 0 and 4
    constants = replace(dropping, assignment_E=torch.tensor([0, 1, 3, 3, 2, 3]), constant_CD=torch.zeros(1, 16))
    assert answers_alike(dropping, constants) == pytest.approx(3 / 6)
    assert answers_alike(left, constants) == pytest.approx(2 / 6)  # 0 and 4, not 5 with its constant
    condensed = plans.condense(torch.tensor([1]), torch.ones(1), 6)
    assert answers_alike(condensed, condensed) is None
    assert kept_alike(condensed, condensed) == pytest.approx((1.0, 1 / 6))
    none = plans.condense(torch.tensor([], dtype=torch.int64), torch.ones(0), 6)
    assert kept_alike(none, none) is None


@pytest.mark.parametrize("name", ["remapped", "constants", "dropped"])
def test_tokens_that_reach_a_prototype_are_counted_once(name: str):
    layer = observe(random_experts(6), T=50)
    plan = all_kinds(layer)[name]
    expected = [0] * plan.mixing_KE.shape[0]
    for chosen in layer.statistics.sample.index_nk.tolist():
        for prototype in {int(plan.assignment_E[expert]) for expert in chosen}:
            if 0 <= prototype < len(expected):
                expected[prototype] += 1
    assert reached(layer.statistics.sample, plan).tolist() == expected


def test_use_is_counted_from_the_sums():
    layer = observe(random_experts(8), T=100, unused=(2, 5))
    found, count = layer_use(7, layer.statistics), layer.statistics.sums["count"]
    assert (found.layer, found.experts, found.tokens, found.sample) == (7, 8, 100, 100)
    assert (found.least, found.never) == (0, 2)
    assert found.few == sum(0 < int(each) < NOISY for each in count)
    assert found.busiest == pytest.approx(float(count.max() / count.sum()))
    even = replace(layer.statistics, sums={**layer.statistics.sums, "count": torch.tensor([5, 5, 0, 5, 5, 0, 0, 0])})
    assert layer_use(0, even).effective == pytest.approx(4.0)


def test_methods_that_fit_by_themselves_exist():
    assert set(FITTED) <= set(methods())


# The verb on real models ------------------------------------------------------------------------------------------


def lost_by_a_checkpoint(folder: Path, result: Path, statistics: Path, index: int) -> float:
    """What the blocks of the written checkpoint answer to the sample, against those of the source."""
    layer = next(each for each in open_source(folder).layers if each.index == index)
    sample = read_layer(statistics, index).sample

    @torch.no_grad()
    def block(model: Any) -> Tensor:
        output = model.get_submodule(layer.block)(sample.hidden_nD[None])
        return (output[0] if isinstance(output, tuple) else output).reshape(sample.hidden_nD.shape).double()

    y_nD, z_nD = block(load(folder)), block(load(result))
    routed_nD = y_nD if sample.rest_nD is None else y_nD - sample.rest_nD.double()
    return float((y_nD - z_nD).square().sum() / routed_nD.square().sum())


@pytest.mark.parametrize(
    ("family", "request_"),
    [
        ("olmoe", {"method": "reap", "keep": "0.5"}),
        ("olmoe", {"method": "conmoe", "keep": "0.25", "refine": "refit"}),
        ("olmoe", {"method": "conmoe", "keep": "0.5", "scope": 2}),
        ("olmoe", {"method": "cd-moe", "keep": "0.7"}),
        ("qwen2_moe", {"method": "cd-moe", "keep": "0.7"}),
        ("olmoe", {"method": "mc-smoe", "keep": "0.5", "options": {"rank": 4}}),
        ("deepseek_v3", {"method": "frequency", "keep": "0.5", "protect": ("1:2",)}),
        ("gpt_oss", {"method": "mone", "keep": "0.5"}),
        ("granitemoe", {"method": "m-smoe", "keep": "0.5"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["method"],
)
def test_measured_is_what_the_written_checkpoint_loses(
    family: str, request_: dict[str, Any], checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path
):
    folder, statistics = checkpoint(family), calibrated(family)
    made = stay(folder, statistics, tmp_path / "plan", **request_)
    conmoe.apply(folder, tmp_path / "plan", tmp_path / "out")
    found = conmoe.doctor(folder, statistics, tmp_path / "plan")
    assert [each.layers for each in found.planned] == [scope.layers for scope in made.scopes]
    for each in found.planned:
        if each.prototypes == each.experts:
            assert each.sample is None
        elif len(each.layers) == 1:
            expected = lost_by_a_checkpoint(folder, tmp_path / "out", statistics, each.layers[0])
            assert each.sample is not None
            assert each.sample.value == pytest.approx(expected, rel=1e-3)
            assert expected > 0.01
        else:
            parts = [lost_by_a_checkpoint(folder, tmp_path / "out", statistics, layer) for layer in each.layers]
            assert each.sample is not None
            assert min(parts) < each.sample.value < max(parts)


def with_twins(statistics: Path, out: Path) -> Path:
    """Every token of the sample twice, the second one right behind the first."""
    shutil.copytree(statistics, out)
    for layer in read_manifest(statistics).layers:
        known = read_layer(statistics, layer)
        twice = {name: torch.cat([value, value]) for name, value in sample_tensors(known.sample).items()}
        priority_n = known.sample.priority_n
        twice["priority_n"] = torch.cat([priority_n, priority_n + 1e-12])
        write_layer(out, layer, replace(known, sample=TokenSample(**twice)))
    return out


@pytest.mark.parametrize(
    ("name", "refine"),
    [*((name, "none") for name in sorted(methods())), *(("reap", refine) for refine in sorted(refinements()))],
)
def test_halves_of_the_same_tokens_agree_in_everything(
    name: str, refine: str, checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path
):
    method = methods()[name]
    statistics = with_twins(calibrated("olmoe"), tmp_path / "twins")
    request = {"method": name, "keep": "0.75" if method.condenses else "0.5", "refine": refine}
    stay(checkpoint("olmoe"), statistics, tmp_path / "plan", **request)
    found = conmoe.doctor(checkpoint("olmoe"), statistics, tmp_path / "plan")
    looked_at = [each for each in found.planned if each.prototypes < each.experts]
    assert looked_at
    for each in looked_at:
        assert each.untold == ""
        assert each.halves is not None
        assert each.halves.tokens == 128
        assert each.halves.kept_alike in (1.0, None)
        assert each.halves.answers_alike == (None if method.condenses else 1.0)
        assert each.halves.gap.value == pytest.approx(0.0, abs=1e-5)
        assert each.halves.own.value == pytest.approx(each.halves.other.value, abs=1e-5)
    assert "too few tokens" not in kinds(found)


@pytest.mark.parametrize(
    ("family", "request_"),
    [
        ("deepseek_v3", {"method": "frequency", "protect": ("1:2", "2:5")}),  # two groups keep equally many
        ("deepseek_v3", {"method": "conmoe", "form": "sliced"}),
        ("olmoe", {"method": "conmoe", "options": {"distance": "weight"}}),
        ("olmoe", {"method": "reap", "refine": "gains", "refine_options": {"ridge": 0.3}}),
        ("olmoe", {"method": "conmoe", "form": "sliced", "refine": "gains", "refine_options": {"ridge": 0.3}}),
        ("olmoe", {"method": "conmoe", "scope": 2}),
        ("olmoe", {"method": "frequency", "budget": "5,3", "form": "shared"}),
    ],
)
def test_halves_that_hold_all_there_is_make_the_plan_itself(
    family: str, request_: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
):
    folder = checkpoint(family)
    conmoe.calibrate(folder, tmp_path / "stats", token_data(20), ALL)
    statistics = with_twins(tmp_path / "stats", tmp_path / "twins")
    keep = {} if "budget" in request_ else {"keep": "0.5"}
    stay(folder, statistics, tmp_path / "plan", **request_, **keep)
    for each in conmoe.doctor(folder, statistics, tmp_path / "plan").planned:
        assert each.halves is not None
        assert each.sample is not None
        assert each.sample.value > 0.01
        assert each.halves.own.value == pytest.approx(each.sample.value, rel=1e-4)
        assert each.halves.other.value == pytest.approx(each.sample.value, rel=1e-4)


@pytest.mark.parametrize("name", ["conmoe", "reap", "mone", "m-smoe", "mc-smoe", "cd-moe"])
@pytest.mark.parametrize("scope", [1, 2])
def test_a_gpu_finds_the_same(name: str, scope: int, checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path):
    if scope == 2 and methods()[name].condenses:
        pytest.skip("condenses each layer alone")
    request: dict[str, Any] = {"keep": "0.75", "options": {"rank": 2} if name == "mc-smoe" else None}
    form = "shared" if scope == 2 else None
    stay(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / "plan", method=name, scope=scope, form=form, **request)
    here = conmoe.doctor(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / "plan")
    with PretendedGpu():
        there = conmoe.doctor(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / "plan", device="cuda:0")
    assert there == here


def test_a_gap_of_halves_is_what_a_plan_from_one_half_loses_on_the_other(
    checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path
):
    """The second half as statistics of its own; the first one's plan, written and measured there."""
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    request: dict[str, Any] = {"method": "conmoe", "keep": "0.5", "refine": "refit", "protect": ("0:3",)}
    stay(folder, statistics, tmp_path / "plan", **request)
    found = conmoe.doctor(folder, statistics, tmp_path / "plan")
    source = open_source(folder)
    for name in "ab":
        shutil.copytree(statistics, tmp_path / name)
        for layer in source.layers:
            known = read_layer(statistics, layer.index)
            first_n = first_half(known.sample)
            half = part(known.sample, first_n if name == "a" else ~first_n)
            write_layer(tmp_path / name, layer.index, recount(half, read_experts(source, layer)))
    lost: dict[tuple[str, str, int], float] = {}
    for name in "ab":
        stay(folder, tmp_path / name, tmp_path / f"plan-{name}", **request)
        conmoe.apply(folder, tmp_path / f"plan-{name}", tmp_path / f"out-{name}")
        for on in "ab":
            for index in (0, 1):
                lost[name, on, index] = lost_by_a_checkpoint(folder, tmp_path / f"out-{name}", tmp_path / on, index)
    for each in found.planned:
        index, halves = each.layers[0], each.halves
        assert halves is not None
        own, other = ([lost[a, b, index] for a, b in pairs] for pairs in (("aa", "bb"), ("ab", "ba")))
        # pooled over tokens, not the mean of two ratios
        assert min(own) * 0.999 <= halves.own.value <= max(own) * 1.001
        assert min(other) * 0.999 <= halves.other.value <= max(other) * 1.001
        assert halves.gap.value == pytest.approx(halves.other.value - halves.own.value, abs=1e-9)
        assert each.sample is not None
        assert each.expected is not None
        # all rests on the sample, of which the halves have 64 of 128 tokens each
        assert each.expected.value == pytest.approx(each.sample.value + max(0.0, halves.gap.value) / 2)


def test_other_text_is_measured_as_if_it_were_the_sample(
    checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path
):
    folder, other = checkpoint("deepseek_v3"), token_data(5, 20, seed=4)
    stay(folder, calibrated("deepseek_v3"), tmp_path / "plan", method="reap", keep="0.5")
    conmoe.apply(folder, tmp_path / "plan", tmp_path / "out")
    conmoe.calibrate(folder, tmp_path / "other", other, ALL)
    found = conmoe.doctor(folder, calibrated("deepseek_v3"), tmp_path / "plan", data=other)
    assert found.fresh == ("random: 5 sequences",)
    for each in found.planned:
        assert each.fresh is not None
        assert each.sample is not None
        expected = lost_by_a_checkpoint(folder, tmp_path / "out", tmp_path / "other", each.layers[0])
        assert each.fresh.value == pytest.approx(expected, rel=1e-3)
        assert each.fresh.value != pytest.approx(each.sample.value, rel=1e-3)


def test_an_expert_that_is_never_routed_to_is_reported(tmp_path: Path):
    model = tiny_model("deepseek_v3")
    silent = model.get_decoder().layers[2].mlp.gate
    silent.e_score_correction_bias.data[3] = -100.0
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    conmoe.calibrate(tmp_path / "model", tmp_path / "stats", token_data(120), conmoe.Calibration(sample=32))
    found = conmoe.doctor(tmp_path / "model", tmp_path / "stats")
    assert [(use.layer, use.never, use.least == 0) for use in found.uses] == [(1, 0, False), (2, 1, True)]
    assert found.planned == ()
    assert (found.method, found.keep) == (None, None)
    table = rendered(uses_table(found))
    assert "2,880 tokens, 8 experts in a layer" in table


def test_duplicated_experts_are_no_loss_whichever_is_kept(tmp_path: Path):
    model = tiny_model("olmoe")
    for layer in model.get_decoder().layers:
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name).data
            weight[EXPERTS // 2 :] = weight[: EXPERTS // 2]
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    conmoe.calibrate(tmp_path / "model", tmp_path / "stats", token_data(120), conmoe.Calibration(sample=512))
    stay(tmp_path / "model", tmp_path / "stats", tmp_path / "plan", method="conmoe", keep="0.5")
    found = conmoe.doctor(tmp_path / "model", tmp_path / "stats", tmp_path / "plan", data=token_data(20, seed=5))
    for each in found.planned:
        assert each.predicted is not None
        for number in (each.predicted, each.sample, each.expected, each.fresh, each.halves and each.halves.other):
            assert number is not None
            value = number.value if isinstance(number, Estimate) else number
            assert value == pytest.approx(0.0, abs=1e-6)
    assert found.warnings == ()


def test_warnings_appear_with_few_tokens_and_vanish_with_more(checkpoint: Checkpoint, tmp_path: Path):
    folder, found = checkpoint("olmoe"), {}
    for name, sequences, sample in (("few", 4, 60), ("many", 600, 14_000)):
        options = conmoe.Calibration(sample=sample, batch=20)
        conmoe.calibrate(folder, tmp_path / name, token_data(sequences), options)
        stay(folder, tmp_path / name, tmp_path / f"plan-{name}", method="conmoe", keep="0.5", refine="refit")
        found[name] = conmoe.doctor(folder, tmp_path / name, tmp_path / f"plan-{name}")
    assert {"unknown experts", "too few tokens"} <= kinds(found["few"])
    assert found["many"].warnings == ()


def test_a_fit_to_fewer_tokens_than_units_is_starved(checkpoint: Checkpoint, tmp_path: Path):
    folder = checkpoint("olmoe")
    conmoe.calibrate(folder, tmp_path / "stats", token_data(60), conmoe.Calibration(sample=20))
    for refine, expected in (("none", False), ("refit", True)):
        made = stay(folder, tmp_path / "stats", tmp_path / refine, method="conmoe", keep="0.5", refine=refine)
        advice = first_look(open_source(folder), tmp_path / "stats", made)
        assert ("starved fit" in {each.kind for each in advice}) == expected
        found = conmoe.doctor(folder, tmp_path / "stats", tmp_path / refine)
        assert found.fits == expected
        for each in found.planned:
            tokens = reached(read_layer(tmp_path / "stats", each.layers[0]).sample, made.scopes[each.layers[0]].plan)
            assert each.width == 16
            assert each.starved == sum(int(count) < 16 for count in tokens)


@pytest.mark.parametrize(("sample", "words"), [(0, "no token sample"), (20, "too few to halve")])
def test_without_a_sample_it_says_what_it_cannot(sample: int, words: str, checkpoint: Checkpoint, tmp_path: Path):
    folder = checkpoint("olmoe")
    conmoe.calibrate(folder, tmp_path / "stats", token_data(), conmoe.Calibration(sample=sample))
    stay(folder, tmp_path / "stats", tmp_path / "plan", method="frequency", keep="0.5")
    found = conmoe.doctor(folder, tmp_path / "stats", tmp_path / "plan", data=token_data(2, seed=3))
    for each in found.planned:
        assert words in each.untold
        assert (each.sample is None) == (sample == 0)
        assert each.halves is None
        assert each.fresh is not None
    assert words in rendered(planned_table(found))


def test_the_record_comes_back_from_json(checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path):
    stay(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / "plan", method="reap", keep="0.5", scope=1)
    found = conmoe.doctor(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / "plan")
    assert Diagnosis.model_validate_json(found.model_dump_json()) == found
    assert Diagnosis.model_validate(json.loads(json.dumps(found.model_dump(mode="json"), allow_nan=False))) == found
    quick = conmoe.doctor(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / "plan", halves=False)
    assert [each.sample for each in quick.planned] == [each.sample for each in found.planned]
    assert [each.halves for each in quick.planned] == [None, None]
    assert [each.untold for each in quick.planned] == ["", ""]
    assert found.planned[0].predicted is None
    assert found.planned[0].rests_on == token_data().tokens  # sums, not the sample


def test_a_plan_rests_on_the_tokens_it_was_made_from(checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path):
    found = {}
    for name, request in (
        ("sums", {"method": "reap"}),
        ("sample", {"method": "conmoe"}),
        ("refined", {"method": "reap", "refine": "gains"}),
        ("part", {"method": "naee", "options": {"tokens": 50}}),
        ("all", {"method": "conmoe", "options": {"tokens": 0}}),
        ("on the way", {"method": "reap", "refine": "gains", "sequential": True, "sample": 200}),
        ("as many", {"method": "reap", "refine": "gains", "sequential": True}),
    ):
        stay(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / name, keep="0.5", **request)
        (found[name], _) = conmoe.doctor(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / name).planned
    assert {name: each.rests_on for name, each in found.items()} == {
        "sums": token_data().tokens,
        "sample": 128,
        "refined": 128,
        "part": 50,
        "all": 128,
        "on the way": 200,
        "as many": 128,
    }
    sequential = {name for name, each in found.items() if each.sequential}
    assert sequential == {"on the way", "as many"}
    assert found["on the way"].reached == pytest.approx(found["as many"].reached * 200 / 128)
    for name, tokens in (("sums", 64), ("sample", 64), ("part", 50)):
        each = found[name]
        assert each.halves is not None
        assert each.halves.excess == pytest.approx(max(0.0, each.halves.gap.value) * tokens / (2 * each.rests_on))


def test_what_does_not_belong_together_is_refused(checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path):
    folder = checkpoint("olmoe")
    with pytest.raises(conmoe.UsageError, match="made from another checkpoint"):
        conmoe.doctor(folder, calibrated("mixtral"))
    with pytest.raises(conmoe.UsageError, match="give the plan too"):
        conmoe.doctor(folder, calibrated("olmoe"), data=token_data(2))
    conmoe.calibrate(folder, tmp_path / "stats", token_data(seed=8), conmoe.Calibration(sample=40))
    stay(folder, tmp_path / "stats", tmp_path / "plan", method="reap", keep="0.5")
    with pytest.raises(conmoe.UsageError, match="was not made from"):
        conmoe.doctor(folder, calibrated("olmoe"), tmp_path / "plan")


# What it advises, by numbers --------------------------------------------------------------------------------------


def use(**fields: Any) -> Use:
    plain: dict[str, Any] = {
        "layer": 7, "experts": 64, "tokens": 4096, "sample": 1024, "least": 100, "median": 300.0, "never": 0, "few": 0,
        "reach": 1.0, "busiest": 0.2, "effective": 50.0,
    }  # fmt: skip
    return Use(**{**plain, **fields})


def number(value: float, stderr: float = 0.001) -> Estimate:
    return Estimate(value=value, stderr=stderr)


def halves(own: float, other: float, excess: float, stderr: float = 0.001) -> Halves:
    gap = Estimate(value=other - own, stderr=stderr)
    return Halves(
        tokens=512, kept_alike=0.61, by_chance=0.5, answers_alike=0.5, own=number(own), other=number(other), gap=gap,
        excess=excess,
    )  # fmt: skip


def planned(**fields: Any) -> Planned:
    plain: dict[str, Any] = {
        "layers": (3,), "experts": 64, "prototypes": 32, "sequential": False, "predicted": 0.2, "sample": number(0.2),
        "expected": number(0.22), "fresh": None, "halves": None, "width": 100, "tokens": 4096,
        "sample_tokens": 1024, "rests_on": 1024, "reached": 200.0, "starved": 0,
    }  # fmt: skip
    return Planned(**{**plain, **fields})


def test_experts_without_tokens_ask_for_more_text_or_for_other_text():
    (advice,) = advise([use(few=12, reach=8.0), use(layer=8, few=5)], [])
    assert (advice.kind, advice.layers) == ("unknown experts", (7, 8))
    assert advice.text == (
        "Layer 7 (the worst of 2): 12 of 64 experts got fewer than 32 tokens; calibrate on more text (--tokens 32768)."
    )
    assert advise([use(few=3)], []) == ()
    assert advise([use(few=12, median=2.0 * PLENTY)], []) == ()
    (other,) = advise([use(few=2, never=18, median=2.0 * PLENTY)], [])
    assert "20 of 64 experts got fewer than 32 tokens, 18 of them none" in other.text
    assert "add other kinds of it (--data)" in other.text


def test_more_tokens_are_asked_for_where_they_would_help():
    def told(**fields: Any) -> tuple[Advice, ...]:
        return advise([], [planned(**fields)])

    (advice,) = told(halves=halves(0.1, 0.26, 0.04))
    assert "0.100 of the output is lost there and 0.260 on the other half, by plans that keep the same in 61%" in (
        advice.text
    )
    assert "a larger sample (--sample 2048)" in advice.text
    assert "18% of the error" in advice.text
    assert "--option tokens=512" in told(halves=halves(0.1, 0.26, 0.04), rests_on=256)[0].text
    assert "more text (--tokens 16384)" in told(halves=halves(0.1, 0.26, 0.04), rests_on=8192)[0].text
    on_the_way = told(halves=halves(0.1, 0.26, 0.04), rests_on=2048, sequential=True)[0]
    assert "a larger sample (--sample 4096)" in on_the_way.text
    assert "(--tokens 2048 --sample 2048)" in told(halves=halves(0.1, 0.26, 0.04), tokens=1024)[0].text
    assert told(halves=halves(0.1, 0.26, 0.01)) == ()  # it would hardly help
    assert told(halves=halves(0.1, 0.26, 0.04, stderr=0.1)) == ()  # may be chance
    assert told(halves=halves(0.001, 0.002, 0.001), expected=number(0.002), predicted=None) == ()  # nothing is lost


def test_predictions_are_held_to_what_is_expected():
    (advice,) = advise([], [planned(predicted=0.04, sample=number(0.30), expected=number(0.31))])
    assert advice.kind == "estimate fails"
    assert "Layer 3 predicts an error of 0.040, measures 0.300 on the sample" in advice.text
    assert "expected to lose 0.310 on new tokens" in advice.text
    assert advise([], [planned(predicted=None, sample=number(0.9))]) == ()
    assert advise([], [planned(predicted=0.04, sequential=True)]) == ()  # made for other inputs
    assert advise([], [planned(predicted=0.4)]) == ()  # too careful is no fault
    assert advise([], [planned(predicted=0.001, expected=number(0.01))]) == ()
    assert advise([], [planned(predicted=0.1, expected=number(0.22, stderr=0.2))]) == ()


def test_other_text_and_layers_beyond_repair_are_named():
    (advice,) = advise([], [planned(fresh=number(0.5)), planned(layers=(4, 5), fresh=number(0.6))])
    assert (advice.kind, advice.layers) == ("other text", (3, 4, 5))
    assert advice.text.startswith("Layers 4 to 5 (the worst of 2) loses 0.600")
    assert advise([], [planned(fresh=number(0.25))]) == ()
    (lost,) = advise([], [planned(predicted=1.3, sample=number(1.2), expected=number(1.25))])
    assert lost.kind == "beyond repair"


# The command line -------------------------------------------------------------------------------------------------


def rendered(table: Any) -> str:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def run(capsys):
    return runner(capsys)


def test_the_command_reports_and_writes_nothing(run, checkpoint: Checkpoint, tmp_path: Path):
    text, folder = write_text(tmp_path), checkpoint("olmoe")
    few, plan = tmp_path / "few", tmp_path / "plan"
    length = ("--seq-len", 32)
    assert run("calibrate", folder, few, "--data", text, "--tokens", 128, *length, "--sample", 64).code == 0
    assert run("plan", folder, few, plan, "--keep", "0.5").code == 0
    before = tree(tmp_path)
    alone = run("doctor", folder, few)
    assert alone.code == 0
    assert "128 tokens, 8 experts in a layer" in alone.out
    assert "Warning: Layer" in alone.out
    assert run("doctor", folder, few, "--strict").code == 1
    shown = run("doctor", folder, few, plan, "--data", text, "--tokens", 64, *length)
    assert shown.code == 0
    assert "conmoe, keep 0.5, refine none" in shown.out
    assert "4/8" in shown.out
    assert "fresh" in shown.out
    told = run("doctor", folder, few, plan, "--json")
    assert Diagnosis.model_validate(told.json) == conmoe.doctor(folder, few, plan)
    assert tree(tmp_path) == before
    refused = run("doctor", folder, few, "--data", text, "--tokens", 64, *length)
    assert refused.code == 2
    assert "give the plan too" in refused.err


def test_a_report_without_warnings_passes_a_strict_look(run, checkpoint: Checkpoint, tmp_path: Path):
    folder = checkpoint("olmoe")
    conmoe.calibrate(folder, tmp_path / "stats", token_data(60), conmoe.Calibration(sample=64, batch=20))
    done = run("doctor", folder, tmp_path / "stats", "--strict")
    assert done.code == 0
    assert "Nothing to warn of." in done.out


def test_compress_says_at_first_look_what_the_doctor_would(run, checkpoint: Checkpoint, tmp_path: Path):
    text, folder, out = write_text(tmp_path), checkpoint("olmoe"), tmp_path / "out"
    options = ("--data", text, "--seq-len", 32, "--sample", 64, "--eval-tokens", 0, "--work", tmp_path / "work")
    few = run("compress", folder, out, "--keep", "0.5", "--tokens", 128, *options)
    assert few.code == 0
    written = json.loads((out / "conmoe" / "results.json").read_text())["warnings"]
    assert [advice["kind"] for advice in written] == ["unknown experts"]
    assert f"Warning: {written[0]['text']}" in few.err
    assert written == [
        advice.model_dump(mode="json") for advice in conmoe.doctor(folder, tmp_path / "work" / "statistics").warnings
    ]
    assert few.out == ""
