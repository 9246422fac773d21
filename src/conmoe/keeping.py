"""What can be asked of a source whose experts are in low precision: that they stay as they are.

New experts would have to be computed in full precision and rounded to a format that engines calibrate for; conmoe does
not do that, and says so before any work.
"""

from __future__ import annotations

import json
from pathlib import Path

from conmoe.checkpoint import Piece
from conmoe.lowprec import REMEDY, is_low, renumbered_modules
from conmoe.refine import NONE
from conmoe.request import Asked, Request
from conmoe.source import Source, open_source
from conmoe.types import UsageError

#: Methods that make new experts of those of the source, whatever their options.
MERGING = ("dern", "hc-smoe", "m-smoe", "mc-smoe", "mergemoe", "ream", "sub-moe")
#: Refinements that leave experts as they are, in the form that has a place for what they fit.
GAINS = "gains"


def check_keeps(source: Source, asked: Asked, request: Request) -> None:
    """Raise a UsageError if ``request`` makes new experts of a source that has its own in low precision."""
    if source.scheme is None or (asked.counts == asked.cap and request.refine == NONE):
        return
    renumbered_modules(json.loads((source.folder / "config.json").read_text()), {})
    if asked.cuts and any(is_low(piece.entry) for layer in source.layers for piece in _router(source, layer.router)):
        raise UsageError(
            f"{source.folder} stores its routers in low precision, of which no rows can be cut; use --form shared with "
            "a method that remaps."
        )
    if not source.low_experts:
        return
    what = ""
    if asked.method.name in MERGING or asked.options.get("fusion", NONE) != NONE:
        what = f"{asked.method.name!r} makes new ones"
    elif asked.method.condenses and asked.form == "sliced":
        what = f"{asked.method.name!r} folds them into dense layers in the sliced form"
    elif request.refine == GAINS and asked.form != "shared":
        what = f"--refine gains scales them in the {asked.form} form"
    elif request.refine not in (NONE, GAINS):
        what = f"--refine {request.refine} makes new ones"
    if what:
        raise UsageError(
            f"{source.folder} stores its experts in low precision ({source.scheme.name}), and {what}; {REMEDY}."
        )


def low_experts(model: Path, *, trust_remote_code: bool = False) -> str:
    """How a checkpoint stores its routed experts, if that is in low precision; else nothing."""
    source = open_source(model, trust_remote_code=trust_remote_code)
    return source.scheme.name if source.scheme and source.low_experts else ""


def _router(source: Source, path: str) -> list[Piece]:
    return [piece for name, pieces in source.layout.sources.items() if name.startswith(f"{path}.") for piece in pieces]
