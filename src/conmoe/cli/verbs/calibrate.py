"""``conmoe calibrate`` and ``conmoe merge-stats``: statistics, made and added up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Data, Device, Dtype, Force, Model, Remote, Sample, Seed, SeqLen, Tokens
from conmoe.cli.console import say


@verb()
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
    from conmoe.artifacts import check_free
    from conmoe.cli.read import own_share, read_data, read_depth, read_device, read_dtype

    folder = conmoe.locate(model)
    options = conmoe.Calibration(sample, seed, read_device(device), read_dtype(dtype), None, trust_remote_code)
    depth = read_depth(folder, trust_remote_code)
    check_free(statistics, force=force)
    text = read_data(folder, data, tokens, seq_len, seed, trust_remote_code)
    with console.Bars().stage("calibrate", own_share(text.tokens * depth), "tokens x layers") as advance:
        conmoe.calibrate(folder, statistics, text, options, force=force, advance=advance)
    say(f"Statistics of {text.tokens:,} tokens are in {statistics}.")


@verb("merge-stats")
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
        raise conmoe.UsageError("merge-stats takes at least two folders of statistics and an output.")
    manifest = conmoe.merge_statistics(parts, out, force=force)
    say(f"Statistics of {manifest.tokens:,} tokens are in {out}.")
