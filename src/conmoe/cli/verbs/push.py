"""``conmoe push``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Json
from conmoe.cli.console import say


@verb()
def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A finished result of compress, apply or tune.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="The repository, as owner/name; made if it is not there.")
    ],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results", metavar="FILE", help="Numbers of conmoe evaluate --output, for the card. Repeatable."
        ),
    ] = None,
    base_model: Annotated[
        str, typer.Option(metavar="NAME", help="The source on the hub, where the card does not know it.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Push to this branch; made if it is not there.")
    ] = None,
    message: Annotated[str, typer.Option(metavar="TEXT", help="The message of the commit.")] = "",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and the card; send and write nothing.")
    ] = False,
    token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="By default HF_TOKEN, or who is logged in (hf auth login).")
    ] = None,
    json: Json = False,
) -> None:
    """Push a finished result to the Hugging Face hub, with its card and manifest.

    Every file is held against the manifest first; what is not listed there stays here.

    Example: `conmoe push olmoe-half my-name/OLMoE-half --results evaluation.json --private`
    """
    given = results or []
    if create_pr and revision not in (None, "main"):
        raise conmoe.UsageError("--create-pr opens a pull request to main; leave out --revision.")
    if not dry_run:
        conmoe.check_push(repo, token=token)
    upload = conmoe.prepare_push(out, repo, console.Bars(), results=given, base_model=base_model)
    for note in upload.notes:
        say(f"Note: {note}")
    if dry_run:
        _show(upload, json)
        say(f"Dry run: nothing was sent to {repo}.")
        return
    done = conmoe.push(
        upload,
        repo,
        results=given,
        private=private,
        revision=revision,
        message=message,
        create_pr=create_pr,
        token=token,
    )
    _finish(done, json)


def _show(upload: conmoe.Upload, json: bool) -> None:
    if json:
        console.emit({**upload.as_json(), "card": upload.card})
        return
    width = max(map(len, upload.files))
    for path, nbytes in upload.files.items():
        console.stdout.print(f"{path:<{width}}  {tables.size(nbytes)}", soft_wrap=True)
    console.stdout.print(f"{'in all':<{width}}  {tables.size(upload.bytes)}\n", soft_wrap=True)
    console.stdout.print(upload.card, soft_wrap=True)


def _finish(done: conmoe.Pushed, json: bool) -> None:
    for note in done.notes:
        say(f"Note: {note}")
    if json:
        console.emit(done.as_json())
    say(f"{done.upload.folder} is at {done.url} ({len(done.upload.files)} files, {tables.size(done.upload.bytes)}).")
