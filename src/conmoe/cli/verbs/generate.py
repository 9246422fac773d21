"""``conmoe generate``"""

from __future__ import annotations

from typing import Annotated

import typer

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Device, Model, Remote


@verb()
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
    from conmoe.cli.read import read_device

    text = conmoe.generate(
        conmoe.locate(model),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=read_device(device),
        trust_remote_code=trust_remote_code,
    )
    console.stdout.print(prompt + text, soft_wrap=True)
