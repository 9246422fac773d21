"""Light tuning: what may change and what may not, against a plain loop; resuming; the record; what is refused."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention

import conmoe
from conmoe.demo import demo_model
from conmoe.ops import plans
from conmoe.report.sections import BEGIN
from conmoe.source import open_source
from conmoe.tune import Tuning, check, distillation_loss, tune, tuned_parameters
from conmoe.types import LayerPlan, Plan
from tests.commands import tree
from tests.conftest import token_data
from tests.families import EXPERTS, save_tiny
from tests.results import hand_made, load, logits, on_disk
from tests.test_compress import Quiet

#: Family and form of a result, each layout of experts on disk and each kind of router among them.
RESULTS = (
    ("olmoe", "shared"),
    ("mixtral", "sliced"),
    ("qwen3_moe", "expanded"),
    ("deepseek_v3", "shared"),
    ("gpt_oss", "sliced"),
    ("ernie4_5_moe", "shared"),
    pytest.param("gpt_oss", "expanded", marks=pytest.mark.slow),
    pytest.param("granitemoe", "shared", marks=pytest.mark.slow),
    pytest.param("phimoe", "shared", marks=pytest.mark.slow),
    pytest.param("qwen3_next", "sliced", marks=pytest.mark.slow),
    pytest.param("minimax_m2", "shared", marks=pytest.mark.slow),
    pytest.param("deepseek", "shared", marks=pytest.mark.slow),
)
ROUTED_EXPERTS = re.compile(r"\.experts\.|block_sparse_moe\.(input|output)_linear")
ROUTER = re.compile(r"\.(gate|router|router\.layer)\.(weight|bias)$")
#: Every second expert answers for its neighbour, too.
PAIRS = plans.remap(torch.arange(0, EXPERTS, 2), torch.arange(EXPERTS) // 2)
FAST = Tuning(learning_rate=1e-2, batch=4, save_steps=2)


def text(sequences=12, seed=0):
    return token_data(sequences, 24, seed)


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """The Trainer collects garbage over and over, which costs seconds among all that a test run holds."""
    gc.freeze()
    yield
    gc.unfreeze()


class Mortal(Quiet):
    """Fails after so many steps of tuning, by a function of the test's choice."""

    def __init__(self, steps, fail):
        super().__init__()
        self.left, self.fail = steps, fail

    def __enter__(self):
        advance = super().__enter__()

        def count(done, total=None):
            advance(done, total)
            self.left -= done
            if self.stages[-1] == "tune" and self.left == 0:
                self.fail()

        return count


@pytest.fixture(scope="session")
def compressed(checkpoint, tmp_path_factory):
    """``compressed(family, form)``: a result at half of the experts; never written to."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, form: str) -> Path:
        if (family, form) not in made:
            out = made[family, form] = tmp_path_factory.mktemp("compressed") / f"{family}-{form}"
            layers = open_source(checkpoint(family)).layers
            half = plans.prune(torch.arange(0, EXPERTS, 2), EXPERTS) if form == "sliced" else PAIRS
            plan = hand_made(checkpoint(family), {(layer.index,): half for layer in layers})
            conmoe.apply(checkpoint(family), plan, out, form=form)
        return made[family, form]

    return get


def changed(before: Path, after: Path) -> set[str]:
    """The tensors that differ; all else about the two checkpoints' weights must be equal, down to the headers."""
    old, new = open_source(before).entries, open_source(after).entries
    assert [(e.name, e.dtype, e.shape, e.file.name, e.start) for e in old.values()] == [
        (e.name, e.dtype, e.shape, e.file.name, e.start) for e in new.values()
    ]
    a, b = on_disk(before), on_disk(after)
    return {name for name in a if a[name].view(torch.uint8).ne(b[name].view(torch.uint8)).any()}


def plain_loop(model, names, loss, ids, options, steps):
    """What tuning is, written out: AdamW on these parameters of the loaded model, one batch, a falling rate."""
    rising = math.ceil(options.warmup * steps)
    model.requires_grad_(False)
    parameters = [model.get_parameter(name).requires_grad_(True) for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = options.learning_rate * (
            step / rising if step < rising else (steps - step) / (steps - rising)
        )
        optimizer.zero_grad()
        loss(model(ids).logits).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in zip(names, parameters, strict=True)}


@pytest.mark.parametrize(("family", "form"), RESULTS)
def test_experts_and_nothing_else(family, form, compressed, tmp_path):
    model, out = compressed(family, form), tmp_path / "out"
    tuned = tune(model, out, text(), FAST, Quiet())
    experts = {name for name in on_disk(model) if ROUTED_EXPERTS.search(name)}
    used = changed(model, out)
    assert used <= experts
    assert len(used) > len(experts) / 2  # an expert that no token chose stays as it was
    assert tuned.steps == len(tuned.losses) == 3
    assert tuned.parameters == sum(on_disk(model)[name].numel() for name in experts)
    same = {
        name: data
        for name, data in tree(model).items()
        if not name.endswith((".safetensors", ".conmoe", "README.md", "conmoe/manifest.json"))
    }
    assert {name: tree(out)[name] for name in same} == same
    load(out)
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(("family", "form"), RESULTS)
def test_routers_and_nothing_else(family, form, compressed, checkpoint, tmp_path):
    model, out = compressed(family, form), tmp_path / "out"
    options = replace(FAST, mode="router", epochs=4)
    tuned = tune(model, out, text(), options, Quiet(), against=checkpoint(family), held_out=text(seed=5))
    routers = {name for name in on_disk(model) if ROUTER.search(name)}
    assert changed(model, out) == routers
    assert tuned.parameters == sum(on_disk(model)[name].numel() for name in routers)
    kl = [conmoe.evaluate(each, text(), against=checkpoint(family)).kl.value for each in (model, out)]
    assert kl[1] < kl[0]
    assert tuned.losses[0] == pytest.approx(kl[0], rel=0.5)
    assert tuned.before == conmoe.evaluate(model, text(seed=5), against=checkpoint(family))
    assert tuned.after == conmoe.evaluate(out, text(seed=5), against=checkpoint(family))


@pytest.mark.parametrize(("family", "form"), [("olmoe", "shared"), ("gpt_oss", "sliced"), ("mixtral", "sliced")])
@pytest.mark.parametrize("mode", ["experts", "router"])
def test_it_is_adamw_on_the_loss(mode, family, form, compressed, checkpoint, tmp_path):
    model, ids = compressed(family, form), text().ids_NS
    options = replace(FAST, mode=mode, batch=12, epochs=3, temperature=2.0, warmup=0.3 if mode == "router" else 0.0)
    teacher = load(checkpoint(family)) if mode == "router" else None

    def loss(out):
        if teacher is None:
            return nn.functional.cross_entropy(out[:, :-1].reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1))
        target = (logits(teacher, ids) / 2).log_softmax(-1).flatten(0, 1)
        score = (out / 2).log_softmax(-1).flatten(0, 1)
        return 4 * nn.functional.kl_div(score, target, log_target=True, reduction="batchmean")

    source = open_source(model)
    names = tuned_parameters(source, conmoe.read_plan(model / "conmoe"), mode)
    expected = plain_loop(load(model), names, loss, ids, options, 3)
    tune(model, tmp_path / "out", text(), options, Quiet(), against=checkpoint(family))
    found = load(tmp_path / "out")
    for name, value in expected.items():
        torch.testing.assert_close(found.get_parameter(name).detach(), value, atol=1e-4, rtol=0)
        assert (value - load(model).get_parameter(name)).abs().max() > 1e-2


def test_layers_that_the_plan_left_alone_stay(checkpoint, tmp_path):
    plan = hand_made(checkpoint("olmoe"), {(0,): plans.identity(EXPERTS), (1,): PAIRS})
    conmoe.apply(checkpoint("olmoe"), plan, tmp_path / "one")
    tune(tmp_path / "one", tmp_path / "out", text(), FAST, Quiet())
    found = changed(tmp_path / "one", tmp_path / "out")
    assert found
    assert all(".layers.1.mlp.experts." in name for name in found)
    only = hand_made(checkpoint("olmoe"), {(1,): PAIRS})
    assert tuned_of(checkpoint("olmoe"), only) == tuned_of(checkpoint("olmoe"), plan)


def tuned_of(folder: Path, plan: Plan):
    return tuned_parameters(open_source(folder), plan, "experts")


def test_a_gain_is_a_change(checkpoint):
    same = plans.identity(EXPERTS)
    louder = replace(same, gain_E=torch.full((EXPERTS,), 1.5))
    names = tuned_of(checkpoint("olmoe"), hand_made(checkpoint("olmoe"), {(0,): same, (1,): louder}))
    assert names
    assert all(".layers.1." in name for name in names)


def test_a_pool_that_layers_share_is_tuned_once_for_all(checkpoint, tmp_path):
    pool = plans.remap(torch.arange(4), torch.arange(2 * EXPERTS) % 4)
    plan = hand_made(checkpoint("olmoe"), {(0, 1): pool})
    conmoe.apply(checkpoint("olmoe"), plan, tmp_path / "pool")
    names = tuned_of(tmp_path / "pool", plan)
    assert names
    assert all(".layers.0." in name for name in names)
    ids = text().ids_NS

    def loss(out):
        return nn.functional.cross_entropy(out[:, :-1].reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1))

    expected = plain_loop(load(tmp_path / "pool"), names, loss, ids, FAST, 1)
    tune(tmp_path / "pool", tmp_path / "out", text(), replace(FAST, batch=12), Quiet())
    found = load(tmp_path / "out")
    for name, value in expected.items():
        torch.testing.assert_close(found.get_parameter(name).detach(), value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_condensed_layer_is_tuned_with_its_shared_experts(family, checkpoint, tmp_path):
    layers = open_source(checkpoint(family)).layers
    first, last = layers[0], layers[-1]
    mixing_KE = torch.eye(EXPERTS, dtype=torch.float64)[:2]
    condensed = LayerPlan(torch.full((EXPERTS,), -1), mixing_KE, torch.ones(EXPERTS), static_K=torch.tensor([0.4, 0.3]))
    plan = hand_made(checkpoint(family), {(first.index,): plans.identity(EXPERTS), (last.index,): condensed})
    conmoe.apply(checkpoint(family), plan, tmp_path / "model")
    tune(tmp_path / "model", tmp_path / "out", text(), FAST, Quiet())
    expected = {name for name in on_disk(tmp_path / "model") if name.startswith(f"{last.block}.")}
    expected.remove(f"{last.router}.static_gate")
    assert any("shared_expert" in name for name in expected)
    assert changed(tmp_path / "model", tmp_path / "out") == expected
    load(tmp_path / "out")

    everywhere = hand_made(checkpoint(family), {(layer.index,): condensed for layer in layers})
    conmoe.apply(checkpoint(family), everywhere, tmp_path / "routerless")
    router = replace(FAST, mode="router")
    with pytest.raises(conmoe.UsageError, match="no router is left"):
        tune(tmp_path / "routerless", tmp_path / "no", text(), router, Quiet(), against=checkpoint(family))


def test_bfloat16_keeps_its_master_weights_in_float32(tmp_path):
    """Steps of 1e-4 on weights above 0.13 are below what bfloat16 can tell apart, but many of them add up."""
    model = save_tiny("olmoe", tmp_path / "model", dtype=torch.bfloat16)
    plan = hand_made(model, {(0,): PAIRS})
    conmoe.apply(model, plan, tmp_path / "half")
    options = replace(FAST, learning_rate=1e-4, epochs=10, dtype=torch.bfloat16)
    tune(tmp_path / "half", tmp_path / "out", text(), options, Quiet())
    before, after = on_disk(tmp_path / "half"), on_disk(tmp_path / "out")
    names = [name for name in before if ".layers.0." in name and ROUTED_EXPERTS.search(name)]
    large = {name: before[name].abs() > 0.13 for name in names}  # whose neighbours are 1e-3 away
    moved = [bool(hit) for name in names for hit in (after[name] != before[name])[large[name]]]
    assert sum(moved) > len(moved) / 4
    assert all(after[name].dtype == torch.bfloat16 for name in names)


def test_checkpointed_gradients_are_the_same(compressed, tmp_path, monkeypatch):
    model, passes = compressed("olmoe", "shared"), []
    stock = OlmoeAttention.forward

    def counted(self, *args, **kwargs):
        passes.append(self)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(OlmoeAttention, "forward", counted)
    for name, saving in (("a", False), ("b", True)):
        options = replace(FAST, gradient_checkpointing=saving, dtype=torch.bfloat16)
        tune(model, tmp_path / name, text(), options, Quiet())
    assert len(passes) == 3 * 2 + 3 * 2 * 2  # steps, layers, and once more for the gradients
    assert changed(tmp_path / "a", tmp_path / "b") == set()


# Seeds, and runs that are killed -------------------------------------------------------------------------------------


def global_states():
    return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


def test_the_seed_decides_and_no_global_generator_moves(compressed, tmp_path):
    model = compressed("olmoe", "shared")
    states = global_states()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune(model, tmp_path / name, text(), replace(FAST, seed=seed), Quiet())
    assert global_states() == states
    assert changed(tmp_path / "a", tmp_path / "b") == set()
    assert changed(tmp_path / "a", tmp_path / "c") != set()


def fail():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("mode", "steps"), [("experts", 1), ("experts", 5), ("router", 6)])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(mode, steps, compressed, checkpoint, tmp_path):
    model, against = compressed("olmoe", "shared"), checkpoint("olmoe")
    options = replace(FAST, mode=mode, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path / "out", text(), options, Mortal(steps, fail), against=against, held_out=text(4, 5))
    assert not (tmp_path / "out").exists()
    again = Quiet()
    tune(model, tmp_path / "out", text(), options, again, against=against, held_out=text(4, 5))
    assert again.done["tune"] == [6, 6]
    tune(model, tmp_path / "once", text(), options, Quiet(), against=against, held_out=text(4, 5))
    assert tree(tmp_path / "out") == tree(tmp_path / "once")
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "once"}


def test_what_was_trained_is_not_trained_again(compressed, tmp_path):
    model = compressed("olmoe", "shared")
    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path / "out", text(), FAST, Mortal(3, fail))
    seen = []

    class Listening(Mortal):
        def stage(self, name, total, unit):
            seen.append(name)
            return super().stage(name, total, unit)

    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path / "out", text(), FAST, Listening(2, fail))  # the first it hears is: two were done
    assert seen == ["tune"]
    other = Quiet()
    tune(model, tmp_path / "out", text(), replace(FAST, seed=7), other)  # another run does not go on from them
    tune(model, tmp_path / "once", text(), replace(FAST, seed=7), Quiet())
    assert tree(tmp_path / "out") == tree(tmp_path / "once")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def until(steps, model, out, options):
    """Tune in a process that kills itself after so many steps."""
    tune(model, out, text(), options, Mortal(steps, kill))


@pytest.mark.slow
def test_a_run_killed_again_and_again_still_ends_the_same(compressed, tmp_path):
    model, options = compressed("olmoe", "shared"), replace(FAST, epochs=3, save_steps=1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_tune"])
    for steps in (2, 4, 7):
        process = context.Process(target=until, args=(steps, model, tmp_path / "out", options))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    tune(model, tmp_path / "out", text(), options, Quiet())
    tune(model, tmp_path / "once", text(), options, Quiet())
    assert tree(tmp_path / "out") == tree(tmp_path / "once")


def test_half_of_a_checkpoint_is_not_taken_up(compressed, tmp_path):
    model, options = compressed("olmoe", "shared"), replace(FAST, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path / "out", text(), options, Mortal(3, fail))
    last = tmp_path / "out.partial" / "training" / "checkpoint-2"
    (last / "complete").unlink()
    (last / "optimizer.pt").write_bytes(b"cut off")
    tune(model, tmp_path / "out", text(), options, Quiet())
    tune(model, tmp_path / "once", text(), options, Quiet())
    assert tree(tmp_path / "out") == tree(tmp_path / "once")


# The record ----------------------------------------------------------------------------------------------------------


def test_the_record_the_card_and_what_is_said_of_the_old_weights(checkpoint, compressed, tmp_path):
    model = shutil.copytree(compressed("olmoe", "shared"), tmp_path / "model")
    results = {"output": str(model), "fidelity": {"kl": 1.0}, "calibration_documents": ["document"]}
    conmoe.write_json(model / "conmoe" / "results.json", results)
    tuned = tune(model, tmp_path / "once", text(), FAST, Quiet(), held_out=text(4, 5))
    record = json.loads((tmp_path / "once" / "conmoe" / "tuning.json").read_text())
    assert record["mode"] == "experts"
    assert record["options"]["learning_rate"] == 1e-2
    assert record["steps"] == 3
    assert record["losses"] == list(tuned.losses)
    assert record["data"]["fingerprint"] == text().fingerprint
    assert record["data"]["documents"] == ["document"]
    assert record["before"]["loss"]["value"] == tuned.before.loss.value
    assert record["after"]["loss"]["value"] == tuned.after.loss.value
    assert record["previous"] is record["against"] is None
    assert record["versions"].keys() == {"conmoe", "torch", "transformers", "accelerate"}
    assert record["tuned"] == [f"model.layers.{i}.mlp.experts.{n}_proj" for i in (0, 1) for n in ("down", "gate_up")]
    card = (tmp_path / "once" / "README.md").read_text()
    before = (model / "README.md").read_text()
    # Its body stays; metadata, and what was measured of the old weights, are not the result's.
    body = [text.split("---\n", 2)[2].partition(BEGIN)[0] for text in (before, card)]
    assert body[0] == body[1] != before
    assert f"loss {tuned.after.loss.value:.4f}" in card
    told = json.loads((tmp_path / "once" / "conmoe" / "results.json").read_text())
    assert told == {**results, "output": str(tmp_path / "once"), "fidelity": None}
    # And once more, of the routers.
    options = replace(FAST, mode="router")
    tune(tmp_path / "once", tmp_path / "twice", text(), options, Quiet(), against=checkpoint("olmoe"))
    again = json.loads((tmp_path / "twice" / "conmoe" / "tuning.json").read_text())
    assert again["previous"] == record
    assert (tmp_path / "twice" / "README.md").read_text().count("## Tuned after compression") == 2


def test_a_teacher_that_is_not_the_source_is_noted(compressed, checkpoint, tmp_path):
    other, progress = save_tiny("olmoe", tmp_path / "other", seed=3), Quiet()
    tune(compressed("olmoe", "shared"), tmp_path / "out", text(), replace(FAST, mode="router"), progress, against=other)
    assert "is not the checkpoint" in progress.notes[0]
    tune(compressed("olmoe", "shared"), tmp_path / "a", text(), FAST, progress, against=checkpoint("olmoe"))
    assert len(progress.notes) == 1


def test_a_token_that_the_teacher_rules_out_counts_nothing():
    target = torch.tensor([[[0.0, 1.0, -torch.inf]]])
    given = torch.tensor([[[0.5, 0.5, 2.0]]], requires_grad=True)
    p, q = target.softmax(-1)[0, 0], given.detach().softmax(-1)[0, 0]
    expected = sum(p[i] * (p[i] / q[i]).log() for i in (0, 1))
    loss = distillation_loss(given, target, 1.0)
    torch.testing.assert_close(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, given)
    torch.testing.assert_close(gradient[0, 0], q - p)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "router"}, "--against SOURCE"),
        ({"mode": "all"}, "experts, router or prune"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"temperature": 0.0}, "temperature"),
        ({"batch": 0}, "start at 1"),
        ({"epochs": 0}, "start at 1"),
        ({"warmup": 1.0}, "share below 1"),
        ({"batch": 13}, "12 sequences of 24 tokens, too short for a batch of 13"),
        ({"dtype": torch.float16}, "bfloat16 or float32"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_request_that_cannot_be_met(change, words, compressed, tmp_path):
    with pytest.raises(conmoe.UsageError, match=words):
        tune(compressed("olmoe", "shared"), tmp_path / "out", text(), replace(FAST, **change), Quiet())
    assert not list(tmp_path.iterdir())


def test_a_model_or_text_that_does_not_fit(compressed, checkpoint, tmp_path):
    model, source, out = compressed("olmoe", "shared"), checkpoint("olmoe"), tmp_path / "out"
    router = replace(FAST, mode="router")
    with pytest.raises(conmoe.UsageError, match="holds no plan"):
        tune(source, out, text(), FAST, Quiet())
    with pytest.raises(conmoe.UsageError, match="holds no plan"):
        check(source, out, FAST)
    small = save_tiny("olmoe", tmp_path / "small", vocab_size=255)
    beyond = replace(text(4, 5), ids_NS=text(4, 5).ids_NS + 200)
    with pytest.raises(conmoe.UsageError, match="vocabularies"):
        tune(model, out, text(), router, Quiet(), against=small)
    with pytest.raises(conmoe.UsageError, match="vocabulary"):
        tune(model, out, beyond, FAST, Quiet())
    with pytest.raises(conmoe.UsageError, match="vocabulary"):
        tune(model, out, text(), FAST, Quiet(), held_out=beyond)
    with pytest.raises(conmoe.UsageError, match="sequences that are trained on"):
        tune(model, out, text(), FAST, Quiet(), held_out=replace(text(4), ids_NS=text().ids_NS[3:5]))
    with pytest.raises(conmoe.UsageError, match="lies in the source"):
        tune(model, model / "out", text(), FAST, Quiet())
    with pytest.raises(conmoe.UsageError, match="exists"):
        tune(model, tmp_path / "small", text(), FAST, Quiet())
    same = hand_made(source, {(0,): plans.identity(EXPERTS), (1,): plans.identity(EXPERTS)})
    conmoe.apply(source, same, tmp_path / "same")
    with pytest.raises(conmoe.UsageError, match="changes no experts"):
        tune(tmp_path / "same", out, text(), FAST, Quiet())
    assert not out.exists()


def test_without_accelerate_the_extra_is_named(compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("conmoe.tune.options"), "is_accelerate_available", lambda: False)
    with pytest.raises(conmoe.UsageError, match=re.escape('pip install "conmoe[tune]"')):
        tune(compressed("olmoe", "shared"), tmp_path / "out", text(), FAST, Quiet())


def test_a_loss_that_explodes_ends_the_run(compressed, tmp_path):
    with pytest.raises(conmoe.ConmoeError, match="The loss is nan after 2 steps"):
        tune(compressed("olmoe", "shared"), tmp_path / "out", text(), replace(FAST, learning_rate=1e30), Quiet())
    assert not (tmp_path / "out").exists()


def test_weights_beyond_what_the_checkpoint_can_hold_end_the_run(tmp_path):
    model = save_tiny("olmoe", tmp_path / "model", dtype=torch.float16)
    conmoe.apply(model, hand_made(model, {(0,): PAIRS}), tmp_path / "half")
    with pytest.raises(conmoe.ConmoeError, match="not finite"):
        tune(tmp_path / "half", tmp_path / "out", text(), replace(FAST, batch=12, learning_rate=1e6), Quiet())
    assert not (tmp_path / "out").exists()


# A trained model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["experts", "router"])
def test_a_trained_model_gets_better_on_text_it_has_not_seen(mode, tmp_path):
    model = demo_model()
    tokenizer = conmoe.load_tokenizer(model)
    data = conmoe.load_tokens(tokenizer, [], tokens=32768, seq_len=256)
    held_out = conmoe.load_tokens(tokenizer, [], tokens=8192, seq_len=256, part="evaluation")
    conmoe.calibrate(model, tmp_path / "statistics", data)
    plan = conmoe.plan(model, tmp_path / "statistics", None, conmoe.Request(keep="0.25"))
    conmoe.apply(model, plan, tmp_path / "quarter")
    options = Tuning(mode, learning_rate=1e-3, epochs=2)
    tuned = tune(tmp_path / "quarter", tmp_path / "out", data, options, Quiet(), against=model, held_out=held_out)
    assert tuned.after.kl.value < tuned.before.kl.value - 0.3
    assert tuned.after.loss.value < tuned.before.loss.value - 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["experts", "router"])
def test_on_a_gpu_in_bfloat16(mode, compressed, checkpoint, tmp_path):
    model = compressed("olmoe", "shared")
    options = replace(FAST, mode=mode, epochs=4, device="cuda", gradient_checkpointing=True)
    tuned = tune(model, tmp_path / "out", text(), options, Quiet(), against=checkpoint("olmoe"))
    assert tuned.losses[-1] < tuned.losses[0]
    assert all(ROUTED_EXPERTS.search(name) or ROUTER.search(name) for name in changed(model, tmp_path / "out"))
