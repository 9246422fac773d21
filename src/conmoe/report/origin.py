"""Where a result comes from, as far as its source's folder tells, and what the source's card hands over."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from conmoe.report.escape import one_line

_HANDED = ("license", "license_name", "license_link", "language", "datasets")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MOST = 100  # entries of a list


@dataclass(frozen=True, slots=True)
class Origin:
    """The source: its name, and what it is called on the hub where that is known."""

    name: str
    hub_name: str = ""
    revision: str = ""  # the commit

    @property
    def short(self) -> str:
        """Without its owner."""
        return self.name.rpartition("/")[2]


def origin(source: Path) -> Origin:
    """The hub's cache keeps a model in ``models--owner--name/snapshots/commit``; any other folder has its name only.

    A folder's own name is no name on the hub, even where the hub has a model that is called so.
    """
    for index, part in enumerate(source.parts):
        name = part.removeprefix("models--").replace("--", "/", 1)
        if part.startswith("models--") and _HUB_NAME.fullmatch(name):
            rest = source.parts[index + 1 :]
            return Origin(name, name, one_line(rest[1]) if len(rest) > 1 and rest[0] == "snapshots" else "")
    return Origin(one_line(source.name) or "a model")


def handed_over(source: Path) -> dict[str, Any]:
    """Licence, languages and data sets from the metadata of the source's card: short strings, or lists of them."""
    readme = source / "README.md"
    if not readme.is_file():
        return {}
    try:
        found = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card that cannot be parsed has nothing to hand over, and is no reason to fail
        return {}
    clean = {name: _plain(found.get(name)) for name in _HANDED}
    return {name: value for name, value in clean.items() if value}


def _plain(value: object) -> str | list[str] | None:
    if isinstance(value, bool):  # YAML reads the language code of Norwegian as a truth
        return None if value else "no"
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, list):
        return [text for each in value[:_MOST] if isinstance(text := _plain(each), str) and text]
    return None
