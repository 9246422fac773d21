"""Does llama.cpp take a checkpoint, and compute the same? Run it where conmoe is installed and llama.cpp is built.

    python benchmarks/gguf_check.py CHECKPOINT... --llama-cpp DIR [--bin DIR/build/bin] [--output results.json]

Each checkpoint is converted by llama.cpp's own ``convert_hf_to_gguf.py`` in float32, and then: the expert counts of the
metadata and the shapes of every layer's experts and router are held against ``config.json``; ``llama-perplexity``
scores a text, whose tokens and log-probabilities are held against those of Transformers; ``llama-completion`` decodes
greedily, which is held against Transformers too; ``llama-quantize`` makes smaller files, whose KL to the float32 file
is told. Without ``--bin`` only the file is looked at. The exit code is 1 unless every checkpoint passes.

llama.cpp knows a tokenizer's way of splitting text by a hash that its authors list. A tokenizer that is not listed,
such as those of the tests, is refused by the converter; ``--pre NAME`` says which known way it has (``gpt-2``,
``starcoder``), and the comparison of tokens tells if that was wrong. A listed tokenizer needs no such help.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conmoe.moe import count_field
from conmoe.source import open_source

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,")
NEW_TOKENS = 16
CONTEXT, CHUNKS = 64, 8
#: What two programs that compute in float32 may differ by, in nats; the file of ``llama-perplexity`` rounds to 16 bits.
TOLERANCE = 5e-3
#: The tensors that every layer with experts has in a GGUF file; some architectures keep gate and up in one.
PARTS = {
    "router": "ffn_gate_inp",
    "gate": "ffn_gate(?:_up)?_exps",
    "up": "ffn_(?:gate_)?up_exps",
    "down": "ffn_down_exps",
}
#: A random model writes bytes that are no UTF-8; Transformers puts the same sign in their place.
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
#: Run in a process of its own, with llama.cpp's tree first on the path.
CONVERT = """
import sys
tree, pre, *arguments = sys.argv[1:]
sys.path[:0] = [tree, tree + "/gguf-py"]
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        if not pre:
            raise
        return pre
TextModel.get_vocab_base_pre = named
sys.argv = ["convert_hf_to_gguf.py", *arguments]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    rows = []
    for folder in options.checkpoints:
        rows.append(check(Path(folder), options))
        print(line(rows[-1]), flush=True)
    names = ("torch", "transformers", "conmoe")
    report = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "rows": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def check(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One checkpoint: converted, looked at, run."""
    row: dict[str, Any] = {"checkpoint": folder.name, "ok": False}
    with tempfile.TemporaryDirectory(prefix="gguf-") as work:
        file = Path(work) / "model.gguf"
        done = convert(folder, file, options)
        if done.returncode or not file.is_file():
            return {**row, "error": f"converter: {_last_words(done)}"}
        row |= look(folder, file, options.llama_cpp)
        if row["faults"] or not options.bin:
            return {**row, "ok": not row["faults"]}
        try:
            row |= run(folder, file, options)
        except RuntimeError as error:
            return {**row, "error": str(error)}
    same = row["tokens_equal"] and row["max_difference"] <= TOLERANCE and row["greedy_equal"] == row["greedy_total"]
    return {**row, "ok": same}


def convert(folder: Path, file: Path, options: argparse.Namespace) -> subprocess.CompletedProcess[str]:
    """llama.cpp's converter, in float32."""
    words = [
        str(options.llama_cpp),
        options.pre,
        str(folder),
        "--outfile",
        str(file),
        "--outtype",
        "f32",
        *options.convert,
    ]
    return subprocess.run([options.python, "-c", CONVERT, *words], **CAPTURED)


def look(folder: Path, file: Path, tree: Path) -> dict[str, Any]:
    """What the file says of experts, in its metadata and in the shapes of its tensors; ``faults`` is what is wrong."""
    sys.path.insert(0, str(tree / "gguf-py"))
    from gguf import GGUFReader  # type: ignore[import-not-found]  # of llama.cpp's tree

    reader = GGUFReader(file)
    config = AutoConfig.from_pretrained(folder)
    arch = reader.fields["general.architecture"].contents()
    stated = {name: f.contents() for name, f in reader.fields.items() if name.startswith(f"{arch}.expert_")}
    stated = {name.removeprefix(f"{arch}."): value for name, value in stated.items()}
    experts, used = getattr(config, count_field(config)), config.num_experts_per_tok
    faults = []
    for name, expected in (("expert_count", experts), ("expert_used_count", used)):
        if stated.get(name) != expected:
            faults.append(f"{name} is {stated.get(name)}, not {expected}")
    layers = 0
    for tensor in reader.tensors:
        # GGUF names its axes from the innermost: the last is the expert
        if re.search(r"ffn_(gate|up|down|gate_up)_exps|ffn_gate_inp\.|exp_probs_b", tensor.name):
            layers += "ffn_gate_inp.weight" in tensor.name
            if int(tensor.shape[-1]) != experts:
                faults.append(f"{tensor.name} holds {int(tensor.shape[-1])} experts, not {experts}")
    source = open_source(folder)
    held, depth = {layer.index for layer in source.layers}, source.config.num_hidden_layers
    faults += layer_faults([tensor.name for tensor in reader.tensors], held, depth)
    return {
        "arch": arch,
        "experts": experts,
        "used": used,
        "moe_layers": layers,
        "metadata": stated,
        "pre": reader.fields["tokenizer.ggml.pre"].contents(),
        "bytes": file.stat().st_size,
        "faults": faults,
    }


def layer_faults(names: Sequence[str], held: Set[int], depth: int) -> list[str]:
    """Where the layers with routers and experts are not those of the checkpoint, ``held`` of ``depth``.

    Blocks from ``depth`` on are heads that predict further tokens, which the converter may leave out.
    """
    faults = []
    for part, kind in PARTS.items():
        numbers = {int(found[1]) for name in names if (found := re.fullmatch(rf"blk\.(\d+)\.{kind}\.weight", name))}
        written = {number for number in numbers if number < depth}
        if written != held:
            faults.append(f"{part} weights are in layers {sorted(written)}, not {sorted(held)}")
    return faults


def run(folder: Path, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What llama.cpp computes from the file, beside what Transformers computes from the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids_NS, theirs_NpV = scored(file, options)
    text_ids = tokenizer(options.text.read_text(), add_special_tokens=False)["input_ids"][: ids_NS.numel()]
    with torch.no_grad():
        ours_NpV = model(ids_NS).logits[:, CONTEXT // 2 : -1].float().log_softmax(dim=-1)
    # the file stops 16 nats below the most likely token
    floor_Np1 = ours_NpV.amax(dim=-1, keepdim=True) - 15.5
    difference = (ours_NpV - theirs_NpV).masked_fill(ours_NpV < floor_Np1, 0.0).abs()
    greedy = [(complete(file, prompt, options), decode(model, tokenizer, prompt)) for prompt in PROMPTS]
    return {
        "tokens_equal": text_ids == ids_NS.flatten().tolist(),
        "max_difference": float(difference.max()),
        "top1_agreement": float((ours_NpV.argmax(-1) == theirs_NpV.argmax(-1)).double().mean()),
        "kl": kl(ours_NpV, theirs_NpV),
        "scored": difference.shape[0] * difference.shape[1],
        "greedy_equal": sum(readable(ours).startswith(readable(theirs)) for theirs, ours in greedy),
        "greedy_total": len(greedy),
        "greedy": [{"llama.cpp": theirs, "transformers": ours} for theirs, ours in greedy],
        "quantized": {kind: quantized(file, kind, theirs_NpV, options) for kind in options.quantize},
    }


def scored(file: Path, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """``ids_NS, log_NpV``: the tokens of each chunk, and the log-probabilities after those of its second half."""
    logits = file.with_suffix(".logits")
    words = ["-f", options.text, "-c", CONTEXT, "-b", CONTEXT, "--chunks", CHUNKS, "--save-all-logits", logits]
    _tool(options, "llama-perplexity", file, *words)
    data = logits.read_bytes()
    if data[:8] != b"_logits_":
        raise RuntimeError("llama-perplexity wrote no logits.")
    S, V, N = np.frombuffer(data, np.int32, 3, 8).tolist()
    ids_NS = torch.from_numpy(np.frombuffer(data, np.int32, N * S, 20).reshape(N, S).astype(np.int64))
    width = 2 * ((V + 1) // 2) + 4  # a scale and a minimum in float32, then 16 bits for each token of the vocabulary
    raw = np.frombuffer(data, np.uint16, offset=20 + 4 * N * S).reshape(N, -1, width)
    scale = np.ascontiguousarray(raw[..., :2]).view(np.float32)
    least = np.ascontiguousarray(raw[..., 2:4]).view(np.float32)
    return ids_NS, torch.from_numpy(raw[..., 4 : 4 + V] * scale + least)


def complete(file: Path, prompt: str, options: argparse.Namespace) -> str:
    """What llama.cpp writes after ``prompt``, always the likeliest token."""
    words = ["-p", prompt, "-n", NEW_TOKENS, "--temp", 0, "--top-k", 1, "-no-cnv", "--simple-io"]
    printed = _tool(options, "llama-completion", file, "-c", 512, "--no-display-prompt", *words).stdout
    return re.sub(r"\s*\[end of text\]\s*$", "", printed).strip()


@torch.no_grad()
def decode(model: Any, tokenizer: Any, prompt: str) -> str:
    """The same by Transformers."""
    ids_1S = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = ids_1S.shape[1]
    out = model.generate(
        ids_1S,
        attention_mask=torch.ones_like(ids_1S),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    text: str = tokenizer.decode(out[0, start:], skip_special_tokens=False)
    return text.strip()


def readable(text: str) -> str:
    """Up to the first special token, control or broken character, which the two print in different ways.

    What llama.cpp prints into a pipe may end some tokens early, so it is held against the beginning of the other.
    """
    return re.split(r"\ufffd|<\||[\x00-\x08\x0b-\x1f]", text)[0].strip()


def quantized(file: Path, kind: str, base_NpV: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """The size of a quantised file, and its KL to the float32 one in nats per token."""
    small = file.with_name(f"{kind}.gguf")
    words = [options.bin / "llama-quantize", file, small, kind, "2"]
    done = subprocess.run([str(word) for word in words], **CAPTURED)
    if done.returncode:
        return {"error": _last_words(done)}
    fallback = re.search(r"(\d+) of \d+ tensor\(s\) required fallback", done.stdout + done.stderr)
    _, log_NpV = scored(small, options)
    return {
        "bytes": small.stat().st_size,
        "kl": kl(base_NpV, log_NpV),
        "fallbacks": int(fallback[1]) if fallback else 0,  # tensors too narrow for the type that was asked for
    }


def kl(base_NpV: Tensor, other_NpV: Tensor) -> float:
    return float((base_NpV.double().exp() * (base_NpV.double() - other_NpV.double())).sum(dim=-1).mean())


def _tool(options: argparse.Namespace, name: str, file: Path, *words: object) -> subprocess.CompletedProcess[str]:
    # float32 all the way: by default the cache of keys and values is in float16
    exact = ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "1", "--no-warmup")
    command = [options.bin / name, "-m", file, *exact, *words]
    done = subprocess.run([str(word) for word in command], **CAPTURED, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{name}: {_last_words(done)}")
    return done


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|not supported|assert|Can not map", line, re.IGNORECASE)]
    return (telling or lines or ["no message"])[-1]


def line(row: dict[str, Any]) -> str:
    """One checkpoint, for people."""
    arch, experts, used = (row.get(name, "-") for name in ("arch", "experts", "used"))
    text = f"{row['checkpoint']:<22} {arch:<11} {experts:>2} top {used}"
    if "max_difference" in row:
        found = row["quantized"].items()
        sizes = (f"{k}: KL {q['kl']:.4f}, {q['bytes']:,} B" if "kl" in q else f"{k}: {q['error']}" for k, q in found)
        text += f"  max diff {row['max_difference']:.1e}  greedy {row['greedy_equal']}/{row['greedy_total']}  "
        text += f"{row['bytes']:,} B  " + "  ".join(sizes)
    if not row["ok"]:
        text += "  FAILED: " + (row.get("error") or "; ".join(row["faults"]) or "other tokens, or other numbers")
    return text


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a source tree of llama.cpp")
    parser.add_argument("--bin", type=Path, help="the folder of its programs; without, nothing is run")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has what the converter needs")
    parser.add_argument("--pre", default="", help="how a tokenizer that llama.cpp does not know splits text")
    parser.add_argument(
        "--convert", action="append", default=[], metavar="OPTION", help="for the converter: --convert=--no-nextn"
    )
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "docs" / "method.md")
    parser.add_argument("--quantize", nargs="*", default=["Q8_0", "Q4_K_M"])
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
