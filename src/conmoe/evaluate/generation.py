"""What a model writes: does it repeat itself, run in circles, stop when its source stops.

Model and source continue the same prompts, greedily unless a temperature is given. Every number is a mean over
prompts; differences are taken prompt by prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe.data import load_tokenizer
from conmoe.evaluate.health import REPEATED_N, agreed, distinct, loop_period, repetition
from conmoe.evaluate.paired import as_json, difference, mean
from conmoe.parallel import refuse_several
from conmoe.progress import SILENT, Progress
from conmoe.types import UsageError
from conmoe.whole import check_whole, load_whole

#: A prompt that is cut from text is this long, and so many are cut.
CUT_TOKENS, CUT_PROMPTS = 32, 32


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How long, how random (0: greedy; above, all tokens are drawn from), how many prompts of one length at a time."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True, slots=True)
class Written:
    """The new tokens of one prompt, without the end-of-text token, and whether that came."""

    tokens: tuple[int, ...]
    ended: bool

    @property
    def closed(self) -> tuple[int, ...]:
        """The tokens with their end: stopping is a choice like any other where two models are held side by side."""
        return (*self.tokens, -1) if self.ended else self.tokens


#: What is measured of each generation, and its unit.
MEASURES: Mapping[str, Callable[[Written], float]] = {
    "repetition": lambda each: repetition(each.tokens),
    "loops": lambda each: float(loop_period(each.tokens) is not None),
    "length": lambda each: float(len(each.tokens)),
    "ended": lambda each: float(each.ended),
    "distinct_1": lambda each: distinct(each.tokens, 1),
    "distinct_2": lambda each: distinct(each.tokens, 2),
    "distinct_3": lambda each: distinct(each.tokens, 3),
}
UNITS = {
    "repetition": f"share of {REPEATED_N}-grams that stood earlier in the generation",
    "loops": "share of generations that end in a cycle",
    "length": "new tokens",
    "ended": "share of generations that end by themselves",
    **{f"distinct_{n}": f"different {n}-grams as a share of all" for n in (1, 2, 3)},
    "equal_tokens": "tokens before model and source part",
    "identical": "share of generations that are the same",
}


def read_prompts(file: Path, tokenizer: Any) -> list[list[int]]:
    """The prompts of a file as token ids: a text on each line, or ``.jsonl`` with ``prompt``, ``text`` or ``messages``.

    Raises:
        UsageError: no such file, an empty prompt, or a line that is none of this.
    """
    if not file.is_file():
        raise UsageError(f"--prompts {file} does not exist; it is a file with a prompt on each line.")
    # not splitlines(), which also splits at characters that stand in texts and, unescaped, in JSON
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"--prompts {file} is empty; it is a file with a prompt on each line.")
    read = _record_ids if file.suffix == ".jsonl" else _text_ids
    prompts = []
    for number, line in enumerate(lines, 1):
        ids = read(line, tokenizer)
        if not ids:
            raise UsageError(f"--prompts {file}: prompt {number} holds no text; give prompt, text or messages.")
        prompts.append(ids)
    return prompts


def cut_prompts(ids_NS: Tensor, count: int = CUT_PROMPTS, length: int = CUT_TOKENS) -> list[list[int]]:
    """The first ``length`` tokens (of short sequences the first half) of ``count`` sequences, evenly spaced."""
    length, count = min(length, max(1, ids_NS.shape[1] // 2)), min(count, len(ids_NS))
    places = [place * len(ids_NS) // count for place in range(count)]
    return [list(map(int, row)) for row in ids_NS[places, :length]]


def evaluate_generation(
    model: Path,
    prompts: Sequence[Sequence[int]],
    *,
    against: Path | None = None,
    options: GenerationOptions = GenerationOptions(),
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Let a model and its source continue prompts, and measure what they write.

    Args:
        model: a checkpoint, compressed or not; it is loaded whole.
        prompts: token ids of each.
        against: the source to compare with; loaded before the model, not beside it.
        options: length, temperature, seed.
        device: where to compute.
        dtype: in which to compute; by default each checkpoint's own.
        trust_remote_code: run modelling code that comes with a checkpoint.
        progress: where the stages report to.

    Returns:
        ``model``, ``source`` and ``difference`` (model - source, by prompt), each measure with its standard error over
        prompts; ``agreement``: how long the two write the same; how it was made, and ``units``.
    """
    refuse_several("evaluate --generate")
    if not prompts:
        raise UsageError("There is no prompt to continue.")
    _check(prompts, [folder for folder in (against, model) if folder], options, trust_remote_code)
    written: dict[str, list[Written]] = {}
    for name, folder in (("source", against), ("model", model)):
        if folder is not None:
            loaded = load_whole(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            pad = load_tokenizer(folder, trust_remote_code=trust_remote_code).pad_token_id or 0
            with progress.stage(f"generate, {name}", len(prompts), "prompts") as advance:
                written[name] = _continue(loaded, prompts, options, pad, advance)
            del loaded
    return _record(written, prompts, options)


def _check(
    prompts: Sequence[Sequence[int]], folders: Sequence[Path], options: GenerationOptions, trust_remote_code: bool
) -> None:
    sizes = [check_whole(folder, trust_remote_code=trust_remote_code) for folder in folders]
    if len({each.vocabulary for each in sizes}) > 1:
        raise UsageError("The two models have different vocabularies; what they write cannot be compared.")
    if max(map(max, prompts)) >= sizes[0].vocabulary:
        raise UsageError("The prompts have token ids beyond the model's vocabulary; the tokenizer does not fit.")
    longest = max(map(len, prompts)) + options.max_new_tokens
    room = getattr(sizes[-1].config, "max_position_embeddings", None) or longest
    if longest > room:
        raise UsageError(
            f"The longest prompt and {options.max_new_tokens} new tokens are {longest} positions, the model has "
            f"{room}; lower --max-new-tokens."
        )


def _continue(
    loaded: Any, prompts: Sequence[Sequence[int]], options: GenerationOptions, pad: int, advance: Callable[..., None]
) -> list[Written]:
    """Prompts of one length are continued together, so that nothing is padded on the left."""
    from transformers import GenerationConfig

    ends = loaded.generation_config.eos_token_id
    ends = loaded.config.eos_token_id if ends is None else ends
    stops = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:  # what is left open, Transformers fills in: only the 50 likeliest tokens
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    # In place of the checkpoint's own: its penalties and sampling would hide the very loops that are looked for.
    loaded.generation_config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        **sampling,
    )
    found: list[Written | None] = [None] * len(prompts)
    for batch in _batches(prompts, options.batch_size):
        ids_BS = torch.tensor([list(prompts[index]) for index in batch], device=loaded.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(options.seed + batch[0])
            out_BS = loaded.generate(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))
        for index, row in zip(batch, out_BS[:, ids_BS.shape[1] :].tolist(), strict=True):
            found[index] = _cut(row, stops)
        advance(len(batch))
    return [each for each in found if each is not None]


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    lengths: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(index)
    return [same[start : start + size] for same in lengths.values() for start in range(0, len(same), size)]


def _cut(row: Sequence[int], stops: set[int]) -> Written:
    end = next((place for place, token in enumerate(row) if token in stops), None)
    return Written(tuple(row[:end]), end is not None)


def _record(
    written: Mapping[str, Sequence[Written]], prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> dict[str, Any]:
    values = {
        side: {name: [measure(each) for each in texts] for name, measure in MEASURES.items()}
        for side, texts in written.items()
    }
    record: dict[str, Any] = {
        "prompts": len(prompts),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "units": UNITS,
        **{side: {name: as_json(mean(rows)) for name, rows in found.items()} for side, found in values.items()},
    }
    if "source" not in written:
        return record | {"source": None, "difference": None, "agreement": None}
    pairs = [(a.closed, b.closed) for a, b in zip(written["model"], written["source"], strict=True)]
    return record | {
        "difference": {name: as_json(difference(values["model"][name], values["source"][name])) for name in MEASURES},
        "agreement": {
            "equal_tokens": as_json(mean([float(agreed(*pair)) for pair in pairs])),
            "identical": as_json(mean([float(a == b) for a, b in pairs])),
        },
    }


def _text_ids(line: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(line)["input_ids"])


def _record_ids(line: str, tokenizer: Any) -> list[int]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"--prompts: a line is no JSON ({error}).") from error
    if isinstance(row, str):
        return _text_ids(row, tokenizer)
    if not isinstance(row, dict):
        return []
    if isinstance(row.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("--prompts has chats, but the tokenizer has no chat template; give texts.")
        text = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = row.get("prompt", row.get("text"))
    return _text_ids(text, tokenizer) if isinstance(text, str) else []
