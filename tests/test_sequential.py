"""Layers planned one after the other: each sees what the compressed layers before it let through."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import conmoe
from conmoe.artifacts import plan_fingerprint, read_layer, read_manifest, read_tokens
from conmoe.calibrate import draw
from conmoe.forms import without_map
from conmoe.observe import IMPLEMENTATION
from conmoe.ops import plans
from conmoe.registry import get_method
from conmoe.sequential import open_passage
from conmoe.source import open_source, read_experts
from conmoe.types import Plan, ScopePlan, sample_tensors
from tests.conftest import Checkpoint, token_data
from tests.families import EXPERTS, TINY, save_tiny
from tests.results import by_layer, load

SEQUENTIAL = conmoe.Request(method="naee", options={"tokens": 64}, sequential=True, form="shared")


class Stop(Exception):
    pass


def statistics_on_the_way(
    folder: Path, statistics: Path, first: Plan, work: Path
) -> list[conmoe.types.LayerStatistics]:
    source = open_source(folder)
    passage = open_passage(source, read_tokens(statistics), read_manifest(statistics), work, device="cpu")
    found = []
    for layer in source.layers:
        found.append(passage.statistics(layer))
        scope = next((scope for scope in first.scopes if scope.layers == (layer.index,)), None)
        if scope:
            passage.follow(scope, lambda scopes: first)
    return found


@pytest.mark.parametrize("family", TINY)
def test_a_layer_sees_what_a_written_checkpoint_would_send_it(family, checkpoint, calibrated, tmp_path):
    """The second MoE layer's statistics are those of a calibration of the checkpoint whose first one is compressed."""
    folder, statistics = checkpoint(family), calibrated(family)
    first, *_, last = open_source(folder).layers
    request = conmoe.Request(method="reap", layers=str(first.index), form="shared")
    plan = conmoe.plan(folder, statistics, request=request)
    seen = statistics_on_the_way(folder, statistics, plan, tmp_path / "work")

    conmoe.apply(folder, plan, tmp_path / "half", form="shared")
    source = open_source(tmp_path / "half", experts_implementation=IMPLEMENTATION)
    passage = open_passage(source, read_tokens(statistics), read_manifest(statistics), tmp_path / "again", device="cpu")
    expected = passage.statistics(source.layers[-1])
    assert seen[0].tokens == seen[-1].tokens
    for name, value in expected.sums.items():
        torch.testing.assert_close(seen[-1].sums[name], value, rtol=1e-4, atol=1e-4, msg=name)
    one_shot = read_layer(statistics, last.index)
    assert not torch.allclose(seen[-1].sums["gate_norm"], one_shot.sums["gate_norm"])
    for name, value in sample_tensors(read_layer(statistics, first.index).sample).items():
        torch.testing.assert_close(sample_tensors(seen[0].sample)[name], value, msg=name)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "granitemoe"])
def test_drift_is_what_the_source_has_after_a_layer_and_its_layer_does_not_give(
    family, checkpoint, calibrated, tmp_path
):
    """Against whole models in memory: the second MoE layer of the source on what the compressed first lets through."""
    folder, statistics = checkpoint(family), calibrated(family)
    first, *_, last = open_source(folder).layers
    plan = conmoe.plan(
        folder, statistics, request=conmoe.Request(method="reap", layers=str(first.index), form="shared")
    )
    source, ids_NS, manifest = open_source(folder), read_tokens(statistics), read_manifest(statistics)
    passage = open_passage(source, ids_NS, manifest, tmp_path / "work", device="cpu", drift=True)
    assert passage.statistics(first).sample.drift_nD is None
    passage.follow(plan.scopes[0], lambda scopes: plan)
    found = passage.statistics(last).sample

    conmoe.apply(folder, plan, tmp_path / "half", form="shared")
    models = [load(folder), load(tmp_path / "half")]
    arriving, wanted = [], []

    def note(module, args, kwargs, out):
        arriving.append((args, kwargs))
        wanted.append(out)

    for model in models:
        hook = model.get_submodule(last.decoder).register_forward_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(input_ids=ids_NS, use_cache=False)
        hook.remove()
    with torch.no_grad():
        args, kwargs = arriving[1]
        given = models[0].get_submodule(last.decoder)(*args, **kwargs)
    drift_NSD = wanted[0] - given
    N, S = ids_NS.shape
    chosen = draw(N, S, manifest.sample, manifest.seed)[0].flatten().argsort()[: manifest.sample]
    expected_nD = drift_NSD.flatten(0, 1)[chosen]
    assert float(expected_nD.norm()) > 0
    torch.testing.assert_close(found.drift_nD, expected_nD.float(), rtol=1e-3, atol=1e-5)

    killed = open_passage(source, ids_NS, manifest, tmp_path / "work", device="cpu", drift=True)
    torch.testing.assert_close(killed.statistics(last).sample.drift_nD, found.drift_nD, rtol=0, atol=0)


def test_unchanged_layers_let_everything_through(checkpoint, calibrated, tmp_path):
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    request = conmoe.Request(method="conmoe", keep=str(EXPERTS), sequential=True)
    plan = conmoe.plan(folder, statistics, tmp_path / "plan", request)
    assert all(layer.assignment_E.tolist() == list(range(EXPERTS)) for layer in by_layer(plan).values())


def test_sequential_plans_differ_from_the_second_layer_on_and_resume(
    checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path
):
    folder, statistics = checkpoint("qwen3_moe"), calibrated("qwen3_moe")
    whole = conmoe.plan(folder, statistics, tmp_path / "whole", SEQUENTIAL)
    assert sorted(file.name for file in (tmp_path / "whole").iterdir()) == [".conmoe", "plan.json", "plan.safetensors"]

    class StopAfterOne:
        def note(self, text: str) -> None: ...

        def stage(self, name: str, total: int, unit: str):
            from contextlib import nullcontext

            def advance(amount: int) -> None:
                raise Stop

            return nullcontext(advance)

    with pytest.raises(Stop):
        conmoe.plan(folder, statistics, tmp_path / "cut", SEQUENTIAL, progress=StopAfterOne())
    assert (tmp_path / "cut.partial").is_dir()
    resumed = conmoe.plan(folder, statistics, tmp_path / "cut", SEQUENTIAL)
    in_memory = conmoe.plan(folder, statistics, None, SEQUENTIAL)
    for other in (resumed, in_memory):
        for mine, its in zip(whole.scopes, other.scopes, strict=True):
            assert torch.equal(mine.plan.assignment_E, its.plan.assignment_E)
            assert mine.plan.predicted_error == its.plan.predicted_error
    at_once = conmoe.plan(
        folder, statistics, None, conmoe.Request(method="naee", options={"tokens": 64}, form="shared")
    )
    errors = [[scope.plan.predicted_error for scope in plan.scopes] for plan in (whole, at_once)]
    assert errors[0][0] == errors[1][0]
    assert errors[0][1] != errors[1][1]


@pytest.mark.parametrize("step", range(4))
def test_a_run_that_stops_while_it_clears_up_ends_with_the_same_plan(
    step, checkpoint, calibrated, tmp_path, monkeypatch
):
    """The text's passage and two layers go; it stops in the midst of one of them."""
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    whole = conmoe.plan(folder, statistics, tmp_path / "whole", SEQUENTIAL)
    left, delete = step, shutil.rmtree

    def stop_half_way(path, **options):
        nonlocal left
        left -= Path(path).parent == tmp_path / "plan.partial"
        if left < 0:
            next(file for file in path.rglob("*") if file.is_file()).unlink()
            raise Stop
        delete(path, **options)

    with monkeypatch.context() as patched, suppress(Stop):
        patched.setattr(shutil, "rmtree", stop_half_way)
        conmoe.plan(folder, statistics, tmp_path / "plan", SEQUENTIAL)
    again = conmoe.plan(folder, statistics, tmp_path / "plan", SEQUENTIAL, force=True)
    assert plan_fingerprint(again) == plan_fingerprint(whole)
    assert not [part for part in (tmp_path / "plan").iterdir() if part.is_dir()]


def test_a_walk_that_was_killed_goes_on_where_it_stopped(tmp_path):
    """Layers that nobody plans lie between; two files hold the text, so that each layer overwrites the last but one."""
    folder = save_tiny("olmoe", tmp_path / "model", num_hidden_layers=5)
    conmoe.calibrate(folder, tmp_path / "stats", token_data(), conmoe.Calibration(sample=64, batch=4))
    ids_NS, manifest = read_tokens(tmp_path / "stats"), read_manifest(tmp_path / "stats")

    def opened(name: str):
        return open_passage(open_source(folder), ids_NS, manifest, tmp_path / name, device="cpu", drift=True)

    def stop(module: torch.nn.Module, _: object) -> None:
        if not next(module.parameters()).is_meta:  # it is asked for its arguments first
            raise Stop

    layers = open_source(folder).layers
    cut = opened("cut")
    cut.statistics(layers[1])
    hook = cut._source.model.get_submodule(layers[3].decoder).register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        cut.statistics(layers[4])
    hook.remove()
    found, expected = (opened(name).statistics(layers[4]) for name in ("cut", "whole"))
    for name, value in expected.sums.items():
        assert torch.equal(found.sums[name], value), name


def test_the_text_passes_layers_as_they_are_stored(checkpoint, calibrated, tmp_path):
    """Sliced, a map is lost: the second layer sees what a sliced first one lets through."""
    folder, statistics = checkpoint("olmoe"), calibrated("olmoe")
    made = conmoe.plan(
        folder,
        statistics,
        tmp_path / "plan",
        conmoe.Request(method="conmoe", form="sliced", sequential=True),
    )
    whole = ScopePlan((1,), plans.identity(EXPERTS))
    first = replace(made, scopes=(replace(made.scopes[0], plan=without_map(made.scopes[0].plan)), whole))
    source, ids_NS, manifest = open_source(folder), read_tokens(statistics), read_manifest(statistics)
    passage = open_passage(source, ids_NS, manifest, tmp_path / "work", device="cpu")
    passage.follow(first.scopes[0], lambda scopes: first)
    known = passage.statistics(source.layers[1])
    held_E = made.scopes[1].plan.mixing_KE.argmax(1)
    again = get_method("conmoe").function(known, read_experts(source, source.layers[1]), len(held_E), **made.options)
    assert again.predicted_error == pytest.approx(made.scopes[1].plan.predicted_error)
    assert torch.equal(again.mixing_KE.argmax(1), held_E)


def test_a_plan_says_on_how_many_tokens_it_was_made(checkpoint, calibrated):
    for sample, used in ((64, 64), (100_000, token_data().tokens)):
        request = conmoe.Request(method="frequency", sequential=True, sample=sample)
        assert conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), request=request).sequential == used


def test_what_cannot_be_sequential_is_refused(checkpoint, calibrated, tmp_path):
    with pytest.raises(conmoe.UsageError, match="--scope 1 with --sequential"):
        conmoe.plan(
            checkpoint("olmoe"), calibrated("olmoe"), request=conmoe.Request(scope=2, sequential=True, form="shared")
        )


def test_compress_takes_it(checkpoint, tmp_path):
    result = conmoe.compress(
        checkpoint("deepseek_v3"),
        tmp_path / "out",
        tmp_path / "work",
        token_data(),
        conmoe.Request(method="conmoe", sequential=True),
        conmoe.progress.SILENT,
        calibration=conmoe.Calibration(sample=64),
        held_out=token_data(2, seed=3),
    )
    assert result.fidelity is not None
    assert result.fidelity.kl is not None
    assert result.fidelity.kl.value > 0
