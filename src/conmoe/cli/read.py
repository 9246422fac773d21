"""How the text of an argument becomes what the functions want."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conmoe.allocate import parse_counts
from conmoe.builtin_text import BUILTIN_NAME
from conmoe.cli.console import say
from conmoe.data import DataSpec, TokenData, TooLittleText, check_tokenizer, load_tokenizer, load_tokens, parse_spec
from conmoe.documents import first_line
from conmoe.mtp import POLICIES, Policy
from conmoe.parallel import local_rank
from conmoe.preflight import Serve
from conmoe.registry import Form, get_method
from conmoe.request import Request, parse_refine
from conmoe.source import load_config, open_source
from conmoe.types import UsageError


def read_data(
    folder: Path,
    data: list[str] | None,
    tokens: int,
    seq_len: int | None,
    seed: int,
    trust_remote_code: bool,
    part: Any = "calibration",
    *,
    quiet: bool = False,
    without: Collection[str] = (),
) -> TokenData:
    specs = read_specs(data)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, config.vocab_size)
    if not specs and not quiet:
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
        shuffle=part == "calibration" or not specs or bool(without),
        vocab_size=config.vocab_size,
        without=without,
    )


def read_held_out(
    folder: Path, own: list[str] | None, used: Sequence[str], data: list[str] | None, tokens: int, **how: Any
) -> TokenData:
    """Text to measure on: what was named for it, or what ``data`` has beside ``used`` documents, or built-in text."""
    if own or not data:
        return read_data(folder, own, tokens, part="evaluation", **how)
    for amount in (tokens, tokens // 2, tokens // 4):
        try:
            return read_data(folder, data, max(1, amount), part="evaluation", without=used, **how)
        except TooLittleText:
            continue
    say(
        "--data has too little text beside that which was used: measuring on the evaluation part of the "
        f"{BUILTIN_NAME}, which is other text; better give --eval-data."
    )
    return read_data(folder, None, tokens, part="evaluation", quiet=True, **how)


def read_specs(data: list[str] | None, option: str = "--data") -> list[DataSpec]:
    return [parse_spec(text, option) for text in data or []]


def read_domains(specs: list[str], option: str = "--data") -> dict[str, str]:
    """Domain -> its text, from ``NAME=SPEC`` or ``SPEC``, which is named after its file."""
    found: dict[str, str] = {}
    for text in specs:
        name, spec = split_name(text)
        source = parse_spec(spec, option).source
        name = name or re.sub(r"(\.(txt|jsonl|parquet))?(\.(gz|xz))?$", "", source.split("/")[-1])
        if name in found:
            raise UsageError(f"{option} has two domains {name!r}; name them: {option} NAME=SPEC.")
        found[name] = spec
    return found


def split_name(text: str) -> tuple[str, str]:
    """``NAME=SPEC`` in two; the name is empty where there is none."""
    named = re.fullmatch(r"([\w.+-]+)=(.+)", text)
    return (named[1], named[2]) if named and not Path(text).is_file() else ("", text)


def read_depth(folder: Path, trust_remote_code: bool) -> int:
    """The number of decoder layers of a checkpoint, which is checked by its headers on the way."""
    depth: int = open_source(folder, trust_remote_code=trust_remote_code).config.num_hidden_layers
    return depth


def own_share(amount: int) -> int:
    """What of an amount falls to this process."""
    return amount // int(os.environ.get("WORLD_SIZE", "1"))


def read_request(
    method: str,
    keep: str | None,
    option: list[str] | None,
    protect: list[str] | None,
    scope: int,
    form: str | None,
    device: str,
    trust_remote_code: bool,
    layers: str = "",
    budget: str = "",
    budget_option: list[str] | None = None,
    sequential: bool = False,
    refine: str = "none",
    refine_options: Mapping[str, Any] | None = None,
    sample: int = 0,
    fit: str = "",
) -> Request:
    if not keep and not fit and not parse_counts(budget):
        raise UsageError(
            "Missing option '--keep': how much stays, such as 0.5, or 48 experts of each layer; or --fit 24GB."
        )
    get_method(method)
    return Request(
        method,
        keep or "",
        read_options("--option", option),
        tuple(protect or ["super"]),
        scope,
        read_form(form),
        device,
        trust_remote_code,
        layers,
        budget,
        read_options("--budget-option", budget_option),
        sequential,
        parse_refine(refine),
        refine_options or {},
        sample,
        fit=fit,
    )


def read_serve(engine: str, tp: int, ep: int) -> Serve | None:
    if not engine and (tp > 1 or ep > 1):
        raise UsageError("--tp and --ep say how an engine is started; name it by --serve.")
    return Serve(engine, tp, ep) if engine else None


def read_mtp(text: str) -> Policy:
    if text not in POLICIES:
        raise UsageError(f"--mtp takes {', '.join(POLICIES)}, not {text!r}.")
    return text


def read_options(name: str, given: list[str] | None) -> dict[str, str]:
    options = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{name} takes NAME=VALUE, not {text!r}.")
        options[key] = value
    return options


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
