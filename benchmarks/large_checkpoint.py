"""A checkpoint larger than what we want to hold: peak memory and time, beside a plain forward and llm-compressor.

    python benchmarks/large_checkpoint.py WORK [--peer-python PATH] [--output results.json]

WORK gets a randomly initialised checkpoint of the OLMoE shape (12 layers, 64 experts, about 2.5 GB in bf16): plumbing,
never quality. Every row is a process of its own, so that its peak resident memory is its own; times are taken inside
it, after the imports. ``--peer-python`` is the interpreter of another environment with llm-compressor installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

TOKENS, SEQ_LEN, BATCH = 16384, 512, 4096
REAP_TOKENS = 4096
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
}


def make(folder: Path) -> None:
    """Write the checkpoint a tensor at a time."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from conmoe.shards import tensor_output, write_shards

    config = OlmoeConfig(**SHAPE, dtype="bfloat16", architectures=["OlmoeForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16() if scale else torch.ones(shape).bfloat16()

    outputs = []
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        scale = 0.0 if "norm" in name else (0.5 if name.endswith("gate.weight") else 0.02)
        if ".experts." not in name:
            outputs.append(tensor_output(name, "BF16", value.shape, lambda s=value.shape, c=scale: draw(s, c)))
            continue
        base, kind = name.rsplit(".", 1)
        half = value.shape[1] // 2
        parts = {"gate_proj": half, "up_proj": half} if kind == "gate_up_proj" else {"down_proj": value.shape[1]}
        for expert in range(value.shape[0]):
            for part, rows in parts.items():
                shape = torch.Size((rows, value.shape[2]))
                outputs.append(
                    tensor_output(f"{base}.{expert}.{part}.weight", "BF16", shape, lambda s=shape: draw(s, 0.02))
                )
    folder.mkdir(parents=True)
    write_shards(outputs, folder, 2**30)
    config.save_pretrained(folder)
    tokenizer(folder)


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {symbol: number for number, symbol in enumerate([*alphabet, "<eos>"])}
    inner = Tokenizer(models.BPE(words, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)


def ids(tokens: int):
    import torch

    shape = (tokens // SEQ_LEN, SEQ_LEN)
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def plain(folder: Path, tokens: int, implementation: str) -> float:
    """A whole model in memory, one forward over all tokens; the time is the forward's."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation=implementation).eval()
    batches = ids(tokens).split(BATCH // SEQ_LEN)
    with torch.no_grad():
        model(batches[0][:1], logits_to_keep=1)
        began = time.perf_counter()
        for batch in batches:
            model(batch, logits_to_keep=1)
    return time.perf_counter() - began


def statistics(folder: Path, out: Path, tokens: int) -> float:
    import conmoe
    from conmoe.data import SourceCount

    data = conmoe.TokenData(ids(tokens), (SourceCount("random", 1.0, tokens // SEQ_LEN, 1),), "random", ())
    began = time.perf_counter()
    conmoe.calibrate(folder, out, data, conmoe.Calibration(), force=True)
    return time.perf_counter() - began


def compress(folder: Path, out: Path, method: str, tokens: int) -> float:
    import conmoe
    from conmoe.cli.console import Bars
    from conmoe.data import SourceCount

    data = conmoe.TokenData(ids(tokens), (SourceCount("random", 1.0, tokens // SEQ_LEN, 1),), "random", ())
    work = out.with_name(out.name + ".work")
    for leftover in (out, work):
        shutil.rmtree(leftover, ignore_errors=True)
    began = time.perf_counter()
    conmoe.compress(
        folder,
        out,
        work,
        data,
        conmoe.Request(method=method, keep="0.5"),
        Bars(),
        calibration=conmoe.Calibration(),
        force=True,
    )
    return time.perf_counter() - began


def peer(folder: Path, out: Path, tokens: int) -> float:
    """llm-compressor's REAP modifier, as its documentation calls it: load, calibrate and prune, save."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    rows = ids(tokens)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=[REAPPruningModifier(sparsity=0.5)],
        max_seq_length=SEQ_LEN,
        num_calibration_samples=len(rows),
    )
    print(f"llm-compressor: calibrate and prune {time.perf_counter() - began:.1f} s", file=sys.stderr)
    model.save_pretrained(out)
    return time.perf_counter() - started


def row(name: str, python: str, arguments: list[str]) -> dict[str, object]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    if done.returncode:
        return {"row": name, "failed": done.returncode}
    return {"row": name, **json.loads(done.stdout.strip().splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.work / "model"
    if given.step:
        kind, *rest = given.step
        if kind == "plain":
            seconds = plain(folder, int(rest[0]), rest[1])
        elif kind == "statistics":
            seconds = statistics(folder, given.work / "statistics", int(rest[0]))
        elif kind == "compress":
            seconds = compress(folder, given.work / rest[0], rest[0], int(rest[1]))
        elif kind == "peer":
            seconds = peer(folder, given.work / "peer", int(rest[0]))
        else:
            seconds = float(make(folder) is not None)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
        return
    if not folder.exists():
        subprocess.run([sys.executable, __file__, str(given.work), "--step", "make"], check=True)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    steps = {
        f"plain forward, {TOKENS} tokens, grouped_mm": ["plain", str(TOKENS), "grouped_mm"],
        f"plain forward, {TOKENS} tokens, eager": ["plain", str(TOKENS), "eager"],
        f"conmoe statistics, {TOKENS} tokens": ["statistics", str(TOKENS)],
        f"conmoe compress --method conmoe, {TOKENS} tokens": ["compress", "conmoe", str(TOKENS)],
        f"conmoe compress --method reap, {REAP_TOKENS} tokens": ["compress", "reap", str(REAP_TOKENS)],
    }
    rows = [
        row(name, sys.executable, [str(given.work), "--step", *step])
        for name, step in steps.items()
        if not given.only or any(wanted in name for wanted in given.only)
    ]
    if given.peer_python:
        rows.append(
            row(
                f"llm-compressor REAP, {REAP_TOKENS} tokens: load, prune, save",
                given.peer_python,
                [str(given.work), "--step", "peer", str(REAP_TOKENS)],
            )
        )
    print(f"checkpoint: {size / 1e9:.2f} GB")
    for entry in rows:
        shown = (
            f"failed ({entry['failed']})"
            if "failed" in entry
            else f"{entry['seconds']:8.1f} s {entry['peak_bytes'] / 1e9:8.2f} GB peak"
        )
        print(f"{entry['row']:<55} {shown}")
    if given.output:
        given.output.write_text(json.dumps({"checkpoint_bytes": size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
