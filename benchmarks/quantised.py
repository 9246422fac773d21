"""Compressed, then quantised: do the recipes in examples/ hold, and what do they cost?

    python benchmarks/quantised.py SOURCE --models HALF-SLICED HALF-SHARED --data held-out.txt \
        --calibrate text.txt --output benchmarks/results-quantised.json

Runs every recipe of examples/quantise_torchao.py and examples/quantise_llmcompressor.py that this environment can run
(torchao, llm-compressor), each in a process of its own, on every model. Rows of recipes that another environment
measured stay in the output file. Per row: bytes of the weights, how much of the experts' bytes is of low precision,
whether routers and maps are those of the unquantised model bit for bit, whether the result loads and generates, and its
distance from the source and from the unquantised compressed model.

``conmoe evaluate`` streams plain checkpoints only, so all models here are loaded whole. The definitions are its own:
KL(first || second) and top-1 agreement at every position, means per sequence, standard errors over sequences.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import conmoe
from conmoe.evaluate.paired import as_json, mean

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = {
    "torchao": ("int8-weight-only", "int8-dynamic", "fp8-weight-only"),
    "llmcompressor": ("fp8-dynamic", "w8a8", "w4a16"),
}
PROMPT = "The history of the"
SEQ_LEN = 256
#: safetensors' names of types that hold quantised weights; four-bit ones are packed into 32 bits
LOW = ("I8", "U8", "I32", "F8_E4M3")
ROUTER = (".gate.weight", ".router.weight", "expert_map", "expert_gain", "e_score_correction_bias")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        row = measure(options.worker, options.models[0], options.source, options)
        conmoe.write_json(options.output, row)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for model in options.models:
            rows.append({"recipe": "none", "model": model.name} | _measured_apart("none", model, model, options))
            for package in options.packages:
                if importlib.util.find_spec(package) is not None:
                    recipes = [recipe for recipe in RECIPES[package] if recipe in (options.recipes or RECIPES[package])]
                    rows += [run(package, recipe, model, Path(work), options) for recipe in recipes]
    report = _merged(options.output, rows, options)
    print(table(report["rows"]))
    if options.output:
        conmoe.write_json(options.output, report)
    return 0 if all(row["ok"] for row in rows) else 1


def run(package: str, recipe: str, model: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One recipe on one model: quantise, look at what was written, load it, measure it."""
    out = work / f"{model.name}-{package}-{recipe}"
    command = [sys.executable, str(EXAMPLES / f"quantise_{package}.py"), str(model), str(out), "--recipe", recipe]
    if options.calibrate and package == "llmcompressor":
        command += ["--data", options.calibrate]
    if recipe == "w4a16":
        command += ["--group-size", str(options.group_size)]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    name = {"recipe": f"{package} {recipe}", "model": model.name}
    if done.returncode:
        return name | _failed(model, done.stderr or done.stdout)
    return name | _measured_apart(package, out, model, options)


def _measured_apart(package: str, out: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        command = [sys.executable, __file__, str(options.source), "--models", str(out), str(model)]
        command += ["--data", options.data, "--tokens", str(options.tokens), "--worker", package]
        done = subprocess.run([*command, "--output", str(answer)], capture_output=True, text=True)
        if done.returncode:
            return _failed(model, done.stderr)
        row: dict[str, Any] = json.loads(answer.read_text())
        print(table([{"recipe": package, "model": model.name, **row}]).splitlines()[-1], flush=True)
        return row


def measure(package: str, out: Path, source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What ``out`` is and does, beside the compressed model that it was made of and the source of that one."""
    model = options.models[1]
    row: dict[str, Any] = {"form": form(model), "ok": True} | on_disk(out, model)
    row["share_of_source"] = row["bytes"] / on_disk(source, source)["bytes"]
    tokenizer = conmoe.load_tokenizer(source)
    data = conmoe.load_tokens(tokenizer, [conmoe.parse_spec(options.data)], tokens=options.tokens, seq_len=SEQ_LEN)
    quantised = load(package, out)
    inputs = tokenizer(PROMPT, return_tensors="pt").to("cpu")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        new = quantised.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    row["generated"] = tokenizer.decode(new)
    row["tokens"], row["sequences"] = data.tokens, len(data.ids_NS)
    row["from_source"] = distance(load("none", source), quantised, data.ids_NS)
    if out != model:
        row["from_unquantised"] = distance(load("none", model), quantised, data.ids_NS)
    row["ok"] = row["routers_identical"] and len(new) > 0
    if out != model:
        row["ok"] = row["ok"] and row["experts_low_precision"] > 0.5
    return row


def load(package: str, folder: Path) -> Any:
    return example("torchao" if package == "none" else package).load(folder)


def example(package: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"quantise_{package}", EXAMPLES / f"quantise_{package}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@torch.no_grad()
def distance(first: Any, second: Any, ids_NS: Tensor) -> dict[str, Any]:
    """KL(first || second) in nats per token, agreement and excess loss; as in conmoe/evaluate/fidelity.py."""
    columns: dict[str, list[float]] = {"kl": [], "top1_agreement": [], "excess_loss": []}
    for ids_S in ids_NS:
        p_SV, q_SV = (model(input_ids=ids_S[None]).logits[0].float().log_softmax(-1) for model in (first, second))
        columns["kl"].append((p_SV.exp() * (p_SV - q_SV)).sum(-1).double().mean().item())
        columns["top1_agreement"].append((p_SV.argmax(-1) == q_SV.argmax(-1)).double().mean().item())
        losses = [-logp_SV[:-1].gather(1, ids_S[1:, None]).double().mean().item() for logp_SV in (p_SV, q_SV)]
        columns["excess_loss"].append(losses[1] - losses[0])
    return {name: as_json(mean(values)) for name, values in columns.items()}


def on_disk(out: Path, model: Path) -> dict[str, Any]:
    """Bytes of all tensors, the share of the experts' bytes in low precision, and whether the routers are the same."""
    ours, theirs = tensors(out), tensors(model)
    experts = {name: value for name, value in ours.items() if ".experts." in name}
    low = sum(size for kind, size, _ in experts.values() if kind in LOW)
    routers = [name for name in theirs if name.endswith(ROUTER)]
    return {
        "bytes": sum(size for _, size, _ in ours.values()),
        "experts_low_precision": low / sum(size for _, size, _ in experts.values()),
        "routers": len(routers),
        "routers_identical": bool(routers)
        and all(name in ours and _equal(ours[name][2], theirs[name][2], name) for name in routers),
    }


def tensors(folder: Path) -> dict[str, tuple[str, int, Path]]:
    """Every tensor of a checkpoint: its type, its bytes, its file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                tensor = file.get_tensor(name)
                found[name] = (file.get_slice(name).get_dtype(), tensor.numel() * tensor.element_size(), path)
    return found


def _equal(ours: Path, theirs: Path, name: str) -> bool:
    with safe_open(ours, "pt") as mine, safe_open(theirs, "pt") as other:
        a, b = mine.get_tensor(name), other.get_tensor(name)
    return a.dtype == b.dtype and torch.equal(a, b)


def form(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return "shared" if config["model_type"].startswith("conmoe_") else "sliced"


def _failed(model: Path, text: str) -> dict[str, Any]:
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["no message"]
    print("\n".join(lines[-12:]), file=sys.stderr, flush=True)
    return {"form": form(model), "ok": False, "error": lines[-1]}


def _merged(output: Path | None, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    names = ("torch", "transformers", "torchao", "llmcompressor", "compressed-tensors", "conmoe")
    versions = {"python": platform.python_version()} | {name: _version(name) for name in names}
    text = Path(options.data).name
    rows = [{**row, "source": options.source.name, "text": text, "versions": versions} for row in rows]
    old = json.loads(output.read_text())["rows"] if output and output.exists() else []
    keys = ("recipe", "form", "model", "source")  # rows of the first runs name no model
    new = {tuple(row.get(key) for key in keys) for row in rows}
    return {"rows": [row for row in old if tuple(row.get(key) for key in keys) not in new] + rows}


def _version(name: str) -> str | None:
    try:
        return conmoe.__version__ if name == "conmoe" else version(name)
    except PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; KL in nats per token, ± one standard error."""
    lines = [
        "| recipe | model | form | MB | share of source | experts in low precision | KL from source "
        "| agreement with source | KL from unquantised | generates |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        cells = [row["recipe"], row.get("model", ""), row["form"]]
        if "error" in row:
            lines.append("| " + " | ".join(cells) + f" | failed: {row['error'][:80]} | | | | | | no |")
            continue
        source, own = row["from_source"], row.get("from_unquantised")
        cells += [f"{row['bytes'] / 1e6:.3f}", f"{row['share_of_source']:.1%}"]
        cells += [f"{row['experts_low_precision']:.1%}", _plain(source["kl"], 4)]
        cells += [_plain(source["top1_agreement"], 2, 100) + " %"]
        cells += [_plain(own["kl"], 5) if own else "", "yes" if row["generated"] else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(number: dict[str, float | None], digits: int, scale: float = 1) -> str:
    value, error = number["value"], number["stderr"]
    if value is None:
        return "-"
    return f"{scale * value:.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the checkpoint that was compressed")
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="its compressed forms")
    parser.add_argument("--data", required=True, help="text to measure on")
    parser.add_argument("--calibrate", help="text for recipes that calibrate")
    parser.add_argument("--packages", nargs="+", choices=RECIPES, default=list(RECIPES), help="of those installed")
    parser.add_argument("--recipes", nargs="+", help="only these")
    parser.add_argument("--group-size", type=int, default=64, help="of w4a16; has to divide all widths")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = [model.name for model in options.models]
    if not options.worker and len({*names}) < len(names):
        parser.error("models of one name; rows are told apart by the names of folders")
    return options


if __name__ == "__main__":
    sys.exit(main())
