"""``conmoe compress``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import (
    BudgetName,
    BudgetOptions,
    Data,
    Device,
    Dtype,
    ExpertParallel,
    Fit,
    Force,
    FormName,
    Json,
    Keep,
    Layers,
    MethodName,
    Model,
    Mtp,
    Options,
    Protect,
    RefineOptions,
    Remote,
    Scope,
    Seed,
    SeqLen,
    ServeEngine,
    TensorParallel,
)
from conmoe.cli.console import say
from conmoe.effort import DEFAULT_EFFORT, settle
from conmoe.methods import DEFAULT_METHOD


@verb()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    keep: Keep = None,
    fit: Fit = "",
    method: MethodName = DEFAULT_METHOD,
    option: Options = None,
    layers: Layers = "",
    budget: BudgetName = "",
    budget_option: BudgetOptions = None,
    protect: Protect = None,
    scope: Scope = 1,
    effort: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="How much work it may be, where nothing else is said: quick (down projections refitted in closed "
            "form), standard (experts reconstructed layer by layer) or best (the same, longer and on more text). "
            "--refine none is the method as published.",
        ),
    ] = DEFAULT_EFFORT,
    sequential: Annotated[
        bool | None,
        typer.Option(
            help="Plan each layer on inputs that passed through the compressed layers before it. By default where "
            "there is a refinement.",
        ),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Fit the plan to what each layer's own experts added: none, gains, refit or reconstruct. By default "
            "what --effort says.",
        ),
    ] = None,
    refine_option: RefineOptions = None,
    form: FormName = None,
    mtp: Mtp = "auto",
    serve: ServeEngine = "",
    tp: TensorParallel = 1,
    ep: ExpertParallel = 1,
    data: Data = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many tokens of text to use. By default, --effort.")
    ] = None,
    seq_len: SeqLen = None,
    sample: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of each layer's sample, which distances are measured on and refinements fitted to. By "
            "default, --effort.",
        ),
    ] = None,
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
    work: Annotated[
        Path | None,
        typer.Option(help="Keep statistics and plan here for other runs; by default OUT.work, removed at the end."),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not load the result and compare it with the plan.")
    ] = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not write OUT/conmoe/report.html, nor what it is drawn from.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    push_to: Annotated[
        str,
        typer.Option("--push-to", metavar="REPO", help="Push the result to this repository of the hub, owner/name."),
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    json: Json = False,
    trust_remote_code: Remote = False,
) -> None:
    """Calibrate, plan, apply, verify and measure, in one go. A killed run is taken up where it stopped.

    Example: `conmoe compress allenai/OLMoE-1B-7B-0125 olmoe-half --keep 0.5 --data wiki.txt`, or with `--fit 8GB` in
    place of `--keep` whatever fits.
    """
    from conmoe.cli import notes
    from conmoe.cli.read import (
        read_data,
        read_device,
        read_dtype,
        read_held_out,
        read_mtp,
        read_options,
        read_request,
        read_serve,
        read_specs,
    )
    from conmoe.compress import clear_work
    from conmoe.keeping import low_experts

    if private and not push_to:
        raise conmoe.UsageError("--private is about the repository of --push-to; name one.")
    if push_to:  # who cannot push learns it before the work
        conmoe.check_push(push_to)
    folder = conmoe.locate(model)
    stays = low_experts(folder, trust_remote_code=trust_remote_code) if refine is None else ""
    settings = settle(
        effort,
        method,
        scope=scope,
        options=read_options("--option", option),
        tokens=tokens,
        sample=sample,
        sequential=sequential,
        refine=refine,
        refine_options=read_options("--refine-option", refine_option),
        refinable=not stays,
    )
    if stays:
        say(f"Note: {model} stores its experts as {stays}; they stay as they are, and are not refined (--refine none).")
    request = read_request(
        method,
        keep,
        option,
        protect,
        scope,
        form,
        read_device(device),
        trust_remote_code,
        layers,
        budget,
        budget_option,
        settings.sequential,
        settings.refine,
        settings.refine_options,
        settings.sequential_sample,
        fit=fit,
    )
    calibration = conmoe.Calibration(settings.sample, seed, request.device, read_dtype(dtype), None, trust_remote_code)
    for warning in conmoe.check(folder, out, request, force=force, serve=read_serve(serve, tp, ep), mtp=read_mtp(mtp)):
        say(f"Warning: {warning}")
    read_specs(evaluate_data, "--eval-data")
    text = read_data(folder, data, settings.tokens, seq_len, seed, trust_remote_code)
    held_out = None
    if evaluate_tokens:
        how = {"seq_len": seq_len, "seed": seed, "trust_remote_code": trust_remote_code}
        held_out = read_held_out(folder, evaluate_data, text.documents, data, evaluate_tokens, **how)
        notes.overlapping(held_out, text.documents)
    kept = work or out.with_name(out.name + ".work")
    result = conmoe.compress(
        folder,
        out,
        kept,
        text,
        request,
        console.Bars(),
        calibration=calibration,
        form=request.form,
        held_out=held_out,
        verified=not no_verify,
        report=not no_report,
        command=console.command(),
        force=force,
        mtp=read_mtp(mtp),
    )
    if work is None:
        clear_work(kept)
    _finish(out, result, json)
    if push_to:
        _push(out, push_to, private)


def _push(out: Path, repo: str, private: bool) -> None:
    """The result to the hub; if that fails, the result is finished all the same."""
    try:
        upload = conmoe.prepare_push(out, repo, console.Bars())
        for note in upload.notes:
            say(f"Note: {note}")
        done = conmoe.push(upload, repo, private=private)
    except conmoe.ConmoeError as error:
        again = conmoe.push_command(out, repo, private=private)
        raise conmoe.ConmoeError(f"{error} The result is finished in {out}, and goes there with: {again}") from error
    say(f"{out} is at {done.url}.")


def _finish(out: Path, result: conmoe.Result, json: bool) -> None:
    from conmoe.cli import notes

    notes.protected(result.plan)
    notes.approximate(result.plan, result.applied.form)
    notes.advice(result.warnings)
    notes.left_out(result.applied)
    if json:
        console.emit(result.as_json())
    elif result.fidelity:
        rows = [(out.name, result.applied.form, result.fidelity)]
        console.stdout.print(tables.fidelity_table(tables.held_out(result.fidelity, result.held_out), rows))
    say(f"{out}: {tables.size(result.applied.bytes)} of {tables.size(result.applied.source_bytes)}.")
    if (page := out / "conmoe" / "report.html").is_file():
        say(f"The report is in {page}.")
