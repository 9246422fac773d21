"""A checkpoint loaded whole, as its users load it: what writing text, answering tasks and timing stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from conmoe import runtime
from conmoe.source import Source, open_source


def load_whole(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The model of a checkpoint, in evaluation mode on ``device``, in ``dtype`` or the checkpoint's own.

    Raises:
        UsageError, ConmoeError: the headers do not fit the model; Transformers would invent what is missing.
    """
    check_whole(folder, trust_remote_code=trust_remote_code)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code
    )
    return loaded.to(device).eval()


def check_whole(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """The checkpoint by its headers, checked to hold every tensor of its model."""
    runtime.register()
    return open_source(folder, trust_remote_code=trust_remote_code)
