"""Calibration text that a model writes by itself, for where there is none of its users'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe.artifacts import building, fingerprint, write_atomic
from conmoe.data import load_tokenizer
from conmoe.types import UsageError
from conmoe.whole import load_whole

#: The file in the folder of the text.
TEXT = "text.jsonl"
#: Between the seeds of two batches, so that neighbouring seeds do not write each other's documents.
_STRIDE = 1_000_003


def write_text(
    model: Path,
    out: Path,
    *,
    tokens: int = 65536,
    length: int = 512,
    batch: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    force: bool = False,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Path:
    """Let a model write documents, each sampled from nothing but the token that begins one.

    What comes is text as the model believes it to be, in the shares of what it was trained on (data-free calibration
    as in LLM-QAT, arXiv 2305.17888; there the first token is drawn from the vocabulary and the next few are greedy,
    here all are sampled). The whole model is loaded, unlike for calibration itself.

    Args:
        model: the source checkpoint.
        out: a folder for the text. A killed run goes on where it was, at the last whole batch.
        tokens: how many to write at least.
        length: tokens of a document at most; it also ends where the model ends it.
        batch: documents that are written at once.
        temperature: of sampling; 1 is the model's own distribution.
        seed: the same seed writes the same text on the same machine.
        advance: called with the number of tokens written.

    Returns:
        the file, ``OUT/text.jsonl``, one ``{"text": ...}`` a line, as ``--data`` reads it.

    Raises:
        UsageError: ``out`` exists, there is nothing to sample, or no token to begin with.
    """
    if temperature <= 0:
        raise UsageError("At a temperature of 0 all documents are the same; give one above 0.")
    if min(tokens, length, batch) < 1:
        raise UsageError("Tokens, the length of a document and the batch are numbers of 1 and more.")
    key = fingerprint([str(model.resolve()), tokens, length, batch, temperature, seed])
    with building(out, force=force, key=key) as folder:
        loaded = load_whole(model, device=device, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        end = tokenizer.eos_token_id
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        if first is None:
            raise UsageError(f"The tokenizer of {model} has no token that begins or ends a text; give text (--data).")
        written = number = 0
        while written < tokens:
            file = folder / f"{number:06}.jsonl"
            if not file.is_file():
                ids_BS = _sample(loaded, first, end, batch, length, temperature, seed + _STRIDE * number)
                documents = [_document(row, end) for row in ids_BS.tolist()]
                lines = [
                    {"text": tokenizer.decode(ids, skip_special_tokens=True), "tokens": len(ids)} for ids in documents
                ]
                write_atomic(
                    file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines if line["text"])
                )
            with file.open(encoding="utf-8") as stream:  # splitlines() would split at U+2028 within a text
                count = sum(json.loads(line)["tokens"] for line in stream)
            if not count and number >= 2:
                raise UsageError(f"{model} ends every document at once; give text (--data).")
            written, number = written + count, number + 1
            advance(count)
        parts = sorted(folder.glob("[0-9]*.jsonl"))
        write_atomic(folder / TEXT, "".join(part.read_text(encoding="utf-8") for part in parts))
        for part in parts:
            part.unlink()
    return out / TEXT


def _sample(model: Any, first: int, end: int | None, batch: int, length: int, temperature: float, seed: int) -> Tensor:
    """``batch`` continuations of ``first``, padded with ``end``."""
    begun = torch.full((batch, 1), first, device=model.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        out: Tensor = model.generate(
            begun,
            attention_mask=torch.ones_like(begun),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,  # whatever the checkpoint's own settings ask for, this is to be its distribution
            max_new_tokens=length,
            eos_token_id=end,
            pad_token_id=first if end is None else end,
        )
    return out[:, 1:]


def _document(ids: list[int], end: int | None) -> list[int]:
    """What was written before the end."""
    return ids[: ids.index(end)] if end in ids else ids
