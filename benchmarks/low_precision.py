"""What it costs that a source is in FP8: the same methods on a bfloat16 checkpoint and on its FP8 copy.

    python benchmarks/low_precision.py MODEL --data SPEC --eval-data SPEC [--block N] [--output FILE]

The copy is made here: every matrix of the decoder layers but the routers gets a float32 scale for each block of N x N,
the largest magnitude of the block over 448, as DeepSeek-V3 and Qwen3 publish it. Both checkpoints are compressed by
``reap`` and ``conmoe`` with ``--refine none --keep 0.5``, and every result is compared with the bfloat16 source on the
same held-out tokens: KL, top-1 agreement and excess loss with their standard errors, and bytes on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import conmoe

METHODS = ("reap", "conmoe")


def quantise(weight_OI: Tensor, block: int) -> dict[str, Tensor]:
    """FP8 and the scales of its blocks."""
    O, I = weight_OI.shape  # noqa: E741 (shape letters)
    M, N = -(-O // block), -(-I // block)
    padded = torch.zeros(M * block, N * block)
    padded[:O, :I] = weight_OI.float()
    scale_MN = padded.view(M, block, N, block).abs().amax((1, 3)).clamp_min(1e-12) / 448
    wide = scale_MN.repeat_interleave(block, 0).repeat_interleave(block, 1)[:O, :I]
    return {"weight": (weight_OI.float() / wide).to(torch.float8_e4m3fn), "weight_scale_inv": scale_MN}


def fp8_copy(model: Path, out: Path, block: int) -> Path:
    """The checkpoint ``model`` in FP8."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    (out / "config.json").chmod(0o644)
    stored: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.ndim == 2 and ".layers." in name and not name.endswith(".gate.weight"):
                parts = quantise(tensor, block)
                stored |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            else:
                stored[name] = tensor
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head"],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    tokenizer = conmoe.load_tokenizer(given.model)

    def text(spec: str, tokens: int, seed: int) -> conmoe.TokenData:
        return conmoe.load_tokens(tokenizer, [conmoe.parse_spec(spec)], tokens=tokens, seq_len=512, seed=seed)

    data, held_out = text(given.data, given.tokens, 0), text(given.eval_data, given.eval_tokens, 1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sources = {"bfloat16": given.model, "FP8": fp8_copy(given.model, work / "fp8", given.block)}
        for stored, source in sources.items():
            rows.append(row(stored, "source", source, given.model, held_out))
            conmoe.calibrate(source, work / f"{stored}-statistics", data, conmoe.Calibration(sample=4096))
            for method in METHODS:
                plan = conmoe.plan(source, work / f"{stored}-statistics", request=conmoe.Request(method))
                out = conmoe.apply(source, plan, work / f"{stored}-{method}").folder
                rows.append(row(stored, method, out, given.model, held_out))
    if given.output:
        named = {"model": given.model.name, "block": given.block, "tokens": data.tokens}
        record = {**named, "eval_tokens": held_out.tokens, "seq_len": 512, "keep": "0.5", "rows": rows}
        given.output.write_text(json.dumps(record, indent=1) + "\n")
    print("| source | what | KL to the bfloat16 source | top-1 agreement | excess loss | bytes |")
    print("|---|---|---|---|---|---|")
    for each in rows:
        cells = (f"{each[key]['value']:.4f} ± {each[key]['stderr']:.4f}" for key in MEASURES)
        print(f"| {each['stored']} | {each['method']} | {' | '.join(cells)} | {each['bytes']:,} |")


MEASURES = ("kl", "top1_agreement", "excess_loss")


def row(stored: str, method: str, result: Path, against: Path, held_out: conmoe.TokenData) -> dict[str, Any]:
    found = conmoe.evaluate(result, held_out, against=against).as_json()
    size = sum(file.stat().st_size for file in result.glob("*.safetensors"))
    return {"stored": stored, "method": method, "bytes": size, **{key: found[key] for key in MEASURES}}


if __name__ == "__main__":
    main()
