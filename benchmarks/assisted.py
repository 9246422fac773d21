"""How often does a source model keep what its compressed form drafts? Transformers' assisted decoding, greedy.

    python benchmarks/assisted.py SOURCE DRAFT... [--output results.json]

A draft proposes five tokens, its source checks them all in one pass and keeps those that it would have chosen itself,
so the text is the source's own. Counted on prompts from the evaluation part of the built-in text: the share of proposed
tokens that were kept, and the passes of the source for each token of text. The source as its own draft is the most that
can be had.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import conmoe

PROPOSED = 5


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        model.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    def since_last(self) -> int:
        count, self.count = self.count, 0
        return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("drafts", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = conmoe.load_tokenizer(options.source)
    wanted = options.prompts * options.prompt_tokens
    data = conmoe.load_tokens(tokenizer, [], tokens=wanted, seq_len=options.prompt_tokens, part="evaluation")
    prompts = list(data.ids_NS[: options.prompts].split(1))
    source = load(options.source)
    rows = {}
    for folder in (options.source, *options.drafts):
        rows[folder.name] = measure(source, load(folder), prompts, options.new_tokens)
        print(folder.name, json.dumps(rows[folder.name]), flush=True)
    if options.output:
        settings = {"proposed": PROPOSED, "prompts": options.prompts, "new_tokens": options.new_tokens}
        options.output.write_text(json.dumps({**settings, "drafts": rows}, indent=2) + "\n")


def measure(source: PreTrainedModel, draft: PreTrainedModel, prompts: list[torch.Tensor], new: int) -> dict[str, Any]:
    """Means over prompts with their standard errors; a difference in the text is an error."""
    draft.generation_config.num_assistant_tokens = PROPOSED
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    greedy = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    checking, drafting = Passes(source), Passes(draft)
    kept, passes = [], []
    for ids in prompts:
        alone = source.generate(ids, **greedy)
        checking.since_last()
        if not torch.equal(source.generate(ids, assistant_model=draft, **greedy), alone):
            raise AssertionError("assisted decoding changed the text")
        checked, drafted = checking.since_last(), drafting.since_last()
        # Each pass of the source gives one token of its own beside those that it keeps.
        kept.append((new - checked) / drafted)
        passes.append(checked / new)
    return {"kept": mean(kept), "source_passes_per_token": mean(passes)}


def mean(values: list[float]) -> dict[str, float]:
    return {"value": statistics.fmean(values), "stderr": statistics.stdev(values) / len(values) ** 0.5}


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


if __name__ == "__main__":
    main()
