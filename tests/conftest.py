"""Checkpoints and statistics of tiny real models, made once for the whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import conmoe
from conmoe.data import SourceCount
from conmoe.progress import SILENT
from tests.families import save_tiny

SEQUENCES, SEQ_LEN = 12, 24

Checkpoint = Callable[[str], Path]


def token_data(sequences: int = SEQUENCES, seq_len: int = SEQ_LEN, seed: int = 0) -> conmoe.TokenData:
    """Random token ids that every tiny model can read."""
    ids = torch.randint(0, 250, (sequences, seq_len), generator=torch.Generator().manual_seed(seed))
    return conmoe.TokenData(ids, (SourceCount("random", 1.0, sequences, 1),), f"seed {seed}", ("document",))


def measured_half(model: Path, folder: Path) -> Path:
    """A result of :func:`conmoe.compress` with all that is measured by default: ``folder/half``."""
    conmoe.compress(
        model,
        folder / "half",
        folder / "work",
        token_data(),
        conmoe.Request(keep="0.5"),
        SILENT,
        calibration=conmoe.Calibration(sample=128),
        held_out=token_data(4, 24, seed=9),
        command=f"conmoe compress {model.name} half --keep 0.5",
    )
    return folder / "half"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``checkpoint(family)``: the folder of a tiny model; never written to."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def calibrated(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``calibrated(family)``: statistics of that model."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("statistics") / family
            conmoe.calibrate(checkpoint(family), made[family], token_data(), conmoe.Calibration(sample=128, batch=4))
        return made[family]

    return get
