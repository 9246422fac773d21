"""The model card of a result: what it is, how it was made, and what is not known about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from conmoe.forms import is_approximate, is_condensed
from conmoe.refine import NONE
from conmoe.registry import Form, get_method
from conmoe.types import Plan

_LOADING = {
    "sliced": "It has the layout of the source family with fewer experts, and loads where that family does.",
    "expanded": "It loads wherever the source loads and saves no memory; it exists to evaluate the plan on any engine.",
    "shared": (
        "Load it with `trust_remote_code=True` (the modelling file is in this repository), or `import conmoe` first."
    ),
}


def model_card(source: Path, plan: Plan, form: Form) -> str:
    """The card as Markdown with metadata; licence and languages are handed over from the source's card."""
    inherited = _metadata(source)
    data = ModelCardData(
        base_model=_name(source),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["conmoe", "moe", "compression", plan.method],
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        language=inherited.get("language"),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(source, plan, form)}"


def _body(source: Path, plan: Plan, form: Form) -> str:
    sizes = sorted({scope.plan.mixing_KE.shape[0] for scope in plan.scopes})
    experts = plan.scopes[0].plan.assignment_E.numel()
    options = ", ".join(f"{name}={value}" for name, value in plan.options.items()) or "none"
    lines = [
        f"# {_name(source)}, consolidated with conmoe",
        "",
        f"{' to '.join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))} of {experts} routed experts per "
        f"{'layer' if len(plan.scopes[0].layers) == 1 else 'scope'} are stored; {_router(plan, form)} {_LOADING[form]}",
        "",
        "| | |",
        "|---|---|",
        f"| method | `{plan.method}` ({get_method(plan.method).paper}) |",
        f"| options | {options} |",
        f"| keep, budget | {plan.keep}, {plan.budget} |",
        f"| refinement | {_refinement(plan)} |",
        f"| decoder layers | {', '.join(str(index) for scope in plan.scopes for index in scope.layers)} |",
        f"| form | {form} |",
        f"| conmoe | {plan.version} |",
        f"| source fingerprint | `{plan.source}` |",
        f"| statistics fingerprint | `{plan.statistics}` |",
        "",
        "The plan (which prototype answers for each expert) is in `conmoe/plan.json`.",
    ]
    lines += _fitted(plan)
    condensed = sorted(index for scope in plan.scopes if is_condensed(scope) for index in scope.layers)
    if condensed:
        stored = "folded into one dense MLP each" if form == "sliced" else "with constant gates"
        lines += [
            "",
            f"Condensed: layers {', '.join(map(str, condensed))} have no router; the experts left there, if any, "
            f"answer every token, {stored}.",
        ]
    if is_approximate(plan, form):
        lines += ["", "**Approximation:** the plan redirects experts, and cutting router rows drops them instead."]
    lines += [
        "",
        "Not tested by the tool: tasks, generation quality, safety, languages outside the calibration text.",
        "",
    ]
    return "\n".join(lines)


def _refinement(plan: Plan) -> str:
    options = ", ".join(f"{name}={value}" for name, value in plan.refine_options.items())
    way = f", each layer on {plan.sequential:,} tokens behind compressed layers" if plan.sequential else ""
    return f"{plan.refine}{f' ({options})' if options else ''}{way}"


def _fitted(plan: Plan) -> list[str]:
    """What is no copy, in a sentence."""
    layers = [scope.plan for scope in plan.scopes]
    names = {name for layer in layers for name in layer.weights}
    if plan.refine == NONE or not (names or any(bool((layer.gain_E != 1).any()) for layer in layers)):
        return []
    what = "all weights of the experts stored" if "gate_EID" in names else "the down projections of the experts stored"
    what = what if names else "multipliers of the gates"
    rows = ", and the rows left of the routers," if any(layer.router_KD is not None for layer in layers) else ""
    return ["", f"Not copies: {what}{rows} were fitted, layer by layer, to what the source's layers put out."]


def _router(plan: Plan, form: Form) -> str:
    """What has become of the routers, in a sentence."""
    if any(scope.plan.static_K is not None for scope in plan.scopes):
        return "condensed layers have lost their routers."
    if form == "sliced" or any(bool((scope.plan.assignment_E < 0).any()) for scope in plan.scopes):
        return "the routers have lost the rows of the others."
    return "the routers are untouched, and choose among all experts as before."


def tuning_section(record: Mapping[str, Any]) -> str:
    """What the card says of a tuning, from its record (:mod:`conmoe.tune`); it follows the card of the checkpoint."""
    options, data = record["options"], record["data"]
    what, towards = {
        "experts": ("experts of the layers that the plan changed", "language modelling"),
        "router": ("routers", "KL(source \\|\\| model)"),
        "prune": (
            "low ranks of the experts, and the rows or columns beside them",
            f"language modelling, and {options['distillation']:g} of KL(source \\|\\| model)",
        ),
    }[record["mode"]]
    rows = [
        ("tuned", f"{record['parameters']:,} parameters: the {what}"),
        ("towards", towards),
        ("text", f"{data['sequences']:,} sequences of {data['seq_len']:,} tokens: {'; '.join(data['sources'])}"),
        ("steps", f"{record['steps']:,} of {options['batch']} sequences, learning rate {options['learning_rate']:g}"),
        *([("rows or columns left", "{:,} of {:,}".format(*record["lines"]))] if record["lines"] else []),
        ("seed", options["seed"]),
        ("fingerprint before tuning", f"`{record['model']}`"),
    ]
    for title, fidelity in (("before", record["before"]), ("after", record["after"])):
        if fidelity:
            numbers = [f"loss {fidelity['loss']['value']:.4f}"]
            numbers += [f"KL from the source {fidelity['kl']['value']:.4f}"] if fidelity["kl"] else []
            rows.append((f"held-out text, {title}", f"{', '.join(numbers)} ({fidelity['tokens']:,} tokens)"))
    lines = ["", "## Tuned after compression", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += [
        "",
        "Every tensor that was not tuned is that of the compressed checkpoint. More in `conmoe/tuning.json`.",
        "",
    ]
    return "\n".join(lines)


def _name(source: Path) -> str:
    """The source as people know it; the hub's cache keeps a model in ``models--owner--name/snapshots/commit``."""
    cached = next((part for part in source.parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/", 1) if cached else source.name


def _metadata(source: Path) -> dict[str, Any]:
    readme = source / "README.md"
    if not readme.is_file():
        return {}
    try:
        return dict(ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # a card that cannot be parsed has nothing to hand over, and is no reason to fail
        return {}
