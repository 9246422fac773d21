"""What is worth saying about a result besides where it is."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from conmoe.apply import Applied
from conmoe.cli.console import say
from conmoe.data import TokenData, overlap
from conmoe.diagnosis import Advice
from conmoe.forms import is_approximate
from conmoe.mtp import note
from conmoe.registry import Form
from conmoe.types import Plan


def protected(made: Plan) -> None:
    for layer, experts in made.protected.items():
        say(f"Protected in layer {layer}: {', '.join(map(str, experts))}.")


def approximate(made: Plan, form: Form) -> None:
    if not is_approximate(made, form):
        return
    plans = [scope.plan for scope in made.scopes]
    redirected = sum(max(0, int((plan.assignment_E >= 0).sum()) - plan.mixing_KE.shape[0]) for plan in plans)
    predicted = [plan.predicted_error for plan in plans if isfinite(plan.predicted_error)]
    mean = f"{sum(predicted) / len(predicted):.3f}" if predicted else ""
    error = f" The plan's predicted error, {mean} on average, holds with its map only." if mean else ""
    say(
        f"Note: the sliced form cannot redirect: {redirected} experts that the plan redirects lose their router rows."
        f"{error} conmoe slice measures what that loses, and makes the best sliced plan of it."
    )


def left_out(applied: Applied) -> None:
    unread = [name for name in applied.dropped if name not in applied.heads.dropped]
    if unread:
        say(f"Left out {len(unread)} tensors that the model class does not read, such as {unread[0]}.")
    if applied.heads.policy:
        say(note(applied.heads))


def advice(warnings: Sequence[Advice]) -> None:
    for warning in warnings:
        say(f"Warning: {warning.text}")


def overlapping(text: TokenData, documents: Sequence[str]) -> None:
    share = overlap(text.documents, documents)
    if share > 0:
        say(f"Warning: {share:.0%} of the documents measured on were calibrated on; the numbers are too good.")
