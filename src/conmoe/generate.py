"""A quick look at what a model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from conmoe import runtime
from conmoe.data import load_tokenizer
from conmoe.source import open_source
from conmoe.types import UsageError


def generate(
    model: Path,
    prompt: str,
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> str:
    """The continuation of ``prompt``, greedy unless a temperature is given; the whole model is loaded."""
    loaded, tokenizer = open_writer(model, device, trust_remote_code=trust_remote_code)
    if not tokenizer(prompt)["input_ids"]:
        raise UsageError("The prompt is empty; give a text to continue.")
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        out = loaded.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def open_writer(model: Path, device: str, *, trust_remote_code: bool) -> tuple[Any, PreTrainedTokenizerBase]:
    """The whole model, ready to generate, and its tokenizer."""
    runtime.register()
    open_source(model, trust_remote_code=trust_remote_code)  # Transformers would invent what is missing
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=trust_remote_code)
    return loaded.to(device).eval(), tokenizer
