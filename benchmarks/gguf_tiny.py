"""Tiny random checkpoints, whole and sliced, that llama.cpp can load, for benchmarks/gguf_check.py.

    python benchmarks/gguf_tiny.py OUT [FAMILY...]

Of each family ``OUT/FAMILY`` with 8 experts and ``OUT/FAMILY-sliced`` with 4: planned, refitted and written in the
sliced form. They differ from those of the tests in what llama.cpp wants: a tokenizer with merges, and as many key heads
as query heads in OLMoE. Run from the root of the repository.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

import conmoe
from conmoe.data import SourceCount
from tests.families import save_tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v2": {"n_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {"scoring_func": "sigmoid"},  # as published; without it llama.cpp takes a softmax
    "gpt_oss": {},
    "granitemoe": {},
    "qwen3_next": {},
    "qwen3_5_moe_text": {},
}
MERGES = [("t", "h"), ("i", "n"), ("e", "r"), ("th", "e")]
VOCAB = 254 + 2 + len(MERGES)


def main(arguments: Sequence[str]) -> None:
    out = Path(arguments[0])
    for family in arguments[1:] or FAMILIES:
        source = save_tiny(family, out / family, vocab_size=VOCAB, **FAMILIES[family])
        tokenizer().save_pretrained(source)
        ids = torch.randint(0, 250, (16, 64), generator=torch.Generator().manual_seed(0))
        text = conmoe.TokenData(ids, (SourceCount("random", 1.0, 16, 1),), "random", ("random",))
        conmoe.calibrate(source, out / f"{family}.stats", text, conmoe.Calibration(sample=1024), force=True)
        request = conmoe.Request(method="conmoe", keep="4", form="sliced", refine="refit")
        plan = conmoe.plan(source, out / f"{family}.stats", request=request)
        conmoe.apply(source, plan, out / f"{family}-sliced", form="sliced", force=True)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, four merges, padding and end of text; splits text as GPT-2's does."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\u00fe", "\u00ff"})
    words = [*letters, "<|pad|>", "<|end|>", *("".join(pair) for pair in MERGES)]
    made = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")


if __name__ == "__main__":
    main(sys.argv[1:])
