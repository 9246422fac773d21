"""A quick look at what a model writes."""

from __future__ import annotations

from pathlib import Path

import torch

from conmoe.data import load_tokenizer
from conmoe.types import UsageError
from conmoe.whole import check_whole, load_whole


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
    check_whole(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    if not tokenizer(prompt)["input_ids"]:
        raise UsageError("The prompt is empty; give a text to continue.")
    loaded = load_whole(model, device=device, trust_remote_code=trust_remote_code)
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
