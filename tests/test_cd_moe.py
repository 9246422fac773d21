"""CD-MoE: condensed layers against loops written from the paper's formulas, layer search against the naive one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

import conmoe
from conmoe.artifacts import read_layer, read_tokens, write_layer
from conmoe.budgets.condense import layers_to_condense
from conmoe.condense import LastHidden, search
from conmoe.methods.cd_moe import cd_moe
from conmoe.observe import IMPLEMENTATION
from conmoe.ops import plans
from conmoe.ops.divergence import jensen_shannon
from conmoe.source import open_source
from conmoe.types import LayerPlan, Plan, TokenSample, UsageError, sample_tensors
from tests.conftest import token_data
from tests.families import EXPERTS, TINY, TOP_K, save_tiny
from tests.layers import Layer, answer, observe, random_experts, with_rows
from tests.results import by_layer, hand_made, load, load_stock


def softmax(x: list[float]) -> list[float]:
    weights = [math.exp(value - max(x)) for value in x]
    return [weight / sum(weights) for weight in weights]


def naive_js(x: list[float], y: list[float]) -> float:
    """Half of KL(p || m) and half of KL(q || m), every probability plus 1e-10, one component at a time."""
    p, q = softmax(x), softmax(y)
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2 + 1e-10
        total += (a + 1e-10) * math.log((a + 1e-10) / m) / 2 + (b + 1e-10) * math.log((b + 1e-10) / m) / 2
    return total


def test_jensen_shannon_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    x_nD, y_nD = 2 * torch.randn(2, 7, 11, generator=generator)
    expected = [naive_js(x, y) for x, y in zip(x_nD.tolist(), y_nD.tolist(), strict=True)]
    torch.testing.assert_close(jensen_shannon(x_nD, y_nD), torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(jensen_shannon(x_nD, y_nD), jensen_shannon(y_nD, x_nD), rtol=0, atol=1e-14)
    assert jensen_shannon(x_nD.double(), x_nD.double() + 3).max() < 1e-14, "softmax does not see a constant"
    far = torch.tensor([[0.0, 900.0], [900.0, 0.0]])
    torch.testing.assert_close(jensen_shannon(far[:1], far[1:]), torch.tensor([math.log(2)]).double())


def test_jensen_shannon_of_close_states_is_more_than_rounding():
    x_nD = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).double()
    step_nD = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).double()
    near, half = jensen_shannon(x_nD, x_nD + 1e-4 * step_nD), jensen_shannon(x_nD, x_nD + 5e-5 * step_nD)
    torch.testing.assert_close(near / half, torch.full_like(near, 4.0), rtol=1e-2, atol=0)


def layer_with_rest(E: int = 6, *, seed: int = 0, rest: bool = True, **observed: object) -> Layer:
    layer = observe(random_experts(E, seed=seed), seed=seed, T=40, **observed)
    if not rest:
        return layer
    rest_nD = torch.randn(layer.x_TD.shape, generator=torch.Generator().manual_seed(50 + seed))
    statistics = replace(layer.statistics, sample=replace(layer.statistics.sample, rest_nD=rest_nD))
    return replace(layer, statistics=statistics)


def naive_outputs(layer: Layer, tokens: int) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Per token: every expert's answer, the routed sum, the rest."""
    sample = layer.statistics.sample
    answers, routed, rest = [], [], []
    for token in range(tokens):
        x_D = sample.hidden_nD[token]
        answers.append([answer(layer.experts, e, x_D).double() for e in range(layer.routing.experts)])
        slots = zip(sample.index_nk[token].tolist(), sample.weight_nk[token].tolist(), strict=True)
        routed.append(sum((gate * answers[-1][e] for e, gate in slots if e >= 0), torch.zeros_like(x_D).double()))
        rest.append(torch.zeros_like(x_D).double() if sample.rest_nD is None else sample.rest_nD[token].double())
    return answers, routed, rest


def naive_gates(layer: Layer) -> list[float]:
    given: list[list[float]] = [[] for _ in range(layer.routing.experts)]
    for chosen, gates in zip(layer.routing.index_Tk.tolist(), layer.routing.weight_Tk.tolist(), strict=True):
        for expert, gate in zip(chosen, gates, strict=True):
            given[expert].append(gate)
    return [sum(gates) / len(gates) if gates else 0.06 for gates in given]


def naive_divergence(layer: Layer, chosen: list[int], tokens: int) -> float:
    gates = naive_gates(layer)
    total = 0.0
    for answers, routed, rest in zip(*naive_outputs(layer, tokens), strict=True):
        condensed = rest + sum((gates[e] * answers[e] for e in chosen), torch.zeros_like(rest))
        total += naive_js((routed + rest).tolist(), condensed.tolist())
    return total / tokens


def kept(plan: LayerPlan) -> list[int]:
    return plan.mixing_KE.argmax(dim=1).tolist()


def order_of(plan: LayerPlan) -> list[int]:
    """The experts in the order in which they were added."""
    return sorted(kept(plan), key=lambda expert: float(plan.scores["step"][expert]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rest", [False, True])
def test_each_step_adds_the_expert_of_least_divergence(seed: int, rest: bool):
    layer = layer_with_rest(seed=seed, rest=rest)
    chosen: list[int] = []
    for step in range(1, 4):
        every = {e: naive_divergence(layer, [*chosen, e], 40) for e in range(6) if e not in chosen}
        best = min(every, key=lambda expert: every[expert])
        plan = cd_moe(layer.statistics, layer.experts, step)
        assert sorted([*chosen, best]) == kept(plan)
        assert float(plan.scores["divergence"][best]) == pytest.approx(every[best], rel=1e-4)
        chosen.append(best)


def test_rest_of_the_layer_has_a_say():
    alone, beside = layer_with_rest(seed=2, rest=False), layer_with_rest(seed=2)
    plans_ = [cd_moe(layer.statistics, layer.experts, 3) for layer in (alone, beside)]
    assert not torch.allclose(plans_[0].scores["divergence"], plans_[1].scores["divergence"])


@pytest.mark.parametrize("unused", [(), (1, 4)])
def test_static_gates_are_the_mean_gates_of_the_tokens_that_chose_an_expert(unused: tuple[int, ...]):
    layer = layer_with_rest(unused=unused)
    plan = cd_moe(layer.statistics, layer.experts, 5)
    expected = naive_gates(layer)
    assert plan.static_K is not None
    assert plan.static_K.tolist() == pytest.approx([expected[expert] for expert in kept(plan)], rel=1e-5)
    assert plan.scores["mean_gate"].tolist() == pytest.approx(expected, rel=1e-5)
    if unused:
        assert expected[1] == expected[4] == 0.06


def squared_errors(layer: Layer, plan: LayerPlan) -> float:
    """``||sum w_e E_e - y||^2 / ||y||^2`` with the plan's gates, one token at a time."""
    assert plan.static_K is not None
    gates = dict(zip(kept(plan), plan.static_K.tolist(), strict=True))
    error = energy = 0.0
    for answers, routed, _ in zip(*naive_outputs(layer, 40), strict=True):
        condensed = sum((gate * answers[e] for e, gate in gates.items()), torch.zeros_like(routed))
        error += float((condensed - routed).square().sum())
        energy += float(routed.square().sum())
    return error / energy


@pytest.mark.parametrize("seed", range(3))
def test_fitted_gates_leave_less_squared_error_than_mean_gates(seed: int):
    layer = layer_with_rest(seed=seed)
    mean = cd_moe(layer.statistics, layer.experts, 3)
    fitted = cd_moe(layer.statistics, layer.experts, 3, gates="least_squares")
    assert kept(mean) == kept(fitted)
    errors = squared_errors(layer, mean), squared_errors(layer, fitted)
    assert errors[1] < 0.99 * errors[0]
    assert (mean.predicted_error, fitted.predicted_error) == pytest.approx(errors, rel=1e-4)
    for plan in (mean, fitted):
        assert float(plan.scores["error_mean_gates"].min()) <= mean.predicted_error
        assert float(plan.scores["error_least_squares"][order_of(plan)[-1]]) == pytest.approx(errors[1], rel=1e-4)

    answers, routed, _ = naive_outputs(layer, 40)
    regressors = torch.stack([torch.cat([token[e] for token in answers]) for e in kept(fitted)], dim=1)
    exact = torch.linalg.lstsq(regressors, torch.cat(routed)[:, None]).solution[:, 0]
    assert fitted.static_K is not None
    torch.testing.assert_close(fitted.static_K.double(), exact, rtol=1e-2, atol=1e-3)


def test_no_expert_may_stay_and_then_nothing_is_needed():
    layer = layer_with_rest()
    sample = layer.statistics.sample
    empty = TokenSample(**{name: value[:0] for name, value in sample_tensors(sample).items()})
    statistics = replace(layer.statistics, sample=empty)
    plan = cd_moe(statistics, layer.experts, 0)
    assert plan.static_K is not None
    assert plan.mixing_KE.shape == (0, 6)
    assert plan.static_K.shape == (0,)
    assert plan.predicted_error == 1.0
    with pytest.raises(UsageError, match="--sample"):
        cd_moe(statistics, layer.experts, 2)


def test_ties_go_to_the_lower_index():
    layer = layer_with_rest()
    experts = with_rows(layer.experts, [3, 1, 2, 3, 4, 3])
    sums = dict(layer.statistics.sums)
    for name in ("count", "gate"):
        sums[name] = sums[name].clone()
        sums[name][[0, 5]] = float(sums[name][3])
    statistics = replace(layer.statistics, sums=sums)
    same = [e for e in kept(cd_moe(statistics, experts, 4)) if e in (0, 3, 5)]
    assert same
    assert same == [0, 3, 5][: len(same)]


def test_only_so_many_tokens_are_looked_at():
    layer = layer_with_rest(seed=1)
    few = cd_moe(layer.statistics, layer.experts, 2, tokens=5)
    first = min(range(6), key=lambda e: naive_divergence(layer, [e], 5))
    assert first in kept(few)
    assert float(few.scores["divergence"][order_of(few)[0]]) == pytest.approx(naive_divergence(layer, [first], 5))


def test_layers_of_a_scope_are_not_condensed_together():
    layer = layer_with_rest()
    statistics = replace(layer.statistics, owner_E=torch.tensor([0, 0, 0, 1, 1, 1]))
    with pytest.raises(UsageError, match="--scope 1"):
        cd_moe(statistics, layer.experts, 2)


# Which layers --------------------------------------------------------------------------------------------------------


def table(seed: int, layers: int = 5) -> dict[frozenset[int], float]:
    """A made-up divergence of every set of layers."""
    generator = torch.Generator().manual_seed(seed)
    subsets = [frozenset(part) for size in range(layers + 1) for part in combinations(range(layers), size)]
    return dict(zip(subsets, torch.rand(len(subsets), generator=generator).tolist(), strict=True))


def asked(known: dict[frozenset[int], float]):
    def divergences(chosen: tuple[int, ...], candidates: Sequence[int]) -> dict[int, float]:
        assert not set(chosen) & set(candidates)
        return {layer: known[frozenset((*chosen, layer))] for layer in candidates}

    return divergences


@pytest.mark.parametrize("seed", range(5))
def test_the_search_is_greedy(seed: int):
    known = table(seed)
    chosen: list[int] = []
    path: list[float] = []
    for _ in range(4):
        left = [layer for layer in range(5) if layer not in chosen]
        best = min(left, key=lambda layer: known[frozenset([*chosen, layer])])
        chosen.append(best)
        path.append(known[frozenset(chosen)])
        assert search(range(5), len(chosen), asked(known)) == (tuple(chosen), path)


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_set(seed: int):
    known = table(seed)
    order, path = search(range(5), 3, asked(known), beam=10)
    best = min((known[frozenset(part)], part) for part in combinations(range(5), 3))
    assert (path[-1], frozenset(order)) == (best[0], frozenset(best[1]))
    assert path == [known[frozenset(order[: step + 1])] for step in range(3)]


def test_ties_go_to_the_lower_layers_and_rules_are_kept():
    same = {key: 1.0 for key in table(0)}
    assert search(range(5), 3, asked(same))[0] == (0, 1, 2)
    assert search([4, 2, 3], 2, asked(same), beam=3)[0] == (2, 3)
    even = search(range(5), 2, asked(table(1)), allowed=lambda chosen: all(layer % 2 == 0 for layer in chosen))
    assert set(even[0]) < {0, 2, 4}
    with pytest.raises(UsageError, match="Only 3 layers can be condensed, not 4"):
        search(range(5), 4, asked(same), allowed=lambda chosen: all(layer % 2 == 0 for layer in chosen))


def hand_condensed(index: int, members: Sequence[int] = (1, 4, 6)) -> LayerPlan:
    gates = torch.tensor([0.3, 0.05, 0.6])[: len(members)] + 0.1 * index
    return plans.condense(torch.tensor(members, dtype=torch.int64), gates, EXPERTS)


def naive_last_hidden(folder: Path, out: Path, layer_plans: dict[int, LayerPlan], ids: Tensor) -> Tensor:
    """The last hidden state of the whole model, written and loaded."""
    plan = hand_made(folder, {(index,): layer for index, layer in layer_plans.items()})
    conmoe.apply(folder, plan, out, form="shared", force=True)
    with torch.no_grad():
        return load(out).get_decoder()(ids).last_hidden_state


QUICK = ("olmoe", "qwen3_next", "deepseek_v3", "gpt_oss", "ernie4_5_moe")


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in TINY]
)
def test_what_condensing_does_to_the_last_hidden_state_is_measured_without_writing_it(family, checkpoint, tmp_path):
    folder = checkpoint(family)
    ids = token_data(4, 12, seed=3).ids_NS
    source = open_source(folder, experts_implementation=IMPLEMENTATION)
    first, last = source.layers[0].index, source.layers[-1].index
    condensed = {first: hand_condensed(first), last: hand_condensed(last, () if family == "deepseek_v3" else (2, 5))}
    with torch.no_grad():
        original = load_stock(folder).get_decoder()(ids).last_hidden_state
    found = LastHidden(source, condensed, ids)
    alone, both = found((), (first, last)), found((last,), (first,))
    for got, layers in ((alone[first], [first]), (alone[last], [last]), (both[first], [first, last])):
        naive = naive_last_hidden(folder, tmp_path / "out", {index: condensed[index] for index in layers}, ids)
        assert got == pytest.approx(float(jensen_shannon(original, naive).mean()), rel=1e-3)
    assert 0 < alone[last] != alone[first] > 0


def test_how_many_layers_are_condensed():
    cap = (64,) * 27
    assert layers_to_condense(27 * 64, cap, 6) == 0
    assert layers_to_condense(27 * 64 - 1, cap, 6) == 1
    assert layers_to_condense(27 * 64 - 9 * 58, cap, 6) == 9
    assert layers_to_condense(27 * 64 - 9 * 58 - 1, cap, 6) == 10
    assert layers_to_condense(27 * 48, cap, 0) == 7


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An OLMoE of four layers, and its statistics."""
    folder, statistics = (tmp_path_factory.mktemp("deep") / name for name in ("model", "statistics"))
    save_tiny("olmoe", folder, num_hidden_layers=4)
    conmoe.calibrate(folder, statistics, token_data(), conmoe.Calibration(sample=128, batch=4))
    return folder, statistics


def request(**changes: object) -> conmoe.Request:
    return conmoe.Request(**{"method": "cd-moe", "protect": ("none",), **changes})


def condensed_layers(plan: Plan) -> set[int]:
    return {index for index, layer in by_layer(plan).items() if layer.static_K is not None}


def test_the_layers_of_least_divergence_are_condensed_to_as_many_experts_as_a_token_gets(deep, tmp_path):
    folder, statistics = deep
    plan = conmoe.plan(folder, statistics, tmp_path / "plan", request(keep="0.5"))
    order = plan.budget_options["order"]
    assert len(order) == 3  # two would leave 32 - 2 * 6
    assert condensed_layers(plan) == set(order)
    every = {index: cd_moe(read_layer(statistics, index), experts_of(folder, index), TOP_K) for index in range(4)}
    for index, layer in by_layer(plan).items():
        if index in order:
            assert layer.static_K is not None
            assert torch.equal(layer.mixing_KE, every[index].mixing_KE)
        else:
            assert torch.equal(layer.assignment_E, torch.arange(EXPERTS))
    ids = read_tokens(statistics)[:8]
    with torch.no_grad():
        original = load_stock(folder).get_decoder()(ids).last_hidden_state
    chosen: list[int] = []
    for layer in order:
        left = {
            each: naive_last_hidden(folder, tmp_path / "out", {i: every[i] for i in [*chosen, each]}, ids)
            for each in range(4)
            if each not in chosen
        }
        values = {each: float(jensen_shannon(original, hidden).mean()) for each, hidden in left.items()}
        assert layer == min(values, key=lambda each: values[each])
        chosen.append(layer)
    measured = json.loads((tmp_path / "plan" / "condense.json").read_text())
    assert measured["order"] == order
    assert measured[",".join(map(str, sorted(order)))] == pytest.approx(values[order[-1]], rel=1e-3)


def experts_of(folder: Path, index: int):
    source = open_source(folder)
    return conmoe.source.read_experts(source, source.layers[index])


def test_a_killed_search_goes_on(deep, tmp_path, monkeypatch):
    folder, statistics = deep
    whole = conmoe.plan(folder, statistics, None, request(keep="0.5"))
    states, passes = LastHidden.states, []

    def counted(self, chosen, candidates):
        passes.append((chosen, tuple(candidates)))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return states(self, chosen, candidates)

    monkeypatch.setattr(LastHidden, "states", counted)
    with pytest.raises(KeyboardInterrupt):
        conmoe.plan(folder, statistics, tmp_path / "plan", request(keep="0.5"))
    assert [len(candidates) for _, candidates in passes] == [0, 4, 3]  # the source first
    again = conmoe.plan(folder, statistics, tmp_path / "plan", request(keep="0.5"))
    assert [len(candidates) for _, candidates in passes[3:]] == [0, 3, 2]
    assert again.budget_options == whole.budget_options


def test_exactly_the_layers_that_are_named_are_condensed(deep):
    folder, statistics = deep
    plan = conmoe.plan(folder, statistics, None, request(layers="1,3", budget="uniform", keep="3"))
    assert condensed_layers(plan) == {1, 3} == set(by_layer(plan))
    assert all(layer.mixing_KE.shape[0] == 3 for layer in by_layer(plan).values())
    none = conmoe.plan(folder, statistics, None, request(layers="0,2", budget="0,5"))
    assert [layer.mixing_KE.shape[0] for layer in by_layer(none).values()] == [0, 5]


def test_the_sliced_form_chooses_among_layers_that_can_be_dense(tmp_path):
    folder, statistics = tmp_path / "model", tmp_path / "statistics"
    save_tiny("deepseek_v3", folder, num_hidden_layers=5)
    conmoe.calibrate(folder, statistics, token_data(), conmoe.Calibration(sample=128, batch=4))
    asked_for = request(keep="0.5", form="sliced", budget_options={"always_on": 0})
    plan = conmoe.plan(folder, statistics, None, asked_for)
    assert plan.budget_options["order"] == [1, 2]
    assert plan.default_form == "sliced"
    conmoe.apply(folder, plan, tmp_path / "out")
    conmoe.verify(tmp_path / "out", folder, plan, "sliced")
    assert load_stock(tmp_path / "out").config.first_k_dense_replace == 3
    assert "layers 1, 2 have no router" in (tmp_path / "out" / "README.md").read_text()


def test_layers_with_super_experts_stay_whole(deep, tmp_path):
    folder, statistics = deep
    marked = tmp_path / "statistics"
    shutil.copytree(statistics, marked)
    layer = read_layer(marked, 1)
    peak = layer.sums["peak"].clone()
    peak[2] = 1e4
    write_layer(marked, 1, replace(layer, sums={**layer.sums, "peak": peak}))
    assert condensed_layers(conmoe.plan(folder, marked, None, request(keep="0.25"))) == {0, 1, 2, 3}
    assert condensed_layers(conmoe.plan(folder, marked, None, request(keep="0.5", protect=("super",)))) == {0, 2, 3}
    with pytest.raises(UsageError, match="4 condensed layers, and 3 hold no super experts"):
        conmoe.plan(folder, marked, None, request(keep="0.25", protect=("super",)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"keep": "0.1"}, r"all 4 layers are condensed to 2 experts \(0.250 of all\)"),
        ({"method": "reap", "budget": "condense"}, "'reap' condenses none"),
        ({"budget_options": {"always_on": 8}}, "8 of 8 experts would be always on"),
        ({"budget_options": {"always_on": -2}}, "always_on from 0 up"),
        ({"budget_options": {"beam": 0}}, "beam of one or more"),
        ({"protect": ("1:3",)}, "no expert can be protected"),
        ({"form": "sliced"}, "'olmoe' cannot call single layers dense"),
        ({"budget": "9,9,9,9"}, "takes 0 to 8"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_before_any_work(changes, sentence, deep, tmp_path):
    folder, statistics = deep
    with pytest.raises(UsageError, match=sentence):
        conmoe.plan(folder, statistics, tmp_path / "plan", request(**changes))
    assert not list(tmp_path.iterdir())
