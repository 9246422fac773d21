"""``conmoe evaluate``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import conmoe
from conmoe.cli import console, measured, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Device, Dtype, Json, Model, Remote, Seed, SeqLen, Tokens

if TYPE_CHECKING:
    from conmoe.data import TokenData
    from conmoe.evaluate import Tasks

_TASKS, _WRITING, _SPEED = "Tasks", "What it writes", "Speed and memory"


@verb()
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(metavar="SOURCE", help="The model to compare with.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[NAME=]SPEC",
            help="Text: a .txt, .jsonl, .parquet file (also .gz, .xz) or hub:name[:config][:split], with a weight "
            "if wanted: wiki.txt@0.3. Repeatable; with names (code=code.jsonl), numbers of each domain beside those "
            "of all text. Without it a small built-in text is used.",
        ),
    ] = None,
    tokens: Tokens = 16384,
    seq_len: SeqLen = None,
    no_fidelity: Annotated[
        bool, typer.Option("--no-fidelity", help="Leave out KL, agreement and loss on text.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    output: Annotated[Path | None, typer.Option(help="Also write the numbers to this JSON file.")] = None,
    trust_remote_code: Remote = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            rich_help_panel=_TASKS,
            help="Tasks, groups and tags of lm-evaluation-harness: arc_easy,piqa,mmlu.",
        ),
    ] = None,
    task_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_TASKS,
            help="A folder of task files, whose data_files are relative to it or to its parent. They go before "
            "built-in tasks of their names.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, rich_help_panel=_TASKS, help="Only the first documents of each task."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, rich_help_panel=_TASKS, help="Examples before a question; by default the task's own."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=_TASKS, help="Questions, or prompts, at a time.")
    ] = 16,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_TASKS,
            help="Keep each model's answers here, so that a killed run goes on and a source is asked once.",
        ),
    ] = None,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate", rich_help_panel=_WRITING, help="Repetition, loops, length and variety of what it writes."
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_WRITING,
            help="A prompt on each line, or .jsonl with prompt, text or messages; by default beginnings of the text.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=_WRITING, help="How many tokens to write.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, rich_help_panel=_WRITING, help="0 is greedy; above, all tokens are drawn from.")
    ] = 0.0,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            rich_help_panel=_SPEED,
            help="Tokens per second and memory, each model in a process of its own, in turns.",
        ),
    ] = False,
    speed_batch: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=_SPEED, help="Sequences at a time.")
    ] = 1,
    speed_prompt: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=_SPEED, help="Tokens of each to read.")
    ] = 256,
    speed_new: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=_SPEED, help="Tokens of each to write.")
    ] = 64,
    speed_turns: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=_SPEED, help="Processes for each model.")
    ] = 2,
    speed_repeats: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=_SPEED, help="Timed runs in each.")
    ] = 3,
) -> None:
    """Measure a model on text, and its distance from another: KL, agreement, excess loss, each with its standard error.

    Tasks, what it writes, speed and memory where asked for, which load each model whole. Files are read from their
    beginning, so that the numbers of two runs are about the same text.

    Example: `conmoe evaluate olmoe-half --against allenai/OLMoE-1B-7B-0125 --data wikitext2.txt --tasks arc_easy,piqa`
    """
    from conmoe.cli.read import read_device, read_dtype
    from conmoe.manifest import weights_fingerprint
    from conmoe.parallel import Ranks, refuse_several

    folder = conmoe.locate(model)
    source = conmoe.locate(against) if against else None
    where, kind = read_device(device), read_dtype(dtype)
    if output and output.is_dir():
        raise conmoe.UsageError(f"--output {output} is a folder; name the file to write.")
    names = [name.strip() for text in tasks or [] for name in text.split(",") if name.strip()]
    for option, given, wanted, there in (
        ("--task-dir", task_dir, "--tasks", names),
        ("--limit", limit, "--tasks", names),
        ("--num-fewshot", num_fewshot, "--tasks", names),
        ("--work", work, "--tasks", names),
        ("--prompts", prompts, "--generate", generate),
    ):
        if given is not None and not there:
            raise conmoe.UsageError(f"{option} is about {wanted}; give that too, or leave it out.")
    if names or generate or speed:
        refuse_several("evaluate with --tasks, --generate or --speed")
    elif no_fidelity:
        raise conmoe.UsageError("--no-fidelity leaves nothing to measure; give --tasks, --generate or --speed.")
    common: dict[str, Any] = {
        "against": source,
        "device": where,
        "dtype": kind,
        "trust_remote_code": trust_remote_code,
    }
    written = conmoe.GenerationOptions(max_new_tokens, temperature, seed, batch_size)
    sizes = conmoe.SpeedOptions(speed_batch, speed_prompt, speed_new, speed_turns, speed_repeats)
    chosen = _read_tasks(folder, source, names, task_dir, (limit, num_fewshot, batch_size, seed), trust_remote_code)
    asked = _read_prompts(prompts, folder, trust_remote_code) if generate and prompts else None
    text = None
    if not no_fidelity or speed or (generate and asked is None):
        text = _read_text(folder, data, tokens, seq_len, seed, trust_remote_code)
    record: dict[str, Any] = {
        "model": str(model),
        "fingerprint": weights_fingerprint(folder),
        "against": against,
        "data": [part.source for part in text.sources] if text else [],
    }
    parts: list[Any] = []

    def add(more: dict[str, Any], shown: Any) -> None:
        """What is measured is kept at once: the next part may fail."""
        record.update(more)
        parts.append(shown)
        if output and not Ranks.join().rank:
            output.parent.mkdir(parents=True, exist_ok=True)
            conmoe.write_json(output, record)

    name = Path(model).name
    if text and not no_fidelity:
        add(*_fidelity(folder, name, text, data or [], common))
    if chosen:
        found = conmoe.evaluate_tasks(folder, chosen, work=work, progress=console.Bars(), **common)
        add(found, measured.tasks_table(found))
    if generate:
        ids = asked or conmoe.cut_prompts(_present(text).ids_NS)
        made = conmoe.evaluate_generation(folder, ids, options=written, progress=console.Bars(), **common)
        origin = str(prompts) if asked else "beginnings of the text"
        add({"generation": {"prompts_from": origin, **made}}, measured.generation_table(made))
    if speed:
        ids_NS = _present(text).ids_NS
        timed = conmoe.evaluate_speed(folder, ids_NS=ids_NS, options=sizes, progress=console.Bars(), **common)
        add({"speed": timed}, measured.speed_table(timed))
    if Ranks.join().rank:
        return
    if json:
        console.emit(record)
        return
    for number, part in enumerate(parts):
        if number:
            console.stdout.print()
        console.stdout.print(part)


def _read_tasks(
    folder: Path, source: Path | None, names: list[str], task_dir: Path | None, how: Any, trust_remote_code: bool
) -> Tasks | None:
    from conmoe.cli.read import read_depth

    if not names:
        return None
    for each in (folder, source):
        if each:
            read_depth(each, trust_remote_code)  # a checkpoint that is none is refused before tasks are read
    with console.Bars().stage("read tasks", 0, "tasks"):
        return conmoe.load_tasks(names, task_dir, conmoe.TaskOptions(*how))


def _read_prompts(file: Path, folder: Path, trust_remote_code: bool) -> list[list[int]]:
    return conmoe.read_prompts(file, conmoe.load_tokenizer(folder, trust_remote_code=trust_remote_code))


def _read_text(
    folder: Path, data: list[str] | None, tokens: int, seq_len: int | None, seed: int, trust_remote_code: bool
) -> TokenData:
    from conmoe.cli import notes
    from conmoe.cli.read import read_data, split_name

    specs = [split_name(text)[1] for text in data or []]
    text = read_data(folder, specs or None, tokens, seq_len, seed, trust_remote_code, part="evaluation")
    notes.overlapping(text, conmoe.calibration_documents(folder))
    return text


def _fidelity(
    folder: Path, name: str, text: TokenData, data: list[str], common: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """The numbers on text, of each domain too if there are named ones, and their table."""
    from conmoe.cli.read import own_share, read_depth, read_domains, split_name

    folders = [each for each in (folder, common["against"]) if each]
    depth = sum(read_depth(each, common["trust_remote_code"]) for each in folders)
    domains = list(read_domains(data)) if any(split_name(each)[0] for each in data) else []
    with console.Bars().stage("evaluate", own_share(text.tokens * depth), "tokens x layers") as advance:
        found = conmoe.evaluate(folder, text, domains=domains, advance=advance, **common)
    parts = zip(domains, text.sources, found.domains.values(), strict=bool(found.domains))
    each = {domain: {"data": [part.source], **measured.as_json()} for domain, part, measured in parts}
    rows = [(name, "", found), *((f"  {domain}", "", part) for domain, part in found.domains.items())]
    shown = tables.fidelity_table(f"{found.tokens:,} tokens", rows)
    return {**found.as_json(), **({"domains": each} if each else {})}, shown


def _present(text: TokenData | None) -> TokenData:
    assert text is not None  # read whenever it is needed
    return text
