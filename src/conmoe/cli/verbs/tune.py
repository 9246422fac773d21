"""``conmoe tune``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Data, Device, Dtype, Force, Json, Model, Remote, Seed
from conmoe.cli.console import say

#: CD-MoE's amount of text, 10,000 sequences of 256 tokens; the text that comes with conmoe is shorter.
TOKENS, BUILTIN_TOKENS = 2_560_000, 32_768


@verb()
def tune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    mode: Annotated[
        str,
        typer.Option(
            help="experts: language modelling, only the experts of layers that the plan changed; router: only the "
            "routers, towards the next-token distribution of --against; prune: a checkpoint of mc-smoe, stored with "
            "--option ratio=1.0, loses rows (or columns) while it learns from text and --against."
        ),
    ] = "experts",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The checkpoint that MODEL was made from: the teacher of --mode router and prune, and what held-out "
            "text is compared with.",
        ),
    ] = None,
    data: Data = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help=f"Tokens to train on; {TOKENS:,}, or {BUILTIN_TOKENS:,} of built-in text."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per sequence.")] = 256,
    seed: Seed = 0,
    evaluate_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-data",
            metavar="SPEC",
            help="Text to measure on; by default the rest of what --data names, or built-in text.",
        ),
    ] = None,
    evaluate_tokens: Annotated[
        int, typer.Option("--eval-tokens", metavar="N", min=0, help="Tokens to measure on; 0 measures nothing.")
    ] = 8192,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="The highest; it falls linearly to zero. Short runs want more, such as 1e-4.")
    ] = 1e-5,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="How often the text is read.")] = 1,
    warmup: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the steps over which the learning rate rises.")
    ] = 0.0,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of both distributions, in --mode router (1 by default) and prune (2).", show_default=False),
    ] = None,
    ratio: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="In --mode prune: the share of rows or columns beside the low ranks left in the end."
        ),
    ] = 0.1,
    distillation: Annotated[
        float,
        typer.Option(min=0.0, help="In --mode prune: weight of KL(source || model) beside language modelling."),
    ] = 0.2,
    prune_start: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="In --mode prune: share of the steps after which the first go."),
    ] = 0.04,
    prune_end: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="In --mode prune: share of the steps after which the last have gone."),
    ] = 0.84,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints to go on from.")] = 100,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    json: Json = False,
    trust_remote_code: Remote = False,
) -> None:
    """Train a few parameters of a compressed checkpoint on a little text. Loads the whole model; resumes.

    Example: `conmoe tune olmoe-condensed olmoe-tuned --data c4.jsonl --learning-rate 1e-4`
    """
    from conmoe.cli import notes
    from conmoe.cli.read import read_data, read_device, read_dtype, read_held_out, read_specs
    from conmoe.tune import check

    folder = conmoe.locate(model)
    source = conmoe.locate(against) if against else None
    options = conmoe.Tuning(
        mode=mode,  # type: ignore[arg-type]
        learning_rate=learning_rate,
        batch=batch,
        epochs=epochs,
        warmup=warmup,
        temperature=temperature,
        seed=seed,
        device=read_device(device),
        dtype=read_dtype(dtype),
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        trust_remote_code=trust_remote_code,
        ratio=ratio,
        distillation=distillation,
        prune_start=prune_start,
        prune_end=prune_end,
    )
    check(folder, out, options, against=source, force=force)
    read_specs(evaluate_data, "--eval-data")
    amount = tokens or (TOKENS if data else BUILTIN_TOKENS)
    text = read_data(folder, data, amount, seq_len, seed, trust_remote_code)
    held_out = None
    if evaluate_tokens:
        how = {"seq_len": seq_len, "seed": seed, "trust_remote_code": trust_remote_code}
        used = (*text.documents, *conmoe.calibration_documents(folder))
        held_out = read_held_out(folder, evaluate_data, used, data, evaluate_tokens, **how)
        notes.overlapping(held_out, used)
    tuned = conmoe.tune(folder, out, text, options, console.Bars(), against=source, held_out=held_out, force=force)
    if json:
        console.emit(tuned.as_json())
        return
    if tuned.before and tuned.after:
        rows = [("before", "", tuned.before), ("after", "", tuned.after)]
        texts = [part.source for part in held_out.sources] if held_out else []
        console.stdout.print(tables.fidelity_table(tables.held_out(tuned.after, texts), rows))
    moved = f"{tuned.tensors} tensors, {tables.quantity(tuned.parameters)} parameters"
    left = "; {:,} of {:,} rows or columns are left".format(*tuned.lines) if tuned.lines else ""
    say(f"{out}: {moved}, tuned in {tuned.steps} steps{left}.")
