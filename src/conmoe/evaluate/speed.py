"""Speed and memory of a model beside its source, each turn in a process of its own, the two taking turns.

With an equal number of experts per token both do the same arithmetic for a token: what must fall is memory. Speed may
change through what follows from that (fewer weights to read for a batch), and is measured, not presumed.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe.evaluate.paired import as_json, mean
from conmoe.parallel import refuse_several
from conmoe.progress import SILENT, Progress
from conmoe.types import ConmoeError, UsageError
from conmoe.whole import check_whole

UNITS = {
    "prefill": "prompt tokens per second",
    "decode": "new tokens per second, of all sequences together",
    "resident": "bytes once the model is loaded",
    "peak": "bytes, the most that were in use, loading included",
    "weights": "bytes of parameters and buffers",
    "mapped": "bytes among resident that are pages of files, which the system can take back; 0 on a GPU",
    "libraries": "bytes of Python and its libraries before the model; part of resident and peak, 0 on a GPU",
}
_MEMORY = ("resident", "peak", "weights", "mapped", "libraries")


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """Sequences at a time, tokens read and written by each; processes for each model, and timed runs in each."""

    batch: int = 1
    prompt: int = 256
    new: int = 64
    turns: int = 2
    repeats: int = 3


def evaluate_speed(
    model: Path,
    *,
    against: Path | None = None,
    ids_NS: Tensor | None = None,
    options: SpeedOptions = SpeedOptions(),
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure tokens per second and memory of a model and its source, in turns: A B A B.

    Args:
        model: a checkpoint, compressed or not; every turn loads it whole, in a process of its own.
        against: the source to compare with.
        ids_NS: text whose beginning is read; by default random tokens, which spread evenly over the experts.
        options: sizes and repetitions.
        device: where to compute; GPU memory is that of PyTorch's allocator.
        dtype: in which to compute; by default each checkpoint's own.
        trust_remote_code: run modelling code that comes with a checkpoint.
        progress: where the turns report to.

    Returns:
        ``model``, ``source`` and ``ratio`` (model / source, turn by turn): the mean over turns and its standard error,
        null for one turn, the lowest and the highest; how it was measured, and ``units``. A speed of a turn is the
        median of its timed runs; the lowest and the highest are of all runs.
    """
    refuse_several("evaluate --speed")
    folders = {"source": against, "model": model} if against else {"model": model}
    opened = [check_whole(folder, trust_remote_code=trust_remote_code) for folder in folders.values()]
    smallest = min(each.vocabulary for each in opened)
    for each in opened:
        room = getattr(each.config, "max_position_embeddings", None) or math.inf
        if options.prompt + options.new > room:
            raise UsageError(f"{options.prompt} prompt and {options.new} new tokens are more than {room} positions.")
    job = {
        "device": device,
        "dtype": str(dtype).removeprefix("torch.") if dtype else None,
        "remote": trust_remote_code,
        "threads": torch.get_num_threads(),
        "ids": _ids(ids_NS, options, smallest).tolist(),
        "new": options.new,
        "repeats": options.repeats,
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    with progress.stage("speed", options.turns * len(folders), "turns") as advance:
        for _ in range(options.turns):
            for name, folder in folders.items():
                advance(0, doing=f"speed, {name}")
                found[name].append(_turn({**job, "model": str(folder)}))
                advance(1)
    sides = {name: _side(turns, options) for name, turns in found.items()}
    first = found["model"][0]
    return {
        **asdict(options),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": job["threads"],
        "dtype": first["dtype"],
        "experts_implementation": first["experts"],
        "text": "random tokens" if ids_NS is None else "the evaluation text",
        "units": UNITS,
        **sides,
        "source": sides.get("source"),
        "ratio": _ratios(found, options) if "source" in found else None,
    }


def _ids(ids_NS: Tensor | None, options: SpeedOptions, vocabulary: int) -> Tensor:
    """``batch`` prompts of equal length, from the beginning of the text (again from there where it is too short)."""
    wanted = options.batch * options.prompt
    if ids_NS is None:
        flat = torch.randint(0, vocabulary, (wanted,), generator=torch.Generator().manual_seed(0))
    else:
        flat = ids_NS.flatten()
        flat = flat.repeat(-(-wanted // len(flat)))[:wanted]
    return flat.view(options.batch, options.prompt)


def _turn(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="conmoe-speed-") as name:
        asked, answer = Path(name, "job.json"), Path(name, "result.json")
        asked.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "conmoe.evaluate.timing", str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not answer.is_file():
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ConmoeError(f"Timing {job['model']} failed in its own process: {reason}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _rates(turn: dict[str, Any], options: SpeedOptions) -> dict[str, list[float]]:
    """Tokens per second of each timed run of a turn."""
    tokens = {"prefill": options.batch * options.prompt, "decode": options.batch * options.new}
    return {name: [count / seconds for seconds in turn[f"{name}_seconds"]] for name, count in tokens.items()}


def _side(turns: Sequence[dict[str, Any]], options: SpeedOptions) -> dict[str, Any]:
    """Runs of one process are no independent units: it finds its memory and its neighbours once. Turns are."""
    found = {}
    for name in ("prefill", "decode"):
        rates = [_rates(turn, options)[name] for turn in turns]
        runs = [rate for each in rates for rate in each]
        found[name] = _spread([statistics.median(each) for each in rates]) | {"low": min(runs), "high": max(runs)}
    return found | {name: _spread([float(turn[name]) for turn in turns]) for name in _MEMORY}


def _ratios(found: dict[str, list[dict[str, Any]]], options: SpeedOptions) -> dict[str, Any]:
    """Model over source, turn by turn: what the machine does to both at that time cancels."""
    pairs = list(zip(found["model"], found["source"], strict=True))
    speeds = {
        name: [
            statistics.median(_rates(ours, options)[name]) / statistics.median(_rates(theirs, options)[name])
            for ours, theirs in pairs
        ]
        for name in ("prefill", "decode")
    }
    sizes = {name: [ours[name] / theirs[name] for ours, theirs in pairs] for name in ("resident", "peak", "weights")}
    return {name: _spread(values) for name, values in (speeds | sizes).items()}


def _spread(turns: Sequence[float]) -> dict[str, float | None]:
    return {**as_json(mean(turns)), "low": min(turns), "high": max(turns)}
