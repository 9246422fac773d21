"""``conmoe inspect``"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import ExpertParallel, Json, Model, Remote, ServeEngine, TensorParallel

if TYPE_CHECKING:
    from conmoe.inspect import Saving


@verb()
def inspect(
    model: Model,
    keep: Annotated[
        str, typer.Option(help="Look at this share (0.5, 50%) or count of experts too, and ask --serve about it.")
    ] = "",
    form: Annotated[
        str,
        typer.Option("--form", help="Which form --serve is asked about with --keep: sliced, shared or expanded."),
    ] = "sliced",
    serve: ServeEngine = "",
    tp: TensorParallel = 1,
    ep: ExpertParallel = 1,
    json: Json = False,
    trust_remote_code: Remote = False,
) -> None:
    """What a checkpoint is, and what compressing it would save. Reads headers only.

    With --serve also whether an engine takes what --keep would leave, or without --keep the checkpoint itself; if not,
    the exit code is 2. Most methods of compress write the shared form: ask about it by --form shared.

    Example: `conmoe inspect allenai/OLMoE-1B-7B-0125`, or `conmoe inspect MODEL --keep 0.5 --serve vllm --tp 2 --ep 4`
    """
    from conmoe.cli.read import read_form, read_serve
    from conmoe.locate import locate_headers
    from conmoe.preflight import refuse

    asked = read_serve(serve, tp, ep)
    folder, entries = locate_headers(model)
    found = conmoe.inspect(
        folder,
        trust_remote_code=trust_remote_code,
        entries=entries,
        keep=keep,
        form=read_form(form) or "sliced",
        serve=asked,
    )
    if json:
        console.emit(found.as_json())
    else:
        _show(str(model), found)
    if found.serving:
        refuse(found.serving)


def _show(model: str, found: conmoe.Inspection) -> None:
    size = tables.size
    rows = [
        ("family", found.family),
        ("decoder layers, with experts", f"{found.layers}, {found.moe_layers}"),
        ("routed experts, per token, shared", f"{found.experts}, {found.experts_per_token}, {found.shared_experts}"),
        ("router", found.router + (f", {found.router_groups} groups" if found.router_groups > 1 else "")),
        (
            "parameters, active per token",
            f"{tables.quantity(found.parameters)}, {tables.quantity(found.active_parameters)}",
        ),
        *([("stored in low precision", found.quantisation)] if found.quantisation else []),
        ("size, in routed experts", f"{size(found.total_bytes)}, {found.routed_share:.1%}"),
        *(
            (f"--keep {_typed(s)}", f"{s.experts} experts, {size(s.bytes)} (saves {size(s.saved_bytes)})")
            for s in found.savings
        ),
        ("legal counts, sliced form", tables.ranges(found.legal_sliced_counts)),
        ("memory to compress, about", size(found.estimated_peak_bytes)),
        ("time to calibrate on this CPU, about", f"{max(1, math.ceil(found.estimated_seconds))} s for 16,384 tokens"),
    ]
    if found.mtp:
        experts = f"{found.mtp.experts} experts" if found.mtp.experts else "no experts"
        note = f"; {found.mtp.odd}" if found.mtp.odd else ""
        rows.append(("head for further tokens (MTP)", f"{size(found.mtp.bytes)}, {experts}{note}"))
    serving = found.serving
    if serving:
        counts = " and ".join(map(str, dict.fromkeys((serving.counts[0], serving.counts[-1]))))
        verdict = "nothing against it" if not serving.findings else "takes it" if serving.accepted else "refuses it"
        rows.append((f"{serving.engine} {serving.version}, {counts} experts, {serving.form}", verdict))
        found_first = sorted(serving.findings, key=lambda each: each.level != "refuse")
        rows += [("why" if each.level == "refuse" else "note", f"{each.sentence}.") for each in found_first]
    console.stdout.print(tables.facts(model, rows))


def _typed(saving: Saving) -> str:
    """What asks for as much: a usual share, or the count, which no rounding can change."""
    from conmoe.inspect import USUAL_SHARES

    return f"{saving.keep:g}" if saving.keep in USUAL_SHARES else str(saving.experts)
