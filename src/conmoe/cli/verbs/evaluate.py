"""``conmoe evaluate``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Data, Device, Dtype, Json, Model, Remote, Seed, SeqLen, Tokens


@verb()
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
    from conmoe.cli import notes
    from conmoe.cli.read import own_share, read_data, read_depth, read_device, read_dtype
    from conmoe.parallel import Ranks

    folder = conmoe.locate(model)
    source = conmoe.locate(against) if against else None
    where, kind = read_device(device), read_dtype(dtype)
    if output and output.is_dir():
        raise conmoe.UsageError(f"--output {output} is a folder; name the file to write.")
    depth = sum(read_depth(each, trust_remote_code) for each in (folder, source) if each)
    text = read_data(folder, data, tokens, seq_len, seed, trust_remote_code, part="evaluation")
    if (folder / "conmoe" / "results.json").is_file():
        notes.overlapping(text, conmoe.calibration_documents(folder))
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
        console.stdout.print(tables.fidelity_table(f"{found.tokens:,} tokens", [(Path(model).name, "", found)]))
