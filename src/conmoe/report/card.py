"""The model card of a result: what it is, how it was made, and what is not known about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from conmoe.forms import is_approximate, is_condensed
from conmoe.refine import NONE
from conmoe.registry import Form, get_method
from conmoe.report.escape import code, escaped
from conmoe.report.measured import text_names
from conmoe.report.origin import Origin, handed_over, origin
from conmoe.report.sections import UNMEASURED
from conmoe.types import Plan

_LOADING = {
    "sliced": "It has the layout of the source family with fewer experts, and loads where that family does.",
    "expanded": "It loads wherever the source loads and saves no memory; it exists to evaluate the plan on any engine.",
    "shared": (
        "Load it with `trust_remote_code=True` (the modelling file is in this repository), or `import conmoe` first."
    ),
}
#: Until a push knows better.
UNNAMED = 'name = "owner/name"  # this repository, or a folder that holds its files'
_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

{unnamed}
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto"{remote})
tokenizer = AutoTokenizer.from_pretrained(name{remote})"""
_VLLM = [
    "vLLM serves it through its Transformers backend with `--trust-remote-code`, or with conmoe installed beside it;",
    "families whose attention that backend does not take, such as Qwen3-Next, it does not.",
]
#: Of the four relations that the hub knows (adapter, merge, quantized, finetune) the one for whole weights of the same
#: number format that descend from one model; it has none for pruning.
RELATION = "finetune"


def model_card(source: Path, plan: Plan, form: Form, config: Mapping[str, Any]) -> str:
    """The card as Markdown with metadata; licence, languages and data sets are handed over from the source's card.

    Nothing is measured yet; :func:`conmoe.report.sections.measured_card` writes that in.
    """
    come_from, inherited = origin(source), handed_over(source)
    known = {"base_model": come_from.hub_name, "base_model_relation": RELATION} if come_from.hub_name else {}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["conmoe", "moe", "mixture-of-experts", "compression", f"conmoe-{form}", f"method:{plan.method}"],
        **known,  # type: ignore[arg-type]  # strings, of which the class takes one by name and keeps the other
        **inherited,
    )
    body = _body(come_from, plan, form, config) + _licence(source, inherited) + "\n" + UNMEASURED
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _loading(plan: Plan, form: Form, config: Mapping[str, Any]) -> list[str]:
    remote = ", trust_remote_code=True" if form == "shared" else ""
    lines = ["", "## How to load it", "", "```python", _TRANSFORMERS.format(remote=remote, unnamed=UNNAMED), "```", ""]
    if form == "shared":
        lines += [
            "`trust_remote_code=True` runs the modelling file of this repository. Without it: `pip install conmoe`,",
            "and `import conmoe` before loading, which teaches Transformers the same classes.",
        ]
        lines += _VLLM if _has_maps_alone(config) else ["vLLM does not serve it: it runs maps, and this has more."]
    else:
        lines += [
            "No code of this repository is needed, and neither is conmoe: Transformers and vLLM read it as they read",
            "the source's family. Others that do should, and were not tried on this model.",
        ]
    if any(scope.plan.skip for scope in plan.scopes):
        lines += ["The plan skips experts at run time, which only `shared` checkpoints do."]
    return lines


def _has_maps_alone(config: Mapping[str, Any]) -> bool:
    """Whether a ``shared`` checkpoint is one that vLLM runs; the modelling file refuses the rest there."""
    owners = {int(layer): owner for layer, (owner, _) in (config.get("expert_pools") or {}).items()}
    return not config.get("consolidated_layers") and all(layer == owner for layer, owner in owners.items())


def _licence(source: Path, inherited: Mapping[str, Any]) -> str:
    files = sorted(
        file.name for file in source.iterdir() if file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    )
    named = inherited.get("license_name") or inherited.get("license")
    name = ", ".join(map(str, named)) if isinstance(named, list) else named
    said = f"The source's: {escaped(name)}." if name else "The source's card names no licence."
    here = (
        f" Its files are in this repository: {', '.join(map(code, files))}."
        if files
        else " No licence file came with it."
    )
    return f"\n## Licence\n\n{said}{here}\n"


def _body(come_from: Origin, plan: Plan, form: Form, config: Mapping[str, Any]) -> str:
    sizes = sorted({scope.plan.mixing_KE.shape[0] for scope in plan.scopes})
    experts = plan.scopes[0].plan.assignment_E.numel()
    options = ", ".join(f"{name}={value}" for name, value in plan.options.items()) or "none"
    lines = [
        f"# {escaped(come_from.name)}, consolidated with conmoe",
        "",
        f"{' to '.join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))} of {experts} routed experts per "
        f"{'layer' if len(plan.scopes[0].layers) == 1 else 'scope'} are stored; {_router(plan, form)} {_LOADING[form]}",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        f"| source | {escaped(come_from.name)}{f', {code(come_from.revision)}' if come_from.revision else ''} |",
        f"| method | `{plan.method}` ({escaped(get_method(plan.method).paper)}) |",
        f"| options | {escaped(options)} |",
        f"| keep, budget | {escaped(plan.keep)}, {escaped(plan.budget)} |",
        f"| refinement | {escaped(_refinement(plan))} |",
        f"| decoder layers | {', '.join(str(index) for scope in plan.scopes for index in scope.layers)} |",
        f"| form | {form} |",
        f"| conmoe | {escaped(plan.version)} |",
        f"| source fingerprint | {code(plan.source)} |",
        f"| statistics fingerprint | {code(plan.statistics)} |",
        "",
        "The plan (which prototype answers for each expert) is in `conmoe/plan.json`; `conmoe/manifest.json` lists",
        "every file with its SHA-256.",
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
    return "\n".join([*lines, *_loading(plan, form, config), ""])


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
    texts = escaped("; ".join(text_names(data["sources"])))
    rows = [
        ("tuned", f"{record['parameters']:,} parameters: the {what}"),
        ("towards", towards),
        (
            "text",
            f"{data['sequences']:,} sequences of {data['seq_len']:,} tokens: {texts}",
        ),
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
