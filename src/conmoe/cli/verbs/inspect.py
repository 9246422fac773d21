"""``conmoe inspect``"""

from __future__ import annotations

import math

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Json, Model, Remote


@verb()
def inspect(model: Model, json: Json = False, trust_remote_code: Remote = False) -> None:
    """What a checkpoint is, and what compressing it would save. Reads headers only.

    Example: `conmoe inspect allenai/OLMoE-1B-7B-0125`
    """
    from conmoe.locate import locate_headers

    folder, entries = locate_headers(model)
    found = conmoe.inspect(folder, trust_remote_code=trust_remote_code, entries=entries)
    if json:
        console.emit(found.as_json())
        return
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
            (f"--keep {s.keep}", f"{s.experts} experts, {size(s.bytes)} (saves {size(s.saved_bytes)})")
            for s in found.savings
        ),
        ("legal counts, sliced form", tables.ranges(found.legal_sliced_counts)),
        ("memory to compress, about", size(found.estimated_peak_bytes)),
        ("time to calibrate on this CPU, about", f"{max(1, math.ceil(found.estimated_seconds))} s for 16,384 tokens"),
    ]
    console.stdout.print(tables.facts(str(model), rows))
