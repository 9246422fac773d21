"""The whole tool in two minutes, offline: a small trained model that ships with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from conmoe.apply import PLAN_FOLDER, apply
from conmoe.artifacts import building, write_atomic
from conmoe.calibrate import Calibration, calibrate
from conmoe.data import load_tokenizer, load_tokens
from conmoe.evaluate import Fidelity, evaluate
from conmoe.generate import generate
from conmoe.plan import plan
from conmoe.portrait import REPORT_JSON, Lost, portray
from conmoe.progress import Progress
from conmoe.registry import Form
from conmoe.report.write import REPORT_HTML, write_default
from conmoe.request import Request
from conmoe.source import open_source

KEEP = "0.5"
REQUESTS = {
    "conmoe": Request(keep=KEEP, sequential=True, refine="reconstruct", sample=16384),
    "unrefined": Request("conmoe", KEEP),
    "reap": Request("reap", KEEP),
    "frequency": Request("frequency", KEEP),
}
TOKENS, SEQ_LEN = 16384, 256
PROMPT = '    def close(self):\n        """Close the'


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made."""

    folder: Path
    rows: list[tuple[str, Form, Fidelity]]  # name, form, fidelity
    before: str  # the source's continuation of the prompt
    after: str


def demo_model() -> Path:
    """The folder of the model that ships with the package."""
    return Path(str(files("conmoe") / "assets" / "demo-model"))


def demo(out: Path, progress: Progress, *, force: bool = False) -> Demo:
    """Compress the demo model as conmoe does by default, and by three published methods, and measure all four."""
    model = demo_model()
    tokenizer = load_tokenizer(model)
    data = load_tokens(tokenizer, [], tokens=TOKENS, seq_len=SEQ_LEN)
    held_out = load_tokens(tokenizer, [], tokens=TOKENS, seq_len=SEQ_LEN, part="evaluation")
    rows: list[tuple[str, Form, Fidelity]] = []
    depth = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    source = open_source(model)
    with building(out, force=force) as folder:
        statistics = folder / "statistics"
        with progress.stage("calibrate", TOKENS * depth, "tokens x layers") as advance:
            calibrate(model, statistics, data, Calibration(), force=True, advance=advance)
        for name, request in REQUESTS.items():
            result = folder / name
            with progress.stage(name, 2 * TOKENS * depth, "tokens x layers") as advance:
                made, lost = plan(model, statistics, None, request), Lost(held_out, model)
                applied = apply(model, made, result, force=True)
                fidelity = evaluate(result, held_out, against=model, advance=advance, watch=lost)
                rows.append((name, applied.form, fidelity))
                seen = portray(source, statistics, made, lost=lost)
                write_atomic(result / PLAN_FOLDER / REPORT_JSON, seen.model_dump_json() + "\n")
        results = {name: {"form": form, **fidelity.as_json()} for name, form, fidelity in rows}
        write_atomic(folder / "results.json", json.dumps({"keep": KEEP, "methods": results}, indent=2) + "\n")
        write_default(folder, folder / REPORT_HTML, "Half of the experts of the demo model", progress)
    with progress.stage("generate", 2, "models") as advance:
        before, after = (generate(each, PROMPT) for each in (model, out / "conmoe"))
        advance(2)
    return Demo(out, rows, before, after)
