"""What a plan that redirects loses without its map, and how much of it conmoe slice gets back.

    python benchmarks/slicing.py MODEL --data TEXT... --eval NAME=TEXT... [--keep 0.5] [--output results.json]

The same statistics make a plan as published and one that is reconstructed layer after layer. Of both: the shared form,
the sliced form with the map dropped, and what conmoe slice makes; beside them a plan made for the sliced form at once.
KL to the source in nats per token on each text, with its standard error over sequences, and seconds of planning.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conmoe
from conmoe.types import Plan


def main() -> None:
    options = _parse()
    tokenizer = conmoe.load_tokenizer(options.model)

    def read(files: list[str], tokens: int) -> conmoe.TokenData:
        specs = [conmoe.parse_spec(file) for file in files]
        return conmoe.load_tokens(tokenizer, specs, tokens=tokens, seq_len=256)

    texts = {
        name: read([file], options.eval_tokens) for name, _, file in (each.partition("=") for each in options.eval)
    }
    fit = {"steps": options.steps, "batch": 1024}
    plain = conmoe.Request(keep=options.keep)
    fitted = conmoe.Request(
        keep=options.keep, sequential=True, sample=options.sample, refine="reconstruct", refine_options=fit
    )
    direct = conmoe.Request(
        keep=options.keep,
        form="sliced",
        sequential=True,
        sample=options.sample,
        refine="reconstruct",
        refine_options=fit,
    )
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        statistics = work / "statistics"
        conmoe.calibrate(options.model, statistics, read(options.data, options.tokens), conmoe.Calibration())

        def record(name: str, form: Any, make: Callable[[], Plan]) -> Plan:
            start = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - start
            conmoe.apply(options.model, made, work / "out", form=form, force=True)
            found = {text: conmoe.evaluate(work / "out", data, against=options.model) for text, data in texts.items()}
            rows[name] = {"seconds": round(seconds), **{text: each.as_json()["kl"] for text, each in found.items()}}
            print(name, rows[name], flush=True)
            return made

        def sliced(made: Plan, refine: str, sample: int) -> Plan:
            fitting = fit if refine == "reconstruct" else {}
            return conmoe.slice_plan(
                options.model, statistics, made, refine=refine, refine_options=fitting, sample=sample
            ).plan

        for name, request in (("as published", plain), ("reconstructed", fitted)):
            made = record(
                f"{name}: shared",
                "shared",
                lambda request=request: conmoe.plan(options.model, statistics, request=request),
            )
            record(f"{name}: map dropped", "sliced", lambda made=made: made)
            record(f"{name}: slice, rows only", "sliced", lambda made=made: sliced(made, "none", 0))
            record(f"{name}: slice", "sliced", lambda made=made: sliced(made, "reconstruct", options.sample))
        record("sliced from the start", "sliced", lambda: conmoe.plan(options.model, statistics, request=direct))
    if options.output:
        options.output.write_text(
            json.dumps({"model": options.model.name, "keep": options.keep, "rows": rows}, indent=2)
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--eval", nargs="+", required=True, metavar="NAME=TEXT")
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--sample", type=int, default=8192, help="tokens of each layer that weights are fitted to")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
