"""Budgets, requests, protected experts, router groups and scopes: what surrounds every method."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import conmoe
from conmoe.allocate import experts_kept, parse_keep, uniform
from conmoe.types import Plan
from tests.conftest import Checkpoint, token_data
from tests.families import EXPERTS, TINY, save_tiny
from tests.results import by_layer, kept

METHODS = sorted(conmoe.methods())
#: A layer that is condensed answers as a whole, and has no place for a protected expert.
PROTECTING = [name for name, method in conmoe.methods().items() if not method.condenses]
GROUPED = ["deepseek_v2", "deepseek_v3", "glm4_moe"]


# Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), ("50%", 0.5), (" 12.5% ", 0.125), (".25", 0.25), ("1.0", 1.0), ("100%", 1.0), ("1", 1), ("32", 32)],
)
def test_a_share_has_a_point_or_a_percent_sign_and_a_count_has_neither(text, value):
    assert parse_keep(text) == value
    assert type(parse_keep(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0", "would leave no expert"),
        ("0.0", "would leave no expert"),
        ("0%", "would leave no expert"),
        ("1.5", "more than all experts"),
        ("101%", "more than all experts"),
        ("-1", "takes a share"),
        ("half", "takes a share"),
        (".", "takes a share"),
        ("", "takes a share"),
        ("nan", "takes a share"),
        ("1e-1", "takes a share"),
    ],
)
def test_what_is_no_budget_is_refused(text, sentence):
    with pytest.raises(conmoe.UsageError, match=sentence):
        parse_keep(text)


def test_shares_are_rounded_half_up_and_leave_one():
    assert [experts_kept(share, 8) for share in (0.01, 0.0625, 0.1875, 0.5, 0.99, 1.0)] == [1, 1, 2, 4, 8, 8]
    assert [experts_kept(count, 8) for count in (1, 8)] == [1, 8]
    with pytest.raises(conmoe.UsageError, match="asks for more experts than the 8"):
        experts_kept(9, 8)


def test_a_scope_keeps_as_much_as_its_layers_would():
    assert uniform(0.5, 8, [1, 1]) == [4, 4]
    assert uniform(0.5, 8, [2, 2, 1]) == [8, 8, 4]
    assert uniform(3, 8, [2, 1]) == [6, 3]
    assert uniform(0.3, 8, [1, 4]) == [2, 10]  # one rounding for the whole pool
    with pytest.raises(conmoe.UsageError, match="more experts"):
        uniform(9, 8, [2])


# Requests -----------------------------------------------------------------------------------------------------------


def plan_of(family: str, checkpoint: Checkpoint, calibrated: Checkpoint, **request) -> Plan:
    return conmoe.plan(checkpoint(family), calibrated(family), request=conmoe.Request(**request))


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"method": "reep"}, "no method 'reep'; did you mean 'reap'"),
        ({"method": "conmoe", "options": {"distanc": "weight"}}, "no option of conmoe 'distanc'; did you mean 'dista"),
        ({"method": "random", "options": {"seed": "first"}}, "'seed' takes int, not 'first'"),
        ({"keep": "0"}, "would leave no expert"),
        ({"keep": "9"}, "more experts than the 8"),
        ({"method": "reap", "keep": "1"}, "leaves 1 experts, but every token goes to 2"),
        ({"method": "conmoe", "keep": "1", "form": "sliced"}, "keep at least 2 in the sliced form"),
        ({"scope": 0}, "--scope takes a number"),
        ({"method": "reap", "scope": 2}, "no sliced form"),
        ({"method": "cd-moe", "form": "expanded"}, "routers of whole layers away: use --form shared or --form sliced"),
        ({"method": "cd-moe", "scope": 2}, "routers of whole layers away: its layers share nothing"),
        ({"method": "mc-smoe", "budget": "uniform", "form": "sliced"}, "factors, which the sliced form cannot hold"),
        ({"method": "mc-smoe", "form": "expanded"}, "factors, which the expanded form cannot hold"),
        ({"method": "mone", "form": "expanded"}, "constants, which the expanded form cannot hold"),
        ({"method": "naee", "options": {"skip": "true"}, "refine": "refit"}, "skips experts at run time"),
        ({"sample": 64}, "drawn anew only with --sequential"),
        ({"protect": ("0:8",)}, "LAYER:EXPERT of this model, not '0:8'"),
        ({"protect": ("2:0",)}, "not '2:0'"),
        ({"protect": ("everything",)}, "not 'everything'"),
        ({"protect": ("0:-1",)}, "not '0:-1'"),
    ],
)
def test_a_request_that_cannot_be_met_gets_one_sentence_and_no_folder(
    request_, sentence, checkpoint, calibrated, tmp_path
):
    out = tmp_path / "plan"
    with pytest.raises(conmoe.UsageError, match=sentence) as caught:
        conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), out, conmoe.Request(**request_))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_fewer_experts_than_slots_are_fine_where_the_router_stays(checkpoint, calibrated):
    plan = plan_of("olmoe", checkpoint, calibrated, method="conmoe", keep="1")
    assert all(part.assignment_E.eq(0).all() for part in by_layer(plan).values())


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"refine": "refit"}, "no token sample for --refine"),
        ({"refine": "gains", "sequential": True}, "no token sample for --refine"),
        ({"budget": "error", "form": "shared"}, "token sample, and there is none"),
    ],
)
def test_what_needs_a_sample_says_so(request_, sentence, checkpoint, tmp_path):
    conmoe.calibrate(checkpoint("olmoe"), tmp_path / "stats", token_data(4), conmoe.Calibration(sample=0, batch=4))
    with pytest.raises(conmoe.UsageError, match=sentence):
        conmoe.plan(checkpoint("olmoe"), tmp_path / "stats", None, conmoe.Request(method="reap", **request_))


def test_statistics_of_another_model_are_refused(checkpoint, calibrated, tmp_path):
    with pytest.raises(conmoe.UsageError, match="made from another checkpoint"):
        conmoe.plan(checkpoint("olmoe"), calibrated("mixtral"), tmp_path / "plan")
    with pytest.raises(conmoe.UsageError, match="holds no statistics"):
        conmoe.plan(checkpoint("olmoe"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_covers_every_layer_and_is_the_same_again(method, checkpoint, calibrated, tmp_path):
    request = conmoe.Request(method=method, keep="3", budget="uniform")
    plan = conmoe.plan(checkpoint("mixtral"), calibrated("mixtral"), tmp_path / "plan", request)
    assert len(by_layer(plan)) == 2
    again, read = (
        plan_of("mixtral", checkpoint, calibrated, method=method, keep="3", budget="uniform"),
        conmoe.read_plan(tmp_path / "plan"),
    )
    for index, part in by_layer(plan).items():
        assert len(part.mixing_KE) == 3
        for other in (again, read):
            assert torch.equal(by_layer(other)[index].assignment_E, part.assignment_E)
            assert torch.equal(by_layer(other)[index].mixing_KE, part.mixing_KE)
    assert plan.default_form == conmoe.methods()[method].form


@pytest.mark.parametrize("keep", ["8", "100%", "1.0"])
@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_is_the_identity(method, keep, checkpoint, calibrated):
    for part in by_layer(plan_of("deepseek_v3", checkpoint, calibrated, method=method, keep=keep)).values():
        assert part.assignment_E.tolist() == list(range(EXPERTS))
        assert torch.equal(part.mixing_KE, torch.eye(EXPERTS, dtype=part.mixing_KE.dtype))


def test_the_registries_are_functions_of_the_package_for_good():
    for _ in range(2):  # the first call imports the packages of the same names
        assert set(METHODS) <= set(conmoe.methods())
        assert "count" in conmoe.statistics()


# Protected experts --------------------------------------------------------------------------------------------------


def answers_for_itself(part, expert) -> bool:
    """Whether an expert of a plan is a copy of the source's, and of no other."""
    return torch.equal(part.mixing_KE[part.assignment_E[expert]], torch.eye(EXPERTS, dtype=torch.float64)[expert])


@pytest.mark.parametrize("method", PROTECTING)
def test_protected_experts_stay_and_answer_for_themselves(method, checkpoint, calibrated):
    for family, layers in (("olmoe", (0, 1)), ("glm4_moe", (1, 2))):
        free = plan_of(family, checkpoint, calibrated, method=method, budget="uniform", protect=("none",))
        for expert in range(EXPERTS):
            protect = (f"{layers[1]}:{expert}",)
            plan = plan_of(family, checkpoint, calibrated, method=method, budget="uniform", protect=protect)
            assert plan.protected == {layers[1]: (expert,)}
            part = by_layer(plan)[layers[1]]
            assert len(part.mixing_KE) == EXPERTS // 2
            assert answers_for_itself(part, expert)
            assert torch.equal(by_layer(plan)[layers[0]].assignment_E, by_layer(free)[layers[0]].assignment_E)
        assert free.protected == {}


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(PROTECTING)))
def test_condensed_layers_protect_nobody(method, checkpoint, calibrated):
    with pytest.raises(conmoe.UsageError, match="no expert can be protected"):
        plan_of("olmoe", checkpoint, calibrated, method=method, protect=("0:1",))


def test_too_many_protected_experts_are_refused(checkpoint, calibrated):
    protect = tuple(f"0:{expert}" for expert in range(5))
    with pytest.raises(conmoe.UsageError, match="5 experts are protected where 4 may stay"):
        plan_of("olmoe", checkpoint, calibrated, protect=protect)
    everyone = tuple(f"0:{expert}" for expert in range(EXPERTS))
    assert plan_of("olmoe", checkpoint, calibrated, keep="8", protect=everyone).protected == {0: tuple(range(EXPERTS))}


def test_protected_experts_of_a_scope(checkpoint, calibrated):
    for expert in range(EXPERTS):
        plan = plan_of("olmoe", checkpoint, calibrated, scope=2, keep="25%", protect=("0:2", f"1:{expert}"))
        part = plan.scopes[0].plan
        assert {2, EXPERTS + expert} <= set(kept(part))
        assert len(part.mixing_KE) == EXPERTS // 2


@pytest.mark.parametrize("method", PROTECTING)
def test_super_experts_are_found_and_protected_by_default(method, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.5.down_proj.weight"] *= 300
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    conmoe.calibrate(folder, tmp_path / "stats", token_data(4))
    request = conmoe.Request(method=method, keep="2")
    plan = conmoe.plan(folder, tmp_path / "stats", request=request)
    assert plan.protected == {0: (5,)}
    assert answers_for_itself(by_layer(plan)[0], 5)
    both = conmoe.Request(method=method, keep="3", protect=("super", "0:1"))
    assert conmoe.plan(folder, tmp_path / "stats", request=both).protected == {0: (1, 5)}


@pytest.mark.parametrize("family", TINY)
def test_ordinary_models_have_no_super_experts(family, checkpoint, calibrated):
    assert plan_of(family, checkpoint, calibrated, keep="8").protected == {}


# Router groups ------------------------------------------------------------------------------------------------------


def group_of(part) -> torch.Tensor:
    """The router group of each prototype, none of which is made of experts of two."""
    used_Kg = (part.mixing_KE != 0).view(len(part.mixing_KE), 2, EXPERTS // 2).any(dim=2)
    assert bool((used_Kg.sum(dim=1) == 1).all())
    return used_Kg.int().argmax(dim=1)


def per_group(part) -> list[int]:
    return torch.bincount(group_of(part), minlength=2).tolist()


@pytest.mark.parametrize("method", sorted({*PROTECTING} - {"mc-smoe"}))  # factors are never sliced
@pytest.mark.parametrize("family", GROUPED)
def test_each_router_group_keeps_equally_many(family, method, checkpoint, calibrated):
    for keep in (4, 6):
        request = {"method": method, "keep": str(keep), "form": "sliced", "budget": "uniform"}
        plan = plan_of(family, checkpoint, calibrated, **request)
        assert [per_group(part) for part in by_layer(plan).values()] == [[keep // 2] * 2] * 2
        for part in by_layer(plan).values():
            alive = (part.assignment_E >= 0) & (part.assignment_E < keep)
            answers = group_of(part)[part.assignment_E[alive]]
            assert torch.equal(answers, (torch.arange(EXPERTS) // 4)[alive])


@pytest.mark.parametrize("family", GROUPED)
def test_counts_that_groups_cannot_hold_are_refused(family, checkpoint, calibrated):
    for keep, sentence in ((5, "must be a multiple of 2, not 5"), (2, "each of the router's 2 groups has 1")):
        with pytest.raises(conmoe.UsageError, match=sentence):
            plan_of(family, checkpoint, calibrated, method="reap", keep=str(keep))
    plan_of(family, checkpoint, calibrated, method="conmoe", keep="5")


def test_protected_experts_count_in_their_own_group(checkpoint, calibrated):
    plan = plan_of("glm4_moe", checkpoint, calibrated, method="reap", protect=("1:4",))
    assert per_group(by_layer(plan)[1]) == [2, 2]
    assert 4 in kept(by_layer(plan)[1])
    with pytest.raises(conmoe.UsageError, match="3 experts are protected where 2 may stay"):
        plan_of("glm4_moe", checkpoint, calibrated, method="reap", protect=("1:4", "1:5", "1:6"))


def test_a_router_that_ignores_its_groups_has_none(tmp_path):
    folder = save_tiny("deepseek_v2", tmp_path / "greedy", topk_method="greedy")
    conmoe.calibrate(folder, tmp_path / "stats", token_data(4))
    plan = conmoe.plan(folder, tmp_path / "stats", request=conmoe.Request(method="reap", keep="3"))
    conmoe.apply(folder, plan, tmp_path / "out")
    conmoe.verify(tmp_path / "out", folder, plan, "sliced")


# Scopes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "windows"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (4, [3])])
def test_windows_of_a_scope(scope, windows, tmp_path):
    folder = save_tiny("olmoe", tmp_path / "model", num_hidden_layers=3)
    conmoe.calibrate(folder, tmp_path / "stats", token_data(2))
    plan = conmoe.plan(folder, tmp_path / "stats", request=conmoe.Request(scope=scope, keep="25%"))
    assert [len(part.layers) for part in plan.scopes] == windows
    assert [layer for part in plan.scopes for layer in part.layers] == [0, 1, 2]
    for part in plan.scopes:
        assert part.plan.mixing_KE.shape == (2 * len(part.layers), EXPERTS * len(part.layers))
