"""Router rows of a plan's own, in every family: asked, differentiated, written, loaded, verified."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import conmoe
from conmoe.artifacts import plan_fingerprint, read_plan
from conmoe.moe import scores_name
from conmoe.ops import plans
from conmoe.registry import Form
from conmoe.source import open_source, read_experts
from conmoe.types import ConmoeError, LayerPlan, Plan
from tests.conftest import Checkpoint
from tests.families import EXPERTS, TINY, save_tiny
from tests.results import blocks, hand_made, load, load_stock, logits, on_disk, silenced

families = pytest.mark.parametrize("family", TINY)
KEPT = [0, 2, 3, 4, 6, 7]  # three in each half, for routers with two groups


def new_rows(folder: Path) -> dict[int, Tensor]:
    """For each layer other rows of the experts that stay, as far from the old ones as these are from zero."""
    source, generator = open_source(folder), torch.Generator().manual_seed(7)
    found = {}
    for layer in source.layers:
        router_ED = read_experts(source, layer).router_ED
        assert router_ED is not None
        found[layer.index] = router_ED[KEPT] + 0.6 * torch.randn(len(KEPT), 32, generator=generator).to(router_ED)
    return found


def dropping(rows: dict[int, Tensor]) -> dict[tuple[int, ...], LayerPlan]:
    return {
        (index,): replace(plans.prune(torch.tensor(KEPT), EXPERTS), router_KD=rows_KD)
        for index, rows_KD in rows.items()
    }


def put(router: nn.Module, rows_KD: Tensor) -> None:
    """Give a router of the source model these rows."""
    router.get_parameter(scores_name(router, EXPERTS)).data[KEPT] = rows_KD


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_asked_with_its_own_rows_answers_the_same_and_can_be_differentiated(
    family: str, dtype: torch.dtype, checkpoint: Checkpoint, tmp_path: Path
):
    folder = checkpoint(family) if dtype == torch.float32 else save_tiny(family, tmp_path / family, dtype=dtype)
    source = open_source(folder)
    experts = read_experts(source, source.layers[0])
    assert experts.reroute is not None
    assert experts.router_ED is not None
    hidden, kept = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor(KEPT)
    rows_KD = experts.router_ED[KEPT].float().requires_grad_()
    index_nk, weight_nk = experts.reroute(hidden, kept, rows_KD)
    assert set(index_nk.flatten().tolist()) <= set(KEPT)
    if dtype == torch.float32:
        expected_nk, gates_nk = experts.reroute(hidden, kept)
        assert not gates_nk.requires_grad
        assert torch.equal(index_nk, expected_nk)
        assert torch.equal(weight_nk.detach(), gates_nk)
    share_n = weight_nk[:, 0] * torch.randn(40, generator=torch.Generator().manual_seed(2))
    (gradient_KD,) = torch.autograd.grad(share_n.sum(), rows_KD)
    assert torch.isfinite(gradient_KD).all()
    moved = torch.zeros(len(KEPT), 32)
    place = (int(gradient_KD.abs().sum(dim=1).argmax()), int(gradient_KD.abs().sum(dim=0).argmax()))
    moved[place] = 1e-3
    found = [experts.reroute(hidden, kept, (rows_KD + sign * moved).detach()) for sign in (1, -1)]
    assert not found[0][1].requires_grad
    if torch.equal(found[0][0], found[1][0]):
        noise_n = torch.randn(40, generator=torch.Generator().manual_seed(2))
        slope = float(((found[0][1][:, 0] - found[1][1][:, 0]) * noise_n).sum()) / 2e-3
        assert float(gradient_KD[place]) == pytest.approx(slope, rel=0.05, abs=1e-3)


@families
def test_a_router_of_few_bits_answers_wider_inputs_as_a_model_of_that_dtype_would(family: str, tmp_path: Path):
    """Calibrated in float32, a bfloat16 checkpoint is a float32 model of the same numbers."""
    folder, kept = save_tiny(family, tmp_path / family, dtype=torch.bfloat16), torch.tensor(KEPT)
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    found, expected = (
        read_experts(source, source.layers[0])
        for source in (open_source(folder), open_source(folder, dtype=torch.float32))
    )
    assert found.reroute is not None
    assert expected.reroute is not None
    for got, wanted in zip(found.reroute(hidden, kept), expected.reroute(hidden, kept), strict=True):
        torch.testing.assert_close(got, wanted)


@families
@pytest.mark.parametrize("form", ["sliced", "shared"])
def test_a_checkpoint_with_new_rows_is_the_source_with_these_rows_in_place(
    family: str, form: Form, checkpoint: Checkpoint, tmp_path: Path
):
    folder = checkpoint(family)
    rows = new_rows(folder)
    plan = hand_made(folder, dropping(rows), form=form)
    conmoe.apply(folder, plan, tmp_path / "out", form=form)
    conmoe.verify(tmp_path / "out", folder, plan, form)
    tensors = on_disk(tmp_path / "out")
    for rows_KD in rows.values():
        assert any(value.shape == rows_KD.shape and torch.equal(value, rows_KD) for value in tensors.values())
    made = (load_stock if form == "sliced" else load)(tmp_path / "out")
    stock = load_stock(folder)
    plain = {index: [1, 5] for index in rows}
    with silenced(stock, plain):
        before = logits(stock)
        for index, _, router, _ in blocks(stock):
            put(router, rows[index])
        torch.testing.assert_close(logits(made), logits(stock), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, logits(stock), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("form", ["sliced", "shared"])
def test_altered_rows_do_not_pass_the_check(family: str, form: Form, checkpoint: Checkpoint, tmp_path: Path):
    folder = checkpoint(family)
    rows = new_rows(folder)
    plan = hand_made(folder, dropping(rows), form=form)
    conmoe.apply(folder, plan, tmp_path / "out", form=form)
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if any(value.shape == each.shape and torch.equal(value, each) for each in rows.values()):
                value[2, 3] += 1e-3
                save_file(tensors, file, {"format": "pt"})
                with pytest.raises(ConmoeError, match=name):
                    conmoe.verify(tmp_path / "out", folder, plan, form)
                return
    raise AssertionError("no file holds the rows")


def test_rows_follow_the_order_of_the_prototypes(checkpoint: Checkpoint, tmp_path: Path):
    """Sliced, the row of a prototype is its representative's: of experts 0 and 5 here the latter, before that of 1."""
    folder = checkpoint("olmoe")
    rows_ED = torch.randn(EXPERTS, 32, generator=torch.Generator().manual_seed(0))
    weight_E = torch.tensor([0.2, 1.0, 1.0, 1.0, 0.0, 0.8, 1.0, 1.0])
    assignment_E = torch.tensor([0, 1, 2, 3, -1, 0, 4, 5])
    mixing_KE = torch.zeros(6, EXPERTS, dtype=torch.float64)
    for expert, number in enumerate(assignment_E.tolist()):
        if number >= 0:
            mixing_KE[number, expert] = weight_E[expert]
    left = assignment_E >= 0
    layer = LayerPlan(assignment_E, mixing_KE, torch.ones(EXPERTS, dtype=torch.float64), router_KD=rows_ED[left])
    plan = hand_made(folder, {(index.index,): layer for index in open_source(folder).layers}, form="sliced")
    conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    conmoe.verify(tmp_path / "out", folder, plan, "sliced")
    found = on_disk(tmp_path / "out")["model.layers.0.mlp.gate.weight"]
    assert torch.equal(found, rows_ED[[5, 1, 2, 3, 6, 7]])


def test_layers_of_one_scope_get_their_own_rows(checkpoint: Checkpoint, tmp_path: Path):
    folder = checkpoint("olmoe")
    rows_MD = torch.randn(2 * EXPERTS, 32, generator=torch.Generator().manual_seed(0))
    assignment_M = torch.tensor([0, 0, 1, -1, 2, 2, 3, 3, -1, 1, 0, -1, 3, 2, 1, 0])
    layer = plans.remap(torch.tensor([0, 2, 4, 6]), assignment_M)
    layer = replace(layer, router_KD=rows_MD[assignment_M >= 0])
    plan = hand_made(folder, {(0, 1): layer})
    conmoe.apply(folder, plan, tmp_path / "out", form="shared")
    conmoe.verify(tmp_path / "out", folder, plan, "shared")
    found = on_disk(tmp_path / "out")
    for index, rows_ED in enumerate(rows_MD.split(EXPERTS)):
        own = assignment_M[index * EXPERTS : (index + 1) * EXPERTS] >= 0
        assert torch.equal(found[f"model.layers.{index}.mlp.gate.weight"], rows_ED[own])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("method", ["reap", "conmoe"])
def test_reconstruction_from_the_statistics_to_a_verified_checkpoint(
    family: str, method: str, checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path
):
    folder = checkpoint(family)
    options = {"steps": 5, "rate": 0.01}
    request = conmoe.Request(method=method, refine="reconstruct", refine_options=options, form="sliced")
    made = conmoe.plan(folder, calibrated(family), tmp_path / "plan", request=request)
    plain = conmoe.plan(folder, calibrated(family), request=replace(request, refine="none", refine_options=None))
    told = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert told["refine"] == "reconstruct"
    assert told["refine_options"] == {"steps": 5, "batch": 2048, "rate": 0.01, "router": True, "seed": 0}
    assert same(read_plan(tmp_path / "plan"), made)
    refined = [scope.plan for scope in made.scopes if scope.plan.router_KD is not None]
    assert refined
    assert all("gate_EID" in each.weights for each in refined)
    assert len(plain.scopes) == len(made.scopes)
    conmoe.apply(folder, made, tmp_path / "out", form="sliced")
    conmoe.verify(tmp_path / "out", folder, made, "sliced")
    stored = on_disk(tmp_path / "out").values()
    for each in refined:
        rows_KD = each.router_KD
        assert rows_KD is not None
        assert any(value.shape == rows_KD.shape and torch.equal(value, rows_KD) for value in stored)
    assert torch.isfinite(logits(load_stock(tmp_path / "out"))).all()


def same(one: Plan, other: Plan) -> bool:
    return plan_fingerprint(one) == plan_fingerprint(other)
