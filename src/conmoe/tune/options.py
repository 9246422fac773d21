"""What can be asked of a tuning run, and what is refused by looking at the request alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers.utils.import_utils import is_accelerate_available

from conmoe.data import TokenData
from conmoe.types import UsageError

Mode = Literal["experts", "router", "prune"]


@dataclass(frozen=True, slots=True)
class Tuning:
    """The options of a tuning run; the defaults are CD-MoE's, where it names one, and those of pruning MC-SMoE's."""

    mode: Mode = "experts"
    learning_rate: float = 1e-5  # the highest; it falls linearly to zero
    batch: int = 8  # sequences
    epochs: int = 1
    warmup: float = 0.0  # share of the steps over which the learning rate rises
    temperature: float | None = None  # of both distributions; None: 1 in the mode "router", 2 in "prune"
    seed: int = 0  # of the order of the text
    device: str = "cpu"
    dtype: torch.dtype | None = None  # in which the model computes; None: float32, or bfloat16 on a GPU
    gradient_checkpointing: bool = False
    save_steps: int = 100  # between two checkpoints to go on from
    trust_remote_code: bool = False
    # Of the mode "prune" alone:
    ratio: float = 0.1  # share of the rows (or columns) beside the low ranks that is left in the end
    distillation: float = 0.2  # weight of KL(source || model) beside the loss of language modelling
    prune_start: float = 0.04  # share of the steps after which the first lines go
    prune_end: float = 0.84  # share of the steps after which the last have gone

    @property
    def has_teacher(self) -> bool:
        """Whether the source's distribution is part of the loss."""
        return self.mode == "router" or (self.mode == "prune" and self.distillation > 0)

    @property
    def softening(self) -> float:
        """The temperature, or its default."""
        if self.temperature is not None:
            return self.temperature
        return 2.0 if self.mode == "prune" else 1.0


def check_options(options: Tuning, data: TokenData | None, held_out: TokenData | None, against: Path | None) -> None:
    """Raise a UsageError for everything that is wrong with a request without looking at the model."""
    if not is_accelerate_available():
        raise UsageError('Tuning needs accelerate, which is not installed: pip install "conmoe[tune]".')
    if options.mode not in ("experts", "router", "prune"):
        raise UsageError(f"--mode takes experts, router or prune, not {options.mode!r}.")
    if options.has_teacher and against is None:
        other = " (or --distillation 0)" if options.mode == "prune" else ""
        raise UsageError(f"--mode {options.mode} learns from the source model; name it with --against SOURCE{other}.")
    if not (math.isfinite(options.learning_rate) and options.learning_rate > 0):
        raise UsageError(f"The learning rate must be a number above 0, not {options.learning_rate}.")
    if not (math.isfinite(options.softening) and options.softening > 0):
        raise UsageError(f"The temperature must be a number above 0, not {options.softening}.")
    if min(options.batch, options.epochs, options.save_steps) < 1 or not 0 <= options.warmup < 1:
        raise UsageError("Batch, epochs and steps between checkpoints start at 1; the warm-up is a share below 1.")
    if options.dtype == torch.float16:
        raise UsageError("float16 has too little range for gradients; tune in bfloat16 or float32.")
    if options.device not in ("cpu", "cuda", "cuda:0"):
        raise UsageError(f"Tuning runs on cpu or on the first GPU, not on {options.device}; set CUDA_VISIBLE_DEVICES.")
    _check_pruning(options)
    if data is not None:
        _check_text(options, data, held_out)


def _check_pruning(options: Tuning) -> None:
    if not 0 <= options.ratio <= 1:
        raise UsageError(f"The ratio is the share of the lines that stay, between 0 and 1, not {options.ratio:g}.")
    if not (math.isfinite(options.distillation) and options.distillation >= 0):
        raise UsageError(f"The weight of distillation must be a number from 0 on, not {options.distillation}.")
    if not 0 <= options.prune_start <= options.prune_end <= 1:
        raise UsageError(
            "Pruning starts and ends after shares of the steps between 0 and 1, the start first, "
            f"not {options.prune_start:g} and {options.prune_end:g}."
        )


def _check_text(options: Tuning, data: TokenData, held_out: TokenData | None) -> None:
    N, S = data.ids_NS.shape
    if options.batch > N or S < 2:
        raise UsageError(
            f"The text has {N} sequences of {S} tokens, too short for a batch of {options.batch}; give more text."
        )
    if held_out is not None:
        trained = {tuple(row) for row in data.ids_NS.tolist()}
        if any(tuple(row) in trained for row in held_out.ids_NS.tolist()):
            raise UsageError("The held-out text holds sequences that are trained on; measure on other text.")
