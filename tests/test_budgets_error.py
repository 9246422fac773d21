"""The budget by measured error: its curves, the counts of least total, and what becomes of them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

import conmoe
from conmoe.allocate import cheapest, spread
from conmoe.artifacts import read_layer
from conmoe.budgets.error import MEASURED, curve, grid
from tests.commands import runner, write_text
from tests.conftest import token_data
from tests.families import EXPERTS, TOP_K, save_tiny, tiny_model, tiny_tokenizer
from tests.results import blocks, by_layer, config_of, load, silenced
from tests.test_budgets import LAYERS, TOTAL, Heard, sizes

EVERY = {"points": str(EXPERTS)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("olmoe", tmp_path_factory.mktemp("error") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def statistics(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("error") / "statistics"
    conmoe.calibrate(model, folder, token_data(6), conmoe.Calibration(sample=64))
    return folder


@pytest.fixture
def planned(model, statistics):
    def plan(out=None, progress=None, **request):
        more = {} if progress is None else {"progress": progress}
        return conmoe.plan(model, statistics, out, conmoe.Request(**{"budget": "error", **request}), **more)

    return plan


def read_curves(folder, weight="absolute"):
    """Layer -> count -> what was measured there."""
    measured = json.loads((folder / MEASURED).read_text())
    return {
        int(layer): {int(count): errors[weight] for count, errors in counts.items()}
        for layer, counts in measured.items()
    }


# Arithmetic ---------------------------------------------------------------------------------------------------------


def test_cheapest_is_the_best_choice_there_is():
    """Brute force over all counts, on costs of any shape."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = [int(each) for each in generator.integers(1, 6, 3)]
        cost = [generator.random(length) for length in lengths]
        floor, step = [int(each) for each in generator.integers(0, 3, 3)], int(generator.integers(1, 4))
        total = sum(floor) + int(generator.integers(0, step * sum(lengths)))
        units = min((total - sum(floor)) // step, sum(lengths) - 3)

        def spent(steps, cost=cost):
            return sum(own[each] for own, each in zip(cost, steps, strict=True))

        every = (steps for steps in itertools.product(*map(range, lengths)) if sum(steps) == units)
        best = min(every, key=spent)
        assert cheapest(cost, total, floor, step) == [low + step * each for low, each in zip(floor, best, strict=True)]


def test_cheapest_is_greedy_where_every_expert_gains_less_than_the_one_before():
    """At the size of a large model, against the budgets that take experts one by one."""
    generator = np.random.default_rng(1)
    gains = [np.sort(generator.random(255))[::-1] for _ in range(60)]
    cost = [np.concatenate([[0.0], -np.cumsum(gain)]) for gain in gains]
    worth = [torch.cat([torch.tensor([torch.inf]), torch.tensor(gain.copy())]) for gain in gains]
    floor, cap, total = [1] * 60, [256] * 60, 60 * 100
    assert cheapest(cost, total, floor) == spread([each.double() for each in worth], total, floor, cap)


def test_cheapest_breaks_ties_to_the_earlier_scope():
    flat = [np.zeros(4)] * 3
    assert cheapest(flat, 5, [1, 1, 1]) == [3, 1, 1]
    assert cheapest(flat, 99, [1, 1, 1]) == [4, 4, 4]


@pytest.mark.parametrize("points", [2, 3, 5, 8, 200])
@pytest.mark.parametrize(
    ("floor", "cap", "uniform", "step"), [(1, 64, 32, 1), (4, 8, 4, 2), (8, 8, 8, 1), (3, 4, 1, 1)]
)
def test_a_grid_has_both_ends_and_the_even_count(points, floor, cap, uniform, step):
    counts = grid(floor, cap, uniform, step, points)
    assert (counts[0], counts[-1]) == (floor, cap)
    assert counts == sorted(set(counts))
    assert all((count - floor) % step == 0 for count in counts)
    assert uniform in counts or not floor <= uniform <= cap
    assert len(counts) <= points + 1
    if points > cap:
        assert counts == list(range(floor, cap + 1, step))


def test_a_curve_is_linear_between_points_and_never_rises():
    found = curve({2: 8.0, 4: 4.0, 5: 6.0, 8: 0.0}, 1)
    assert found.tolist() == pytest.approx([8, 6, 4, 4, 8 / 3, 4 / 3, 0])
    assert curve({2: 8.0, 6: 4.0, 8: 0.0}, 2).tolist() == [8, 6, 4, 0]


# Measuring ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(stock, statistics):
    """Of each layer, what its routed experts add on its token sample, by the layer's own modules."""
    found = {}
    for index, block, _, _ in blocks(stock):
        x_nD = read_layer(statistics, index).sample.hidden_nD
        found[index] = block(x_nD.unsqueeze(0))[0].double()
    return found


@pytest.mark.parametrize("weight", ["absolute", "relative"])
def test_what_is_measured_is_what_the_layers_of_the_result_do(weight, model, statistics, planned, tmp_path):
    """Against the modules of Transformers, experts silenced in their routers."""
    options = {**EVERY, "weight": weight}
    planned(tmp_path / "plan", method="reap", budget_options=options)
    curves = read_curves(tmp_path / "plan", weight)
    assert list(curves) == list(range(LAYERS))
    stock = load(model)
    whole = outputs(stock, statistics)
    for count in range(TOP_K, EXPERTS):
        plan = planned(method="reap", budget="uniform", keep=str(count))
        dropped = {
            index: (part.assignment_E < 0).nonzero().flatten().tolist() for index, part in by_layer(plan).items()
        }
        with silenced(stock, dropped):
            left = outputs(stock, statistics)
        for layer in range(LAYERS):
            lost = float((whole[layer] - left[layer]).square().sum())
            over = len(whole[layer]) if weight == "absolute" else float(whole[layer].square().sum())
            assert curves[layer][count] == pytest.approx(lost / over, rel=1e-4)


@pytest.mark.parametrize("weight", ["absolute", "relative"])
@pytest.mark.parametrize("method", ["reap", "conmoe"])
def test_no_other_counts_have_a_lower_total(method, weight, planned, tmp_path):
    heard, options = Heard(), {**EVERY, "weight": weight}
    plan = planned(tmp_path / "plan", heard, method=method, budget_options=options)
    assert sum(sizes(plan)) == TOTAL
    curves = read_curves(tmp_path / "plan", weight)
    low = min(curves[0])
    assert low == (TOP_K if method == "reap" else 1)
    falling = []
    for layer in range(LAYERS):
        measured = [curves[layer][count] for count in range(low, EXPERTS)] + [0.0]
        falling.append(np.minimum.accumulate(measured))
    every = itertools.product(range(low, EXPERTS + 1), repeat=LAYERS)

    def total(counts):
        return sum(own[count - low] for own, count in zip(falling, counts, strict=True))

    least = min(total(counts) for counts in every if sum(counts) == TOTAL)
    assert total(sizes(plan)) == pytest.approx(least)
    assert heard.done["error"] == heard.total["error"] == LAYERS * (EXPERTS - low)
    assert f"{total([EXPERTS // 2] * LAYERS):.4g} with equal counts, {least:.4g} with those found" in heard.notes[0]
    assert sizes(planned(method=method, budget_options=options)) == sizes(plan)


def test_a_layer_of_duplicates_gives_up_half_of_its_experts_first(tmp_path):
    """Experts 2i and 2i + 1 of one layer are the same, so its error is zero down to half of them."""
    made = tiny_model("olmoe", num_hidden_layers=3)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if ".layers.1.mlp.experts." in name:
                value[1::2] = value[0::2]
    made.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    conmoe.calibrate(tmp_path / "model", tmp_path / "statistics", token_data(), conmoe.Calibration(sample=128))
    request = conmoe.Request("conmoe", str(20 / 24), budget="error", budget_options=EVERY)
    plan = conmoe.plan(tmp_path / "model", tmp_path / "statistics", tmp_path / "plan", request)
    curves = read_curves(tmp_path / "plan", "relative")
    assert all(curves[1][count] < 1e-10 for count in range(EXPERTS // 2, EXPERTS))
    assert all(curves[1][count] > 1e-3 for count in range(1, EXPERTS // 2))
    assert all(curves[layer][EXPERTS - 1] > 1e-3 for layer in (0, 2))
    # 21 stay, 17 of which the other layers and half of this one can use; nothing is lost
    assert sizes(plan)[0] == sizes(plan)[2] == EXPERTS
    assert sizes(plan)[1] == sum(sizes(plan)) - 2 * EXPERTS


# Around it ----------------------------------------------------------------------------------------------------------


def test_protected_experts_are_kept_and_floors_hold(planned):
    protect = tuple(f"2:{expert}" for expert in range(6))
    plan = planned(method="reap", protect=protect)
    assert sum(sizes(plan)) == TOTAL
    assert sizes(plan)[2] >= 7
    assert min(sizes(plan)) >= TOP_K
    least = planned(method="reap", keep=str(TOP_K))
    assert sizes(least) == [TOP_K] * LAYERS
    assert sizes(planned(method="reap", keep="1.0")) == [EXPERTS] * LAYERS


def test_layers_that_share_a_pool_are_measured_together(model, statistics, planned, tmp_path):
    """Against the layers of a written result, at the even count."""
    plan = planned(tmp_path / "plan", method="conmoe", scope=2, keep="25%")
    assert sum(sizes(plan)) == TOTAL // 2
    curves = read_curves(tmp_path / "plan")
    assert list(curves) == [0, 2]
    assert EXPERTS // 2 in curves[0]
    even = planned(method="conmoe", scope=2, keep="25%", budget="uniform")
    conmoe.apply(model, even, tmp_path / "out")
    whole, left = outputs(load(model), statistics), outputs(load(tmp_path / "out"), statistics)
    lost = {layer: float((whole[layer] - left[layer]).square().sum(dim=1).mean()) for layer in whole}
    for first in (0, 2):
        assert curves[first][EXPERTS // 2] == pytest.approx(lost[first] + lost[first + 1], rel=1e-4)


def test_groups_of_a_router_give_up_experts_together(tmp_path):
    model = save_tiny("deepseek_v3", tmp_path / "model", n_routed_experts=16)
    conmoe.calibrate(model, tmp_path / "statistics", token_data(6), conmoe.Calibration(sample=64))
    request = conmoe.Request("reap", "8", budget="error")
    plan = conmoe.plan(model, tmp_path / "statistics", tmp_path / "plan", request)
    assert sum(sizes(plan)) == 16
    assert all(size % 2 == 0 for size in sizes(plan))
    curves = read_curves(tmp_path / "plan")
    assert all(set(own) == {4, 6, 8, 10, 12, 14} for own in curves.values())
    first, second = ({**own, 16: 0.0} for own in curves.values())
    assert first[sizes(plan)[0]] + second[sizes(plan)[1]] == min(
        first[own] + second[16 - own] for own in (4, 6, 8, 10, 12)
    )


@pytest.mark.parametrize("method", ["mone", "mc-smoe", "mergemoe", "naee", "cd-moe"])
def test_any_kind_of_plan_is_measured(method, planned):
    plan = planned(method=method, budget_options={"points": "3"})
    assert plan.budget == "error"
    assert 0 < sum(sizes(plan)) <= TOTAL


def test_what_was_measured_is_not_measured_again(planned, tmp_path):
    class Killed(BaseException):
        pass

    class Deadly(Heard):
        def __enter__(self):
            advance = super().__enter__()

            def mortal(done, total=None):
                advance(done)
                if self.done.get("error") == 4:
                    raise Killed

            return mortal

    with pytest.raises(Killed):
        planned(tmp_path / "plan", Deadly(), method="reap")
    file = tmp_path / "plan.partial" / MEASURED
    half = json.loads(file.read_text())
    assert sum(map(len, half.values())) == 4
    half["0"]["2"]["absolute"] *= 1.001  # marks what is not measured again
    file.write_text(json.dumps(half))
    resumed = planned(tmp_path / "plan", method="reap")
    marked = json.loads((tmp_path / "plan" / MEASURED).read_text())
    assert {count: marked["0"][count] for count in half["0"]} == half["0"]
    whole = planned(tmp_path / "whole", method="reap")
    assert sizes(resumed) == sizes(whole)
    assert json.loads((tmp_path / "whole" / MEASURED).read_text()).keys() == marked.keys()


def test_one_point_is_no_curve(planned):
    with pytest.raises(conmoe.UsageError, match="takes two points or more"):
        planned(budget_options={"points": "1"})
    with pytest.raises(conmoe.UsageError, match="one of absolute, relative"):
        planned(budget_options={"weight": "residual"})
    with pytest.raises(conmoe.UsageError, match="lets layers keep different numbers"):
        planned(method="reap", form="sliced")


def test_a_result_is_written_and_measured(model, tmp_path, capsys):
    words = ["--method", "reap", "--budget", "error", "--budget-option", "points=4", "--keep", "0.6", "--json"]
    words += ["--refine", "none"]
    small = ["--data", write_text(tmp_path), "--tokens", "256", "--seq-len", "32", "--eval-tokens", "128"]
    done = runner(capsys)("compress", model, tmp_path / "out", *words, *small)
    assert done.code == 0, done.err
    assert (done.json["budget"], done.json["form"]) == ("error", "shared")
    assert done.json["budget_options"] == {"points": 4, "weight": "absolute"}
    assert "Predicted error" in done.err
    plan = conmoe.read_plan(tmp_path / "out" / "conmoe")
    assert sum(sizes(plan)) == 5 * LAYERS
    assert config_of(tmp_path / "out")["model_type"] == "conmoe_olmoe"
