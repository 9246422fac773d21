"""The whole tool in two minutes, offline: a small trained model that ships with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from conmoe.apply import apply
from conmoe.artifacts import building, write_atomic
from conmoe.calibrate import Calibration, calibrate
from conmoe.data import load_tokenizer, load_tokens
from conmoe.evaluate import Fidelity, evaluate
from conmoe.generate import generate
from conmoe.methods import DEFAULT_METHOD
from conmoe.plan import plan
from conmoe.progress import Progress
from conmoe.registry import Form
from conmoe.request import Request

METHODS = (DEFAULT_METHOD, "reap", "frequency")
KEEP = "0.5"
TOKENS, SEQ_LEN = 16384, 256
PROMPT = '    def close(self):\n        """Close the'


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made."""

    folder: Path
    rows: list[tuple[str, Form, Fidelity]]  # method, form, fidelity
    before: str  # the source's continuation of the prompt
    after: str


def demo_model() -> Path:
    """The folder of the model that ships with the package."""
    return Path(str(files("conmoe") / "assets" / "demo-model"))


def demo(out: Path, progress: Progress, *, force: bool = False) -> Demo:
    """Compress the demo model with the default method, REAP and frequency pruning, and measure all three."""
    model = demo_model()
    tokenizer = load_tokenizer(model)
    data = load_tokens(tokenizer, [], tokens=TOKENS, seq_len=SEQ_LEN)
    held_out = load_tokens(tokenizer, [], tokens=TOKENS, seq_len=SEQ_LEN, part="evaluation")
    rows: list[tuple[str, Form, Fidelity]] = []
    depth = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    with building(out, force=force) as folder:
        statistics = folder / "statistics"
        with progress.stage("calibrate", TOKENS * depth, "tokens x layers") as advance:
            calibrate(model, statistics, data, Calibration(), force=True, advance=advance)
        for method in METHODS:
            with progress.stage(method, 2 * TOKENS * depth, "tokens x layers") as advance:
                made = plan(model, statistics, None, Request(method=method, keep=KEEP))
                applied = apply(model, made, folder / method, force=True)
                rows.append((method, applied.form, evaluate(folder / method, held_out, against=model, advance=advance)))
        results = {method: {"form": form, **fidelity.as_json()} for method, form, fidelity in rows}
        write_atomic(folder / "results.json", json.dumps({"keep": KEEP, "methods": results}, indent=2) + "\n")
    with progress.stage("generate", 2, "models") as advance:
        before, after = (generate(each, PROMPT) for each in (model, out / DEFAULT_METHOD))
        advance(2)
    return Demo(out, rows, before, after)
