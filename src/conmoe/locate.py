"""MODEL as users write it: a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from conmoe.shards import Entry, read_entries
from conmoe.types import ConmoeError, UsageError

_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*"]
T = TypeVar("T")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str) -> Path:
    """The local folder of ``model``; a hub model is downloaded first (or taken from the cache, when offline).

    Raises:
        UsageError: neither a folder nor a model that the hub knows.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UsageError(f"{model} is a file; a model is a folder or a hub name such as allenai/OLMoE-1B-7B-0125.")
    if not _HUB_NAME.fullmatch(model) or model.startswith((".", "/")):
        raise UsageError(f"{model} does not exist; a model is a folder or a hub name such as allenai/OLMoE-1B-7B-0125.")
    return _asked(model, lambda: Path(snapshot_download(model, allow_patterns=[*_SMALL, "*.safetensors"])))


def locate_headers(model: str) -> tuple[Path, dict[str, Entry] | None]:
    """Like :func:`locate`, but of a hub model only the small files and the headers of the weights are downloaded."""
    if Path(model).expanduser().exists() or not _HUB_NAME.fullmatch(model):
        return locate(model), None
    folder = _asked(model, lambda: Path(snapshot_download(model, allow_patterns=_SMALL)))
    with suppress(ConmoeError):  # its weights are in the cache already, so the hub need not be asked
        return folder, read_entries(folder)
    metadata = _asked(model, lambda: get_safetensors_metadata(model))
    entries = {
        name: Entry(
            name, info.dtype, tuple(info.shape), folder / file, info.data_offsets[0], _length(info.data_offsets)
        )
        for file, part in metadata.files_metadata.items()
        for name, info in part.tensors.items()
    }
    return folder, entries


def _length(offsets: tuple[int, int]) -> int:
    return offsets[1] - offsets[0]


def _asked(model: str, question: Callable[[], T]) -> T:
    """The hub's answer, or one sentence."""
    try:
        return question()
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(f"{model} is neither a folder here nor a model on the hub.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UsageError(
            f"{model} is no folder here, and the hub could not be asked (offline, and not in its cache)."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ConmoeError(f"Asking the hub for {model} failed: {str(error).splitlines()[0]}") from error
