"""A finished result to the Hugging Face hub: what its manifest lists, after a look at every byte, and nothing else."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from conmoe.artifacts import write_atomic, write_json
from conmoe.manifest import (
    CARD,
    EDITABLE,
    RESULT_MANIFEST,
    Checked,
    check_files,
    read_result_manifest,
    reseal,
    weights_fingerprint,
)
from conmoe.progress import Progress
from conmoe.report.card import UNNAMED
from conmoe.report.escape import one_line
from conmoe.report.measured import without_folder
from conmoe.report.sections import EVALUATIONS, read_evaluation, refresh_card
from conmoe.shards import read_entries
from conmoe.types import ConmoeError, UsageError

#: Files that quote text or name folders, which their owner may not want to publish.
_READABLE = (".json", ".html", ".md")
_QUOTING = ("conmoe/report.json", "conmoe/report.html")


@dataclass(frozen=True, slots=True)
class Upload:
    """What a push sends, before it is sent."""

    folder: Path
    files: Mapping[str, int]  # path in the repository -> bytes
    card: str
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def as_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "files": dict(self.files), "bytes": self.bytes, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a result went."""

    upload: Upload
    repo: str
    url: str  # of the commit, or of the pull request
    notes: tuple[str, ...] = ()  # what the hub said about the card

    def as_json(self) -> dict[str, Any]:
        return {**self.upload.as_json(), "repo": self.repo, "url": self.url, "notes": [*self.upload.notes, *self.notes]}


def check_repo(repo: str) -> None:
    """Raise a UsageError unless ``repo`` can be the name of a repository. Asks nobody."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = one_line(repo)
        raise UsageError(
            f"{repo!r} cannot be a repository; name one as owner/name, of letters, digits, -, _ and . (96 at most)."
        ) from None


def check_push(repo: str, *, token: str | None = None) -> str:
    """Everything that can be refused before there is a result: the repository's name, the login. Returns who it is.

    Raises:
        UsageError: the name is malformed, or nobody is logged in.
        ConmoeError: the hub refuses the token or does not answer.
    """
    check_repo(repo)
    with _asking(repo):
        return str(HfApi(token=token).whoami().get("name", ""))


def prepare(
    out: Path,
    repo: str,
    progress: Progress,
    *,
    results: Sequence[Path] = (),
    base_model: str = "",
) -> Upload:
    """Look at a result as it would be pushed; nothing is written or sent.

    Args:
        out: a finished result.
        repo: where it would go, which the card's metadata names it by.
        progress: where hashing reports to.
        results: files of ``conmoe evaluate --output`` about this result, for the card.
        base_model: the source on the hub, if the card does not know it.

    Raises:
        UsageError: ``out`` is no finished result, or a file of ``results`` is not about it.
        ConmoeError: a file of it is missing, cut off or altered.
    """
    check_repo(repo)
    if base_model:
        check_repo(base_model)
    if out.name.endswith((".partial", ".replaced", ".work")):
        raise UsageError(f"{out} is not finished, or what a run works in; push the result itself.")
    manifest = read_result_manifest(out)
    for file in results:
        _check_about(out, file)
    with progress.stage("check", sum(record.size for record in manifest.files), "bytes") as advance:
        checked = check_files(out, advance)
    # A card is made of what lies in the folder; the evaluations that will lie there are shown to it beforehand.
    card = refresh_card(out, name=PurePath(repo).name, base_model=base_model, more=_named(results))
    card = card.replace(UNNAMED, f'name = "{repo}"')
    files = {record.path: record.size for record in manifest.files}
    files |= {path: (out / path).stat().st_size for path in checked.edited}
    files |= {f"{EVALUATIONS}/{name}.json": file.stat().st_size for name, file in _named(results).items()}
    files |= {CARD: len(card.encode()), RESULT_MANIFEST: (out / RESULT_MANIFEST).stat().st_size}
    return Upload(out, dict(sorted(files.items())), card, tuple(_notes(out, checked, card)))


def push(
    upload: Upload,
    repo: str,
    *,
    results: Sequence[Path] = (),
    private: bool = False,
    revision: str | None = None,
    message: str = "",
    create_pr: bool = False,
    token: str | None = None,
) -> Pushed:
    """Send what :func:`prepare` found. The card and the evaluations are put into the result first, so that what is on
    the hub is what is here. Files that the hub has already are not sent again.

    Args:
        upload: what to send.
        repo: where to; it is made if it is not there.
        results: the files that ``prepare`` was told of.
        private: make a new repository private.
        revision: a branch, made if it is not there; by default ``main``.
        message: of the commit.
        create_pr: open a pull request in place of a commit.
        token: by default the one that is logged in.

    Raises:
        UsageError: nobody is logged in; a pull request to a branch; a public repository where a private one is asked.
        ConmoeError: the hub refused, or the connection failed.
    """
    check_repo(repo)
    if create_pr and revision not in (None, "main"):
        raise UsageError("--create-pr opens a pull request to main; leave out --revision.")
    api = HfApi(token=token)
    with _asking(repo):
        api.whoami()
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise UsageError(f"{repo} is there already, and public; make it private on its page, or name another.")
        if revision:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
    _settle(upload, results)
    operations = [CommitOperationAdd(path, upload.folder / path) for path in upload.files]
    with _asking(repo), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done = api.create_commit(
            url.repo_id,
            operations,
            commit_message=message or "A model consolidated with conmoe",
            revision=revision,
            create_pr=create_pr,
        )
    notes = tuple(one_line(each.message) for each in said if "README.md" in str(each.message))
    return Pushed(upload, repo, str(done.pr_url or done.commit_url), notes)


def push_command(out: Path, repo: str, *, private: bool = False) -> str:
    """What pushes a result that is finished."""
    return shlex.join(["conmoe", "push", str(out), repo, *(["--private"] if private else [])])


def _settle(upload: Upload, results: Sequence[Path]) -> None:
    """Card and evaluations into the folder, and into its manifest."""
    added = {f"{EVALUATIONS}/{name}.json": file for name, file in _named(results).items()}
    for path, file in added.items():
        (upload.folder / path).parent.mkdir(exist_ok=True)
        write_json(upload.folder / path, _without_folders(read_evaluation(file)))
    write_atomic(upload.folder / CARD, upload.card)
    reseal(upload.folder, [*(path for path in EDITABLE if path in upload.files), *added])


def _named(results: Sequence[Path]) -> dict[str, Path]:
    """Evaluations by the names that they get in a result."""
    named = {re.sub(r"[^\w.-]+", "-", file.stem).strip(".-") or "evaluation": file for file in results}
    if len(named) < len(results):
        raise UsageError("Two files of --results have the same name; rename one.")
    return named


def _without_folders(value: Any) -> Any:
    """Names of this machine's folders are nobody's business: of absolute paths the last part is left."""
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return without_folder(value) if isinstance(value, str) else value


def _check_about(out: Path, file: Path) -> None:
    record, stored = read_evaluation(file), sum(entry.nbytes for entry in read_entries(out).values())
    found, known = record.get("bytes"), record.get("fingerprint")
    if isinstance(found, int) and found != stored:
        raise UsageError(f"{file} measured a model of {found:,} bytes, and {out} has {stored:,}; it is about another.")
    if known is not None and known != weights_fingerprint(out):
        raise UsageError(f"{file} measured another model than {out}.")


def _notes(out: Path, checked: Checked, card: str) -> Iterator[str]:
    for path in checked.strangers:
        yield f"Left out: {one_line(path)}, which is not in the manifest."
    for path in checked.edited:
        rest = ", but for the section that conmoe writes" if path == CARD else ""
        yield f"{path} was edited since it was written, and goes as it is{rest}."
    if "\nbase_model:" not in card.split("\n---", 1)[0]:
        yield "The card names no base model, for the source was a folder; --base-model owner/name links to it."
    if "\nlicense:" not in card.split("\n---", 1)[0]:
        yield "The card names no licence, for the source's card names none."
    homes = {str(Path.home()), str(out.resolve().parent)} - {"/"}
    for record in checked.manifest.files:
        if record.path.endswith(_READABLE) and (record.path.startswith("conmoe/") or "/" not in record.path):
            text = (out / record.path).read_text("utf-8", errors="replace")
            if any(home in text or json.dumps(home)[1:-1] in text for home in homes):
                yield f"{record.path} names folders of this machine."
    if quoting := [path for path in _QUOTING if any(record.path == path for record in checked.manifest.files)]:
        yield f"{' and '.join(quoting)} may quote the held-out text."


@contextmanager
def _asking(repo: str) -> Iterator[None]:
    """What the hub or the way to it answers, in one sentence."""
    try:
        yield
    except ConmoeError:
        raise
    except LocalTokenNotFoundError:
        raise UsageError("Nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN.") from None
    except OfflineModeIsEnabled:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        reason = {
            401: "the hub does not know this token; run `hf auth login`, or set HF_TOKEN to one that may write",
            403: "this token may not write there; take one that may, or another repository",
            429: "the hub asks for patience; run the same command again later",
        }.get(code, f"the hub answered {code} ({_first_line(error)}); run the same command again")
        raise ConmoeError(f"Pushing to {repo} failed: {reason}.") from error
    except Exception as error:  # of the client or below it: the upload failed, whatever its class
        raise ConmoeError(f"Pushing to {repo} failed: {_first_line(error)}; run the same command again.") from error


def _first_line(error: BaseException) -> str:
    """The line that says most: of a wrapper, that of what it wraps."""
    told = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    said = getattr(told, "server_message", None) or " ".join(str(told).splitlines()[:2])
    return one_line(said or type(told).__name__).rstrip(".:;")
