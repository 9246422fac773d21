"""What the verbs take: arguments and options, and how their text becomes what the functions want."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from conmoe.builtin_text import BUILTIN_NAME
from conmoe.console import say
from conmoe.data import DataSpec, TokenData, check_tokenizer, load_tokenizer, load_tokens, parse_spec
from conmoe.documents import first_line
from conmoe.parallel import local_rank
from conmoe.plan import Request
from conmoe.registry import Form, get_method
from conmoe.source import load_config, open_source
from conmoe.types import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a name on the Hugging Face hub.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="Text: a .txt, .jsonl, .parquet file (also .gz, .xz) or hub:name[:config][:split], with a weight "
        "if wanted: wiki.txt@0.3. Repeatable. Without it a small built-in text is used.",
    ),
]
Tokens = Annotated[int, typer.Option(metavar="N", min=1, help="How many tokens of text to use.")]
SeqLen = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="Length of a sequence; by default 512, or what the model allows.")
]
Seed = Annotated[int, typer.Option(help="Chooses the documents and the token sample.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), bfloat16, float16 or float32.")]
Sample = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Tokens of each layer's sample, which functional distances are measured on."),
]
Keep = Annotated[
    str, typer.Option(help="Share (0.5, 50%) or, without point or percent sign, count of experts to keep.")
]
MethodName = Annotated[str, typer.Option("--method", help="See conmoe methods.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of the method. Repeatable.")
]
Protect = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EXPERTS", help="Experts that must stay: super (the default), none, or LAYER:EXPERT. Repeatable."
    ),
]
Scope = Annotated[
    int, typer.Option(metavar="N", min=1, help="Neighbouring layers that share one pool of prototypes: 1, 2, 4 ...")
]
FormName = Annotated[
    str | None, typer.Option("--form", help="shared, sliced or expanded; by default what suits the method.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the checkpoint.")]


def read_data(
    folder: Path,
    data: list[str] | None,
    tokens: int,
    seq_len: int | None,
    seed: int,
    trust_remote_code: bool,
    part: Any = "calibration",
) -> TokenData:
    specs = read_specs(data)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, config.vocab_size)
    if not specs:
        say(f"No text given for {part}: using the {part} part of the {BUILTIN_NAME}; better give text of your users.")
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if seq_len and seq_len > longest:
        raise UsageError(f"--seq-len {seq_len} is more than the {longest} positions of the model.")
    length = seq_len or min(512, longest)
    return load_tokens(
        tokenizer,
        specs,
        tokens=tokens,
        seq_len=length,
        seed=seed,
        part=part,
        shuffle=part == "calibration" or not specs,
        vocab_size=config.vocab_size,
    )


def read_specs(data: list[str] | None) -> list[DataSpec]:
    return [parse_spec(text) for text in data or []]


def depth_of(folder: Path, trust_remote_code: bool) -> int:
    """The number of decoder layers of a checkpoint, which is checked by its headers on the way."""
    depth: int = open_source(folder, trust_remote_code=trust_remote_code).config.num_hidden_layers
    return depth


def own_share(amount: int) -> int:
    """What of an amount falls to this process."""
    return amount // int(os.environ.get("WORLD_SIZE", "1"))


def read_request(
    method: str,
    keep: str,
    option: list[str] | None,
    protect: list[str] | None,
    scope: int,
    form: str | None,
    device: str,
    trust_remote_code: bool,
) -> Request:
    options = {}
    for text in option or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--option takes NAME=VALUE, not {text!r}.")
        options[name] = value
    get_method(method)
    return Request(
        method, keep, options, tuple(protect or ["super"]), scope, read_form(form), device, trust_remote_code
    )


def read_form(text: str | None) -> Form | None:
    if text not in (None, "shared", "sliced", "expanded"):
        raise UsageError(f"--form takes shared, sliced or expanded, not {text!r}.")
    return text  # type: ignore[return-value]


def read_device(text: str) -> str:
    if text == "auto":
        return f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UsageError(f"--device takes auto, cpu, cuda or cuda:1, not {text!r}.")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {text} is not available here: {first_line(error)}.") from error
    return text


def read_dtype(text: str) -> torch.dtype | None:
    known = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if text not in known:
        raise UsageError(f"--dtype takes {', '.join(known)}, not {text!r}.")
    return known[text]
