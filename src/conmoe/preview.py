"""A result that is not written: opened as if it lay on disk, its tensors made when they are read.

What :func:`conmoe.apply` would write and what is read here are the same outputs, so a preview measures like the
checkpoint, without the disk or the time that writing one takes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from conmoe.apply import result_config
from conmoe.forms import check_form
from conmoe.outputs import plan_outputs
from conmoe.registry import Form
from conmoe.source import Source, open_source
from conmoe.types import Plan


def preview(
    source: Source,
    plan: Plan,
    form: Form | None = None,
    *,
    dtype: torch.dtype | None = None,
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """The checkpoint that ``plan`` describes, opened by its headers; nothing is written, and nothing computed yet.

    Args:
        source: the opened source; its files must stay where they are.
        plan: what to do to it; layers that it leaves out stay as they are.
        form: how the result would be stored; by default what suits the plan's method.
        dtype: in which to compute; None for the checkpoint's own.
        experts_implementation: a name registered with Transformers; None for its default.
        trust_remote_code: run modelling code that comes with the source.

    Raises:
        UsageError: the form cannot hold the plan.
    """
    chosen: Form = form or plan.default_form  # type: ignore[assignment]
    check_form(source.layers, plan, chosen)
    outputs, _ = plan_outputs(source, plan, chosen)
    config = result_config(source, plan, chosen)
    with tempfile.TemporaryDirectory(prefix="conmoe-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return open_source(
            Path(folder),
            dtype=dtype,
            experts_implementation=experts_implementation,
            trust_remote_code=trust_remote_code,
            entries={output.name: output for output in outputs},
        )
