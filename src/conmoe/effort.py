"""How much work a compression may be: three settings of everything that decides it, for people in a hurry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Effort:
    """What is done when the user does not say otherwise."""

    what: str
    tokens: int  # of calibration
    sample: int  # tokens of each layer that its refinement is fitted to
    sequential: bool
    refine: str
    refine_options: Mapping[str, Any] = field(default_factory=dict)


#: Their fidelity is in docs/results.md, measured; their cost in docs/method.md.
EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(
        "experts chosen, their down projections refitted in closed form; minutes on a CPU", 32768, 16384, True, "refit"
    ),
    "standard": Effort(
        "experts chosen, then reconstructed layer by layer: 300 steps of 2,048 tokens",
        65536,
        65536,
        True,
        "reconstruct",
        {"steps": 300, "batch": 2048},
    ),
    "best": Effort(
        "the same with 1,000 steps of 4,096 tokens, from four times the text",
        262144,
        262144,
        True,
        "reconstruct",
        {"steps": 1000, "batch": 4096},
    ),
}
DEFAULT_EFFORT = "standard"
#: Tokens of the sample that statistics keep where the refinement draws a larger one on the way, or there is none.
PLAIN_SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for, and what the effort makes of the rest."""

    tokens: int
    sample: int  # of the statistics
    sequential: bool
    sequential_sample: int  # of each layer on the way; 0: as the statistics
    refine: str
    refine_options: Mapping[str, Any]


def settle(
    effort: str,
    method: str,
    *,
    scope: int = 1,
    options: Mapping[str, Any] | None = None,
    tokens: int | None = None,
    sample: int | None = None,
    sequential: bool | None = None,
    refine: str | None = None,
    refine_options: Mapping[str, Any] | None = None,
    refinable: bool = True,
) -> Settings:
    """What is given counts; what is None is what ``effort`` says.

    A refinement that is asked for by name leaves only the amounts of text to the effort; none at all leaves nothing to
    it, and the text is that of ``quick``. Methods that cannot be refined are not, nor are models whose experts must
    stay as they are (``refinable`` is false: those in low precision); layers that share a pool of
    prototypes are refined at once, not one after the other.

    Raises:
        UsageError: there is no such effort.
    """
    # not at the top: the command line asks for the names above before anything is worth loading
    from conmoe.refine import NONE
    from conmoe.registry import get_method
    from conmoe.request import unrefinable
    from conmoe.types import UsageError

    if effort not in EFFORTS:
        raise UsageError(f"--effort takes {', '.join(EFFORTS)}, not {effort!r}.")
    preset = EFFORTS[effort]
    fitting = dict(refine_options or {})
    asked = get_method(method)
    # layers that share a pool have no one router to ask
    alone = scope == 1 or asked.form_with(options or {}) != "sliced"
    chosen = refine or (preset.refine if refinable and alone and not unrefinable(asked) else NONE)
    if chosen == preset.refine:
        fitting = {**preset.refine_options, **fitting}
    if sequential is None:
        sequential = chosen != NONE and preset.sequential and scope == 1
    if chosen == NONE:
        return Settings(tokens or EFFORTS["quick"].tokens, sample or PLAIN_SAMPLE, sequential, 0, chosen, fitting)
    wanted = sample or preset.sample
    if not sequential:
        return Settings(tokens or preset.tokens, wanted, False, 0, chosen, fitting)
    return Settings(tokens or preset.tokens, min(wanted, PLAIN_SAMPLE), True, wanted, chosen, fitting)
