"""The command line: verbs that parse, call, and print where the result is. No logic."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

import conmoe
from conmoe import console
from conmoe.arguments import (
    Data,
    Device,
    Dtype,
    Force,
    FormName,
    Json,
    Keep,
    MethodName,
    Model,
    Options,
    Protect,
    Remote,
    Sample,
    Scope,
    Seed,
    SeqLen,
    Tokens,
    depth_of,
    own_share,
    read_data,
    read_device,
    read_dtype,
    read_form,
    read_request,
    read_specs,
)
from conmoe.artifacts import check_free, read_manifest, read_plan
from conmoe.calibrate import Calibration
from conmoe.compress import Result, clear_work
from conmoe.console import say
from conmoe.data import TokenData, overlap
from conmoe.forms import is_approximate
from conmoe.locate import locate, locate_headers
from conmoe.parallel import Ranks, refuse_several
from conmoe.plan import DEFAULT_METHOD
from conmoe.registry import Form, get_method, methods
from conmoe.types import ConmoeError, Plan, UsageError

app = typer.Typer(
    name="conmoe",
    help="Make Mixture-of-Experts checkpoints smaller, without training, and measure what it cost.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
) -> None:
    if version:
        console.stdout.print(conmoe.__version__)


@app.command()
def inspect(model: Model, json: Json = False, trust_remote_code: Remote = False) -> None:
    """What a checkpoint is, and what compressing it would save. Reads headers only.

    Example: `conmoe inspect allenai/OLMoE-1B-7B-0125`
    """
    folder, entries = locate_headers(model)
    found = conmoe.inspect(folder, trust_remote_code=trust_remote_code, entries=entries)
    if json:
        console.emit(found.as_json())
        return
    size = console.size
    rows = [
        ("family", found.family),
        ("decoder layers, with experts", f"{found.layers}, {found.moe_layers}"),
        ("routed experts, per token, shared", f"{found.experts}, {found.experts_per_token}, {found.shared_experts}"),
        ("router", found.router + (f", {found.router_groups} groups" if found.router_groups > 1 else "")),
        (
            "parameters, active per token",
            f"{console.quantity(found.parameters)}, {console.quantity(found.active_parameters)}",
        ),
        ("size, in routed experts", f"{size(found.total_bytes)}, {found.routed_share:.1%}"),
        *(
            (f"--keep {s.keep}", f"{s.experts} experts, {size(s.bytes)} (saves {size(s.saved_bytes)})")
            for s in found.savings
        ),
        ("legal counts, sliced form", _ranges(found.legal_sliced_counts)),
        ("memory to compress, about", size(found.estimated_peak_bytes)),
        ("time to calibrate on this CPU, about", f"{max(1, math.ceil(found.estimated_seconds))} s for 16,384 tokens"),
    ]
    console.stdout.print(console.facts(str(model), rows))


@app.command("methods")
def list_methods(json: Json = False) -> None:
    """Every method with its paper, its needs, its options and its default form.

    Example: `conmoe methods --json`
    """
    if json:
        console.emit({name: _method_json(name) for name in methods()})
        return
    for name, item in methods().items():
        console.stdout.print(name, style="bold")
        console.stdout.print(f"  {item.paper}; {item.form} form; needs {', '.join(item.needs) or 'nothing'}")
        console.stdout.print(f"  {item.help.splitlines()[0]}")
        for option in item.options.values():
            choices = f" one of {', '.join(map(str, option.choices))};" if option.choices else ""
            console.stdout.print(f"  --option {option.name}={option.default}:{choices} {option.help}")


@app.command()
def calibrate(
    model: Model,
    statistics: Annotated[Path, typer.Argument(metavar="STATS", help="The folder to write.")],
    data: Data = None,
    tokens: Tokens = 32768,
    seq_len: SeqLen = None,
    sample: Sample = 4096,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    trust_remote_code: Remote = False,
) -> None:
    """Run text through the model once and store what every method needs. Resumes; runs under torchrun.

    Example: `conmoe calibrate allenai/OLMoE-1B-7B-0125 stats --data wiki.txt@0.7 --data code.jsonl@0.3`
    """
    folder = locate(model)
    options = Calibration(sample, seed, read_device(device), read_dtype(dtype), None, trust_remote_code)
    depth = depth_of(folder, trust_remote_code)
    check_free(statistics, force=force)
    text = read_data(folder, data, tokens, seq_len, seed, trust_remote_code)
    with console.Bars().stage("calibrate", own_share(text.tokens * depth), "tokens x layers") as advance:
        conmoe.calibrate(folder, statistics, text, options, force=force, advance=advance)
    say(f"Statistics of {text.tokens:,} tokens are in {statistics}.")


@app.command("merge-stats")
def merge_stats(
    statistics: Annotated[
        list[Path], typer.Argument(metavar="STATS... OUT", help="Statistics to add, then the output.")
    ],
    force: Force = False,
) -> None:
    """Add up statistics of one model over different texts.

    Example: `conmoe merge-stats stats-wiki stats-code stats-both`
    """
    *parts, out = statistics
    if len(parts) < 2:
        raise UsageError("merge-stats takes at least two folders of statistics and an output.")
    manifest = conmoe.merge_statistics(parts, out, force=force)
    say(f"Statistics of {manifest.tokens:,} tokens are in {out}.")


@app.command()
def plan(
    model: Model,
    statistics: Annotated[Path, typer.Argument(metavar="STATS", help="What conmoe calibrate wrote.")],
    out: Annotated[Path, typer.Argument(metavar="PLAN", help="The folder to write.")],
    keep: Keep,
    method: MethodName = DEFAULT_METHOD,
    option: Options = None,
    protect: Protect = None,
    scope: Scope = 1,
    form: FormName = None,
    device: Device = "cpu",
    force: Force = False,
    trust_remote_code: Remote = False,
) -> None:
    """Decide which experts stay and who answers for whom. The model is not run.

    Example: `conmoe plan allenai/OLMoE-1B-7B-0125 stats plan --method reap --keep 48`
    """
    folder = locate(model)
    refuse_several("plan")
    request = read_request(method, keep, option, protect, scope, form, read_device(device), trust_remote_code)
    with console.Bars().stage("plan", len(read_manifest(statistics).layers), "layers") as advance:
        made = conmoe.plan(folder, statistics, out, request, force=force, advance=advance)
    _describe(made)
    say(f"The plan is in {out}; read {out / 'plan.json'}, or apply it with conmoe apply.")


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What conmoe plan wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    form: FormName = None,
    force: Force = False,
    trust_remote_code: Remote = False,
) -> None:
    """Write the checkpoint that a plan describes.

    Example: `conmoe apply allenai/OLMoE-1B-7B-0125 plan olmoe-half --form sliced`
    """
    refuse_several("apply")
    folder, made = locate(model), read_plan(plan)
    with console.Bars().stage("apply", 0, "bytes") as advance:
        done = conmoe.apply(
            folder,
            made,
            out,
            form=read_form(form),
            force=force,
            trust_remote_code=trust_remote_code,
            advance=advance,
        )
    _warn_approximate(made, done.form)
    say(f"{out}: {console.size(done.bytes)} of {console.size(done.source_bytes)}, {done.form} form.")


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    keep: Keep,
    method: MethodName = DEFAULT_METHOD,
    option: Options = None,
    protect: Protect = None,
    scope: Scope = 1,
    form: FormName = None,
    data: Data = None,
    tokens: Tokens = 32768,
    seq_len: SeqLen = None,
    sample: Sample = 4096,
    seed: Seed = 0,
    evaluate_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="SPEC", help="Held-out text to measure on; by default built-in text."),
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
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    json: Json = False,
    trust_remote_code: Remote = False,
) -> None:
    """Calibrate, plan, apply, verify and measure, in one go. A killed run is taken up where it stopped.

    Example: `conmoe compress allenai/OLMoE-1B-7B-0125 olmoe-half --keep 0.5 --data wiki.txt`
    """
    folder = locate(model)
    request = read_request(method, keep, option, protect, scope, form, read_device(device), trust_remote_code)
    calibration = Calibration(sample, seed, request.device, read_dtype(dtype), None, trust_remote_code)
    conmoe.check(folder, out, request, force=force)
    read_specs(evaluate_data)
    text = read_data(folder, data, tokens, seq_len, seed, trust_remote_code)
    held_out = None
    if evaluate_tokens:
        held_out = read_data(
            folder, evaluate_data, evaluate_tokens, seq_len, seed, trust_remote_code, part="evaluation"
        )
        _warn_overlap(held_out, text.documents)
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
        force=force,
    )
    if work is None:
        clear_work(kept)
    _finish(out, result, json)


@app.command()
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(metavar="SOURCE", help="The model to compare with.")] = None,
    data: Data = None,
    tokens: Tokens = 16384,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    output: Annotated[Path | None, typer.Option(help="Also write the numbers to this JSON file.")] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Measure a model on text, and its distance from another: KL, agreement, excess loss, each with its standard error.

    Files are read from their beginning, so that the numbers of two runs are about the same text.

    Example: `conmoe evaluate olmoe-half --against allenai/OLMoE-1B-7B-0125 --data wikitext2.txt --json`
    """
    folder = locate(model)
    source = locate(against) if against else None
    where, kind = read_device(device), read_dtype(dtype)
    if output and output.is_dir():
        raise UsageError(f"--output {output} is a folder; name the file to write.")
    depth = sum(depth_of(each, trust_remote_code) for each in (folder, source) if each)
    text = read_data(folder, data, tokens, seq_len, seed, trust_remote_code, part="evaluation")
    if (folder / "conmoe" / "results.json").is_file():
        _warn_overlap(text, conmoe.calibration_documents(folder))
    with console.Bars().stage("evaluate", own_share(text.tokens * depth), "tokens x layers") as advance:
        found = conmoe.evaluate(
            folder,
            text,
            against=source,
            device=where,
            dtype=kind,
            trust_remote_code=trust_remote_code,
            advance=advance,
        )
    if Ranks.join().rank:
        return
    record = {
        "model": str(model),
        "against": against,
        "data": [part.source for part in text.sources],
        **found.as_json(),
    }
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        conmoe.write_json(output, record)
    if json:
        console.emit(record)
    else:
        console.stdout.print(console.fidelity_table(f"{found.tokens:,} tokens", [(Path(model).name, "", found)]))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to write.")] = 48,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    device: Device = "auto",
    trust_remote_code: Remote = False,
) -> None:
    """A quick look at what a model writes. Loads the whole model.

    Example: `conmoe generate olmoe-half "The history of"`
    """
    text = conmoe.generate(
        locate(model),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=read_device(device),
        trust_remote_code=trust_remote_code,
    )
    console.stdout.print(prompt + text, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="The folder to write.")] = Path("demo-output"),
    force: Force = False,
) -> None:
    """Compress a small trained model that ships with conmoe, three ways, offline, and compare.

    Example: `conmoe demo demo-output`
    """
    made = conmoe.demo(out, console.Bars(), force=force)
    rows = sorted(made.rows, key=lambda row: row[2].kl.value if row[2].kl else 0.0)
    console.stdout.print(console.fidelity_table("Half of the experts, on held-out text (best first)", rows))
    source = made.rows[0][2]
    console.stdout.print(f"The source has {console.size(source.source_bytes or 0)}.\n")
    for title, text in (("Source", made.before), (f"After {DEFAULT_METHOD}", made.after)):
        console.stdout.print(title, style="bold")
        console.stdout.print(conmoe.DEMO_PROMPT + text + "\n", soft_wrap=True)
    for line in (
        f"Checkpoints, statistics and results.json are in {out}. Next, on a real model:",
        "  conmoe inspect allenai/OLMoE-1B-7B-0125",
        "  conmoe compress allenai/OLMoE-1B-7B-0125 olmoe-half --keep 0.5 --data YOUR-TEXT.jsonl",
    ):
        console.stdout.print(line, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every expected failure is one sentence and an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not debug:
        transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        code = app(given, prog_name="conmoe", standalone_mode=False)
    except KeyboardInterrupt:
        code = _fail("Interrupted; what was finished is kept, and the same command goes on from there.", 130)
    except ConmoeError as error:
        if debug:
            raise
        code = _fail(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        code = _fail(_os_sentence(error), 1)
    except Exception as error:
        shown = getattr(error, "format_message", None)
        if debug and shown is None:
            raise
        if shown is None:
            code = _fail(f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1)
        else:
            code = _fail(shown(), getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str, code: int) -> int:
    rank = os.environ.get("RANK")
    console.errors.print(f"Error{f' of process {rank}' if rank else ''}: {sentence}", style="red", soft_wrap=True)
    return code


def _os_sentence(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"The disk is full{where}; free some space and run the same command again, it goes on where it stopped."
    return f"{error.strerror or error}{where}."


def _method_json(name: str) -> dict[str, Any]:
    item = get_method(name)
    options = {
        option.name: {"default": option.default, "choices": list(option.choices), "help": option.help}
        for option in item.options.values()
    }
    return {"paper": item.paper, "needs": item.needs, "form": item.form, "help": item.help, "options": options}


def _describe(made: Plan) -> None:
    for layer, experts in made.protected.items():
        say(f"Protected in layer {layer}: {', '.join(map(str, experts))}.")


def _warn_approximate(made: Plan, form: Form) -> None:
    if is_approximate(made, form):
        say("Note: the sliced form cannot redirect; experts that the plan redirects are dropped. Measure the result.")


def _warn_overlap(text: TokenData, documents: Sequence[str]) -> None:
    share = overlap(text.documents, documents)
    if share > 0:
        say(f"Warning: {share:.0%} of the documents measured on were calibrated on; the numbers are too good.")


def _finish(out: Path, result: Result, json: bool) -> None:
    _describe(result.plan)
    _warn_approximate(result.plan, result.applied.form)
    for name in result.applied.dropped[:1]:
        say(f"Left out {len(result.applied.dropped)} tensors that the model class does not read, such as {name}.")
    if json:
        console.emit(result.as_json())
    elif result.fidelity:
        rows = [(out.name, result.applied.form, result.fidelity)]
        console.stdout.print(console.fidelity_table(f"{result.fidelity.tokens:,} held-out tokens", rows))
    say(f"{out}: {console.size(result.applied.bytes)} of {console.size(result.applied.source_bytes)}.")


def _ranges(counts: Sequence[int]) -> str:
    if len(counts) > 12 and counts[-1] - counts[0] == len(counts) - 1:
        return f"{counts[0]} to {counts[-1]}"
    return ", ".join(map(str, counts)) if len(counts) <= 24 else f"{counts[0]}, {counts[1]}, ... {counts[-1]}"
