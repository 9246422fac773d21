"""Bad input: one sentence, the right exit code, and nothing on disk that was not there before."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import conmoe
from tests.commands import OWN, runner, tree, write_text
from tests.families import TINY, save_tiny, tiny_model, tiny_tokenizer

SMALL = ("--tokens", "256", "--seq-len", "32")


@pytest.fixture
def run(capsys):
    return runner(capsys)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory with a text, so that whatever is written shows."""
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def one_sentence(done, code, *parts):
    """``done`` failed with ``code`` and said so in one line that names ``parts``."""
    (line,) = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert done.err.splitlines()[-1] == line, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "--debug" not in line, line  # which is what an error that nobody thought of says
    for part in parts:
        assert str(part) in line
    assert done.code == code, line


@contextmanager
def untouched(folder: Path):
    before = tree(folder), sorted(folder.rglob("*"))
    yield
    assert (tree(folder), sorted(folder.rglob("*"))) == before


# Usage: exit code 2, before any work --------------------------------------------------------------------------------

OLMOE = "{olmoe}"
COMPRESS = ("compress", OLMOE, "out", "--data", "text.txt", *SMALL)
CALIBRATE = ("calibrate", OLMOE, "out", "--data", "text.txt", *SMALL)
PLAN = ("plan", OLMOE, "{statistics}", "out", "--keep", "4")

REQUESTS = {
    "no path": (("compress", "none", "out", "--keep", "0.5"), ["none does not exist"]),
    "no path, absolute": (("inspect", "/no/such/folder"), ["/no/such/folder does not exist"]),
    "no hub": (("inspect", "some/model"), ["some/model is no folder here", "offline"]),
    "a file": (("compress", "text.txt", "out", "--keep", "0.5"), ["text.txt is a file"]),
    "an empty folder": (("inspect", "."), ["is no model", "config.json"]),
    "no keep": (COMPRESS, ["Missing option '--keep'"]),
    "keep 0": ((*COMPRESS, "--keep", "0"), ["--keep 0", "at least one"]),
    "keep 0%": ((*COMPRESS, "--keep", "0%"), ["no expert"]),
    "keep more than all": ((*COMPRESS, "--keep", "9"), ["9", "the 8 there are"]),
    "keep more than everything": ((*COMPRESS, "--keep", "150%"), ["150%", "more than all"]),
    "keep nonsense": ((*COMPRESS, "--keep", "half"), ["share", "count", "'half'"]),
    "keep negative": ((*COMPRESS, "--keep", "-4"), ["'-4'"]),
    "fewer than the router picks": (
        (*COMPRESS, "--keep", "1", "--method", "reap"),
        ["leaves 1 experts", "goes to 2", "at least 2"],
    ),
    "fewer than the router picks, sliced": ((*COMPRESS, "--keep", "1", "--form", "sliced"), ["at least 2"]),
    "groups": (
        ("compress", "{deepseek_v3}", "out", "--keep", "5", "--method", "reap"),
        ["2 groups", "multiple of 2", "not 5"],
    ),
    "pruning without a form for it": (
        (*COMPRESS, "--keep", "4", "--method", "reap", "--form", "expanded"),
        ["'reap' drops experts", "--form sliced"],
    ),
    "a scope sliced": ((*COMPRESS, "--keep", "4", "--scope", "2", "--form", "sliced"), ["--form shared"]),
    "unknown method": ((*COMPRESS, "--keep", "4", "--method", "conmo"), ["'conmo'", "did you mean 'conmoe'?"]),
    "unlike any method": ((*COMPRESS, "--keep", "4", "--method", "xyz"), ["'xyz'", "known: ", "reap"]),
    "unknown option": ((*COMPRESS, "--keep", "4", "--option", "distanse=weight"), ["did you mean 'distance'?"]),
    "bad option": ((*COMPRESS, "--keep", "4", "--option", "distance=far"), ["one of functional, weight", "'far'"]),
    "bad number": ((*COMPRESS, "--keep", "4", "--option", "seed=x"), ["'seed'", "int", "'x'"]),
    "option without value": ((*COMPRESS, "--keep", "4", "--option", "distance"), ["NAME=VALUE", "'distance'"]),
    "protect": ((*COMPRESS, "--keep", "4", "--protect", "1-3"), ["LAYER:EXPERT", "'1-3'"]),
    "protect no such expert": ((*COMPRESS, "--keep", "4", "--protect", "1:8"), ["LAYER:EXPERT", "'1:8'"]),
    "protect no such layer": ((*COMPRESS, "--keep", "4", "--protect", "7:0"), ["'7:0'"]),
    "protect too many": (
        (*COMPRESS, "--keep", "1", "--protect", "0:1", "--protect", "0:2"),
        ["2 experts are protected", "1 may stay"],
    ),
    "form": ((*COMPRESS, "--keep", "4", "--form", "small"), ["shared, sliced or expanded", "'small'"]),
    "device": ((*COMPRESS, "--keep", "4", "--device", "toaster"), ["cpu, cuda", "'toaster'"]),
    "dtype": ((*COMPRESS, "--keep", "4", "--dtype", "int3"), ["bfloat16", "'int3'"]),
    "scope": ((*COMPRESS, "--keep", "4", "--scope", "0"), ["--scope", "1"]),
    "scope no number": ((*COMPRESS, "--keep", "4", "--scope", "all"), ["--scope"]),
    "no data file": (("calibrate", OLMOE, "out", "--data", "txet.txt"), ["txet.txt", "did you mean text.txt?"]),
    "no held-out file": ((*COMPRESS, "--keep", "4", "--eval-data", "none.txt"), ["--eval-data none.txt: no such file"]),
    "too little text": (
        ("calibrate", OLMOE, "out", "--data", "text.txt", "--tokens", "100000", "--seq-len", "32"),
        ["text.txt holds 37,", "100,000 are needed", "--tokens"],
    ),
    "too little text to measure on": (
        (*COMPRESS, "--keep", "4", "--eval-data", "text.txt", "--eval-tokens", "1000000"),
        ["text.txt holds 37,"],
    ),
    "an option of another": (("evaluate", OLMOE, "--limit", "3"), ["--limit is about --tasks"]),
    "prompts for nothing": (("evaluate", OLMOE, "--prompts", "text.txt"), ["--prompts is about --generate"]),
    "no tokens": (("calibrate", OLMOE, "out", "--tokens", "0"), ["--tokens"]),
    "sequences of one token": (("evaluate", OLMOE, "--seq-len", "1"), ["--seq-len"]),
    "sequences too long": (("evaluate", OLMOE, "--seq-len", "513"), ["513", "the 512 positions"]),
    "no sample": ((*CALIBRATE, "--sample", "0"), ["--sample"]),
    "an empty prompt": (("generate", OLMOE, ""), ["prompt is empty"]),
    "unknown verb": (("compres", OLMOE, "out"), ["'compres'", "compress"]),
    "unknown flag": ((*COMPRESS, "--keep", "4", "--metod", "reap"), ["--metod", "--method"]),
    "missing argument": (("compress",), ["Missing argument"]),
    "output as folder": (("evaluate", OLMOE, "--output", "."), [". is a folder"]),
    "no statistics": (("plan", OLMOE, ".", "out", "--keep", "4"), ["no statistics", "conmoe calibrate"]),
    "no plan": (("apply", OLMOE, ".", "out"), ["no plan", "conmoe plan"]),
    "statistics of another": (
        ("plan", "{mixtral}", "{statistics}", "out", "--keep", "4"),
        ["another checkpoint", "calibrate this one"],
    ),
    "one part to merge": (("merge-stats", "{statistics}", "out"), ["at least two"]),
    "plan: unknown option": ((*PLAN, "--option", "sede=1"), ["did you mean 'seed'?"]),
    "plan: protect": ((*PLAN, "--protect", "x"), ["'x'"]),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_cannot_be_met(case, run, place, checkpoint, calibrated):
    arguments, parts = REQUESTS[case]
    known = {name: checkpoint(name) for name in ("olmoe", "deepseek_v3", "mixtral") if f"{{{name}}}" in str(arguments)}
    known["statistics"] = calibrated("olmoe") if "{statistics}" in arguments else ""
    with untouched(place):
        one_sentence(run(*(argument.format(**known) for argument in arguments)), 2, *parts)


@pytest.mark.parametrize("verb", ["calibrate", "plan", "apply", "compress", "merge-stats", "demo"])
def test_an_output_that_exists_stays(verb, run, place, checkpoint, calibrated):
    model, statistics = checkpoint("olmoe"), calibrated("olmoe")
    conmoe.plan(model, statistics, place / "plan", conmoe.Request(keep="4"))
    (place / "out").mkdir()
    (place / "out" / "precious").write_text("mine")
    arguments = {
        "calibrate": (model, "out", *SMALL),
        "plan": (model, statistics, "out", "--keep", "4"),
        "apply": (model, "plan", "out"),
        "compress": (model, "out", "--keep", "4", *SMALL),
        "merge-stats": (statistics, statistics, "out"),
        "demo": ("out",),
    }[verb]
    with untouched(place):
        one_sentence(run(verb, *arguments), 2, "out exists", "--force")
    with untouched(place):  # nor does --force delete what conmoe did not write
        one_sentence(run(verb, *arguments, "--force"), 2, "was not written by conmoe")


def test_force_replaces_what_conmoe_wrote(run, place, checkpoint, calibrated):
    asked = ("plan", checkpoint("olmoe"), calibrated("olmoe"), "plan")
    assert run(*asked, "--keep", "4").code == 0
    assert run(*asked, "--keep", "3", "--force").code == 0
    assert json.loads((place / "plan" / "plan.json").read_text())["keep"] == "3"
    assert {entry.name for entry in place.iterdir()} == {"plan", "text.txt"}


@pytest.mark.parametrize("out", ["model", "model/out", "."])
def test_the_source_is_never_replaced(out, run, place, checkpoint):
    shutil.copytree(checkpoint("olmoe"), place / "model")
    (place / "model" / "plan.json").write_text("{}")  # so that it might be conmoe's own
    (place / "results.json").write_text("{}")
    with untouched(place):
        done = run("compress", "model", place / out, "--keep", "4", "--data", "text.txt", *SMALL, "--force")
        one_sentence(done, 2, "the source", "another place")


def test_a_consolidated_model_is_not_compressed_again(run, place, checkpoint, calibrated):
    made = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), None, conmoe.Request(keep="4"))
    conmoe.apply(checkpoint("olmoe"), made, place / "half")
    with untouched(place):
        one_sentence(run("compress", "half", "out", "--keep", "2", *SMALL), 2, "consolidated already")
        one_sentence(run("calibrate", "half", "out", *SMALL), 2, "consolidated already")


def test_several_processes_are_for_calibration_and_evaluation(run, place, checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with untouched(place):
        done = run("compress", checkpoint("olmoe"), "out", "--keep", "4", "--data", "text.txt", *SMALL)
        one_sentence(done, 2, "one process", "torchrun")


# Models that are none of ours: exit code 2 ---------------------------------------------------------------------------


def of_type(kind, **config):
    """A model of another kind; the names for its sizes are those that most families use."""
    small: dict[str, int | None] = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "eos_token_id": 255,
    }
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "pad_token_id": 254}

    def make(folder):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **config)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    return make


def configured(**changes):
    def make(folder):
        save_tiny("olmoe", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return make


def config_text(text):
    def make(folder):
        save_tiny("olmoe", folder)
        (folder / "config.json").write_text(text)

    return make


def without(*names):
    def make(folder):
        save_tiny("olmoe", folder)
        for name in names:
            (folder / name).unlink()

    return make


def pickled(folder):
    save_tiny("olmoe", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def foreign_tokenizer(folder):
    save_tiny("olmoe", folder, vocab_size=64, eos_token_id=0, pad_token_id=0)


MODELS = {
    "dense": (of_type("llama"), ["dense model", "'llama'", "no experts"]),
    "dense and of another kind": (of_type("gpt2"), ["dense model", "'gpt2'"]),
    "experts of another kind": (of_type("jetmoe", num_local_experts=4, kv_channels=8), ["'jetmoe'", "not support"]),
    "layers of another kind": (of_type("llama4_text", num_local_experts=4, head_dim=8), ["no list of decoder layers"]),
    "unknown type": (configured(model_type="olmoe9"), ["olmoe9"]),
    "quantised": (configured(quantization_config={"quant_method": "gptq"}), ["gptq", "full-precision"]),
    "no JSON": (config_text("{"), ["config"]),
    "no object": (config_text("[]"), ["config"]),
    "no type": (config_text("{}"), ["config"]),
    "pickled weights": (pickled, ["safetensors"]),
    "no weights": (without("model.safetensors"), ["model.safetensors"]),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ["no tokenizer"]),
    "a tokenizer that is larger": (foreign_tokenizer, ["tokenizer does not fit", "64"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_is_not_for_us(case, run, place):
    make, parts = MODELS[case]
    make(place / "model")
    with untouched(place):
        done = run("compress", "model", "out", "--keep", "0.5", "--data", "text.txt", *SMALL)
        one_sentence(done, 2, *parts)


# Damaged checkpoints: exit code 1, file and tensor named ------------------------------------------------------------

GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
FILE = "model.safetensors"


def tensors(change):
    def damage(folder):
        held = load_file(folder / FILE)
        change(held)
        save_file(held, folder / FILE, {"format": "pt"})

    return damage


def poisoned(name, value=float("nan")):
    def change(held):
        held[name].view(-1)[1] = value

    return tensors(change)


def truncated(folder):
    os.truncate(folder / FILE, (folder / FILE).stat().st_size - 40)


def header(folder):
    with (folder / FILE).open("r+b") as stream:
        stream.seek(8)
        stream.write(b"#")


def length(folder):
    with (folder / FILE).open("r+b") as stream:
        stream.write((2**40).to_bytes(8, "little"))


def sharded(folder):
    """Two shards and an index, as published checkpoints have."""
    held = load_file(folder / FILE)
    names = sorted(held)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: held[name] for name in part}, folder / file, {"format": "pt"})
    (folder / FILE).unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))


def missing_shard(folder):
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def outside(folder):
    sharded(folder)
    index = folder / f"{FILE}.index.json"
    shutil.move(folder / "model-00002-of-00002.safetensors", folder.parent / "elsewhere.safetensors")
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", "../elsewhere.safetensors"))


def broken_index(folder):
    sharded(folder)
    (folder / f"{FILE}.index.json").write_text("{")


def grown(name):
    def change(held):
        held[name] = torch.zeros(held[name].shape[0] + 1, *held[name].shape[1:])

    return tensors(change)


def half_of_the_experts(held):
    for name in list(held):
        found = re.search(r"experts\.(\d+)\.", name)
        if found and int(found.group(1)) >= 4:
            del held[name]


DAMAGES = {
    "cut off": (truncated, [FILE, "cut off", "tensor"]),
    "header": (header, [FILE, "header"]),
    "header length": (length, [FILE, "header"]),
    "missing shard": (missing_shard, ["model-00002-of-00002.safetensors", "not there"]),
    "index points outside": (outside, [f"{FILE}.index.json", "outside", "../elsewhere.safetensors"]),
    "index": (broken_index, [f"{FILE}.index.json"]),
    "NaN in an expert": (poisoned(EXPERT), [FILE, EXPERT, "NaN"]),
    "NaN in attention": (poisoned(QUERY), [FILE, QUERY, "NaN"]),
    "infinity in a router": (poisoned(GATE, float("inf")), [FILE, GATE, "infinity"]),
    "NaN in the embedding": (poisoned("model.embed_tokens.weight"), [FILE, "model.embed_tokens.weight", "NaN"]),
    "NaN in the head": (poisoned("lm_head.weight"), [FILE, "lm_head.weight", "NaN"]),
    "a tensor too few": (tensors(lambda held: held.pop(QUERY)), ["no tensor for", QUERY]),
    "an expert tensor too few": (tensors(lambda held: held.pop(EXPERT)), ["layers.1", "experts"]),
    "a tensor too many": (
        tensors(lambda held: held.update({"model.layers.0.mlp.mystery.weight": torch.ones(2)})),
        [FILE, "model.layers.0.mlp.mystery.weight"],
    ),
    "another shape": (grown(QUERY), [FILE, QUERY, "[33, 32]", "[32, 32]"]),
    "another shape of an expert": (grown(EXPERT), [FILE, EXPERT, "[17, 32]"]),
    "half of the experts": (tensors(half_of_the_experts), ["experts", "8"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named(case, run, place, checkpoint):
    damage, parts = DAMAGES[case]
    shutil.copytree(checkpoint("olmoe"), place / "model")
    damage(place / "model")
    source = tree(place / "model")
    held_out = ("--eval-data", "text.txt", "--eval-tokens", "256")
    done = run("compress", "model", "out", "--keep", "0.5", "--data", "text.txt", *SMALL, *held_out)
    one_sentence(done, 1, *parts)
    assert not (place / "out").exists()
    assert tree(place / "model") == source
    if "NaN" not in case and "infinity" not in case:  # headers tell
        assert {entry.name for entry in place.iterdir()} <= {"model", "text.txt", "elsewhere.safetensors"}
        one_sentence(run("inspect", "model"), 1, *parts)
        one_sentence(run("generate", "model", "x"), 1, *parts)


def test_a_result_that_was_damaged_is_noticed_when_it_is_measured(run, place, checkpoint, calibrated):
    made = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), None, conmoe.Request(keep="4"))
    conmoe.apply(checkpoint("olmoe"), made, place / "half")
    poisoned(EXPERT)(place / "half")
    done = run("evaluate", "half", "--data", "text.txt", *SMALL)
    one_sentence(done, 1, "half/model.safetensors", EXPERT)


@pytest.mark.parametrize("file", ["manifest.json", "layer-00001.safetensors"])
def test_damaged_statistics_are_named(file, run, place, checkpoint, calibrated):
    shutil.copytree(calibrated("olmoe"), place / "statistics")
    (place / "statistics" / file).write_bytes(b"{}")
    done = run("plan", checkpoint("olmoe"), "statistics", "out", "--keep", "4")
    one_sentence(done, 1, file)
    assert not (place / "out").exists()


# A disk that is full ------------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(nbytes):
    """The kernel refuses to write past a limit, in the middle of a write, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def whole(folder):
    return {name: data for name, data in tree(folder).items() if name not in OWN}


@pytest.mark.parametrize("limit", [100, 5_000, 20_000, 120_000])
def test_a_write_that_fails_leaves_no_half_result_and_the_next_run_goes_on(limit, run, place, checkpoint):
    model = checkpoint("olmoe")
    source = tree(model)
    asked = ("compress", model, "out", "--keep", "0.5", "--data", "text.txt", *SMALL, "--eval-tokens", "0")
    with no_file_larger_than(limit):
        done = run(*asked)
    one_sentence(done, 1, "too large")
    assert not (place / "out").exists()
    assert tree(model) == source
    assert run(*asked).code == 0
    assert {entry.name for entry in place.iterdir()} == {"out", "text.txt"}
    asked = ("compress", model, "again", *asked[3:])
    assert run(*asked).code == 0
    assert whole(place / "out") == whole(place / "again")


def test_a_full_disk_is_called_so(run, place, checkpoint, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked = (
        "compress",
        checkpoint("olmoe"),
        "out",
        "--keep",
        "0.5",
        "--data",
        "text.txt",
        *SMALL,
        "--eval-tokens",
        "0",
    )
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        one_sentence(run(*asked), 1, "disk is full", "same command again")
    assert not (place / "out").exists()
    assert run(*asked).code == 0


def test_a_disk_that_is_too_small_is_told_before_writing(run, place, checkpoint, calibrated, monkeypatch):
    conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), place / "plan", conmoe.Request(keep="4"))
    usage = shutil.disk_usage(place)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1000))
    one_sentence(run("apply", checkpoint("olmoe"), "plan", "out"), 1, "free", "needs")
    assert not (place / "out").exists()


def test_every_family_that_is_tested_is_no_error(run, checkpoint):
    assert all(run("inspect", checkpoint(family)).code == 0 for family in TINY)
    assert tiny_model("olmoe").config.model_type == "olmoe"
