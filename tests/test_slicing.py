"""The best sliced version of a plan that redirects: which rows speak, what is fitted, and what it is said to lose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import conmoe
from conmoe.artifacts import plan_fingerprint, read_layer
from conmoe.forms import representatives
from conmoe.refine import held_out_tokens
from conmoe.slicing import SLICE_JSON, choices
from conmoe.source import open_source, read_experts
from conmoe.types import LayerPlan, Plan, UsageError
from tests.conftest import Checkpoint
from tests.families import EXPERTS
from tests.results import load

FEW = {"steps": 20, "batch": 64}
REDIRECTING = conmoe.Request(method="conmoe", keep="4")


def redirecting(folder: Path, statistics: Path) -> Plan:
    return conmoe.plan(folder, statistics, request=REDIRECTING)


def block_error(model: torch.nn.Module, source: torch.nn.Module, router: str, x_nD: torch.Tensor) -> float:
    """``||y - y'||^2 / ||y||^2`` of two loaded models' MoE blocks, without a line of the package's arithmetic."""
    name = router.rpartition(".")[0]
    found = []
    for each in (source, model):
        out = each.get_submodule(name)(x_nD.unsqueeze(0))
        found.append((out[0] if isinstance(out, tuple) else out).squeeze(0).double())
    return float((found[0] - found[1]).square().sum() / found[0].square().sum())


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def test_the_losses_are_those_of_the_checkpoints_that_are_written(
    family: str, checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path
):
    """Of each layer alone, on the held-out tokens: shared, sliced as it is, sliced at best."""
    folder, statistics = checkpoint(family), calibrated(family)
    made = redirecting(folder, statistics)
    found = conmoe.slice_plan(folder, statistics, made, refine="reconstruct", refine_options=FEW, sequential=False)
    assert all(loss.redirected == EXPERTS - 4 for loss in found.record.layers)
    source = load(folder)
    written = {
        "mapped": conmoe.apply(folder, made, tmp_path / "shared", form="shared"),
        "dropped": conmoe.apply(folder, made, tmp_path / "dropped", form="sliced"),
        "sliced": conmoe.apply(folder, found.plan, tmp_path / "sliced", form="sliced"),
    }
    layers = {layer.index: layer for layer in open_source(folder).layers}
    for what, applied in written.items():
        model = load(applied.folder)
        for loss in found.record.layers:
            sample = read_layer(statistics, loss.layer).sample
            x_nD = sample.hidden_nD[held_out_tokens(sample)].float()
            with torch.no_grad():
                error = block_error(model, source, layers[loss.layer].router, x_nD)
            assert getattr(loss, what).value == pytest.approx(error, rel=2e-3), (what, loss.layer)
    conmoe.verify(tmp_path / "sliced", folder, found.plan, "sliced")


def test_the_best_is_no_worse_than_dropping_the_map(checkpoint: Checkpoint, calibrated: Checkpoint):
    """On the tokens that rows are chosen by; and fitting never makes the held-out tokens worse than the rows alone."""
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    made = redirecting(folder, statistics)
    rows = conmoe.slice_plan(folder, statistics, made, refine="none", sequential=False)
    fitted = conmoe.slice_plan(folder, statistics, made, refine="refit", sequential=False)
    for chosen, best in zip(rows.record.layers, fitted.record.layers, strict=True):
        assert chosen.rows == best.rows
        assert best.sliced.value <= chosen.sliced.value
    assert rows.plan.refine == "none"
    assert fitted.plan.default_form == "sliced"
    assert not conmoe.forms.is_approximate(fitted.plan, "sliced")
    assert fitted.record.plan == plan_fingerprint(made)
    assert fitted.plan.options["sliced_from"] == fitted.record.plan[:12]


def test_prototypes_fitted_to_their_map_do_not_stand_in_the_way(checkpoint: Checkpoint, calibrated: Checkpoint):
    """However wrong the weights of a plan are without its map, slicing it is no worse than slicing its recipes."""
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    made = redirecting(folder, statistics)
    experts = {layer.index: read_experts(open_source(folder), layer) for layer in open_source(folder).layers}
    spoilt = replace(
        made,
        scopes=tuple(
            replace(scope, plan=replace(scope.plan, weights={"down_EDI": -5 * experts[scope.layers[0]].down_EDI[:4]}))
            for scope in made.scopes
        ),
    )
    plain = conmoe.slice_plan(folder, statistics, made, refine="none", sequential=False).record.layers
    found = conmoe.slice_plan(folder, statistics, spoilt, refine="none", sequential=False).record.layers
    assert [loss.rows for loss in found] == [f"{loss.rows}, unfitted" for loss in plain]
    assert [loss.sliced for loss in found] == [loss.sliced for loss in plain]
    assert all(loss.dropped.value > loss.sliced.value for loss in found)


def by_hand(folder: Path, statistics: Path) -> tuple[LayerPlan, dict[str, LayerPlan], torch.Tensor, torch.Tensor]:
    """Prototypes 5 and 1, which answer for the upper and the lower half, and the choices of rows for them."""
    layer = open_source(folder).layers[0]
    plan = LayerPlan(
        assignment_E=torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]),
        mixing_KE=torch.eye(EXPERTS)[[5, 1]],
        gain_E=torch.ones(EXPERTS),
    )
    sample = read_layer(statistics, layer.index).sample
    experts = read_experts(open_source(folder), layer)
    assert experts.router_ED is not None
    mass_E = torch.zeros(EXPERTS)
    for index_k, weight_k in zip(sample.index_nk.tolist(), sample.weight_nk.tolist(), strict=True):
        for index, weight in zip(index_k, weight_k, strict=True):
            mass_E[index] += weight
    return plan, choices(plan, layer, sample, experts), mass_E, experts.router_ED


def test_rows_are_chosen_from_the_experts_that_a_prototype_answers_for(checkpoint: Checkpoint, calibrated: Checkpoint):
    _, found, mass_E, router_ED = by_hand(checkpoint("olmoe"), calibrated("olmoe"))
    assert representatives(found["own"]).tolist() == [5, 1]
    busiest = [4 + int(mass_E[4:].argmax()), int(mass_E[:4].argmax())]
    assert representatives(found["busiest"]).tolist() == busiest
    assert (
        sorted(set(range(EXPERTS)) - set(busiest)) == (found["busiest"].assignment_E < 0).nonzero().flatten().tolist()
    )
    upper, lower = (
        (mass_E[half, None] * router_ED[half]).sum(0) / mass_E[half].sum() for half in (slice(4, 8), slice(4))
    )
    mean = found["mean"]
    assert mean.router_KD is not None
    # rows stand in the order of the experts: 1 before 5
    torch.testing.assert_close(mean.router_KD, torch.stack([lower, upper]), rtol=1e-5, atol=1e-6)
    assert mean.assignment_E.tolist() == [-1, 1, -1, -1, -1, 0, -1, -1]


def test_rows_that_the_groups_of_a_router_do_not_allow_are_not_chosen(checkpoint: Checkpoint, calibrated: Checkpoint):
    folder, statistics = checkpoint("deepseek_v3"), calibrated("deepseek_v3")
    layer = open_source(folder).layers[0]
    sample, experts = read_layer(statistics, layer.index).sample, read_experts(open_source(folder), layer)
    # the second prototype answers across the groups; if the busier of its experts is in the first, the groups differ
    plan = LayerPlan(torch.tensor([0, 1, 2, 2, 3, 2, 3, 3]), torch.eye(8)[[0, 1, 5, 6]], torch.ones(8))
    busy = replace(sample, index_nk=torch.full_like(sample.index_nk, 2))
    assert set(choices(plan, layer, busy, experts)) == {"own", "mean"}
    calm = replace(sample, index_nk=torch.full_like(sample.index_nk, 5))
    assert set(choices(plan, layer, calm, experts)) == {"own", "busiest", "mean"}


def test_a_prototype_without_a_token_keeps_its_own_row(checkpoint: Checkpoint, calibrated: Checkpoint):
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    layer = open_source(folder).layers[0]
    sample, experts = read_layer(statistics, layer.index).sample, read_experts(open_source(folder), layer)
    plan = by_hand(folder, statistics)[0]
    found = choices(plan, layer, replace(sample, index_nk=torch.zeros_like(sample.index_nk)), experts)
    assert representatives(found["busiest"]).tolist() == [5, 0]
    assert found["mean"].router_KD is not None
    assert experts.router_ED is not None
    torch.testing.assert_close(found["mean"].router_KD, experts.router_ED[[0, 5]])


def test_layers_in_turn_resume_and_lie_on_disk_as_they_were_returned(
    checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    made = redirecting(folder, statistics)
    whole = conmoe.slice_plan(folder, statistics, made, tmp_path / "whole", refine_options=FEW)
    assert plan_fingerprint(conmoe.read_plan(tmp_path / "whole")) == plan_fingerprint(whole.plan)
    assert json.loads((tmp_path / "whole" / SLICE_JSON).read_text()) == whole.record.model_dump(mode="json")
    assert whole.plan.sequential == 128

    import conmoe.slicing as slicing

    once, calls = slicing.slice_layer, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(*args, **kwargs)

    monkeypatch.setattr(slicing, "slice_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        conmoe.slice_plan(folder, statistics, made, tmp_path / "killed", refine_options=FEW)
    again = conmoe.slice_plan(folder, statistics, made, tmp_path / "killed", refine_options=FEW)
    assert len(calls) == 3  # the first layer was not made again
    assert plan_fingerprint(again.plan) == plan_fingerprint(whole.plan)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_what_cannot_be_sliced_is_refused(checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path):
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    made = redirecting(folder, statistics)
    pruned = conmoe.plan(folder, statistics, request=conmoe.Request(method="reap", keep="4"))
    ragged = conmoe.plan(folder, statistics, request=replace(REDIRECTING, keep="", budget="4,5"))
    for plan, reason in (
        (pruned, "redirects no expert"),
        (ragged, "one number of experts"),
        (replace(made, statistics="other"), "was not made from these statistics"),
    ):
        with pytest.raises(UsageError, match=reason):
            conmoe.slice_plan(folder, statistics, plan, tmp_path / "out")
    with pytest.raises(UsageError, match="drawn anew only"):
        conmoe.slice_plan(folder, statistics, made, sequential=False, sample=64)
    with pytest.raises(UsageError, match="another checkpoint"):
        conmoe.slice_plan(checkpoint("mixtral"), statistics, made)
    assert not (tmp_path / "out").exists()


def test_apply_says_what_is_lost_and_slice_is_a_verb(checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path):
    from typer.testing import CliRunner

    from conmoe.cli import app

    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    conmoe.plan(folder, statistics, tmp_path / "plan", REDIRECTING)

    def run(*words: object):
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)

    applied = run("apply", folder, tmp_path / "plan", tmp_path / "dropped", "--form", "sliced")
    assert applied.exit_code == 0
    text = " ".join(applied.stderr.split())
    assert "8 experts that the plan redirects lose their router rows" in text
    assert "holds with its map only. conmoe slice" in text
    sliced = run("slice", folder, statistics, tmp_path / "plan", tmp_path / "sliced", "--refine", "refit", "--json")
    assert sliced.exit_code == 0
    record = json.loads(sliced.stdout)
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    after = run("apply", folder, tmp_path / "sliced", tmp_path / "result")
    assert "cannot redirect" not in after.stderr
    assert json.loads((tmp_path / "result" / "config.json").read_text())["num_experts"] == 4
