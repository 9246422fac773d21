"""What a result consists of: ``conmoe/manifest.json``, with the size and SHA-256 of every file.

It lies in a result when the result gets its name, and says whether a copy of it is whole: a file that is cut off,
altered or missing is named, and so is one that does not belong.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from conmoe import __version__
from conmoe.artifacts import LABEL, Record, checkpoint_fingerprint, parse_record, write_atomic
from conmoe.shards import read_entries
from conmoe.types import ConmoeError, UsageError

FORMAT = 1
FOLDER = "conmoe"
RESULT_MANIFEST = f"{FOLDER}/manifest.json"
CARD = "README.md"
#: Files that people, and conmoe itself, may write anew: a change is told, and is no damage.
EDITABLE = (CARD, f"{FOLDER}/report.html")
#: Libraries that made the files.
_LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub")
_CHUNK = 1 << 22


class FileRecord(Record):
    """One file of a result."""

    path: str  # relative to the folder, with slashes
    size: int  # bytes
    sha256: str


class SourceRecord(Record):
    """The checkpoint that a result was made from."""

    name: str
    revision: str = ""  # the commit on the hub, where it came from there
    fingerprint: str


class ResultManifest(Record):
    """What a result was made from, and every file of it but the manifest itself and the folder's label."""

    format: int = FORMAT
    source: SourceRecord
    plan: str  # fingerprint
    form: str
    versions: dict[str, str]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """A folder held against its manifest; paths are relative to the folder."""

    manifest: ResultManifest
    edited: tuple[str, ...] = ()  # of EDITABLE
    strangers: tuple[str, ...] = ()  # there, and not in the manifest


def versions() -> dict[str, str]:
    """conmoe, Python and the libraries that made the files."""
    found = {name: version(name) for name in _LIBRARIES}
    return {"conmoe": __version__, "python": platform.python_version(), **found}


def seal(folder: Path, source: SourceRecord, plan: str, form: str, *, known: Mapping[str, str] = {}) -> ResultManifest:
    """Write the manifest of a finished folder.

    Args:
        folder: the result.
        source: what it was made from.
        plan: the plan's fingerprint.
        form: how it is stored.
        known: SHA-256 of files that were hashed while they were written; they are not read again.
    """
    files = tuple(_record(folder, path, known.get(path)) for path in list_files(folder))
    made = ResultManifest(source=source, plan=plan, form=form, versions=versions(), files=files)
    _write(folder, made)
    return made


def reseal(folder: Path, paths: Iterable[str]) -> ResultManifest:
    """Take up files that were written anew, or added, into the manifest."""
    old = read_result_manifest(folder)
    files = {record.path: record for record in old.files} | {path: _record(folder, path, None) for path in paths}
    made = old.model_copy(update={"files": tuple(files[path] for path in sorted(files))})
    _write(folder, made)
    return made


def weights_fingerprint(folder: Path) -> str | None:
    """What a checkpoint is told from others by, of its configuration and of samples of its weights, if it has any."""
    if not any(folder.glob("*.safetensors")):
        return None
    return checkpoint_fingerprint(folder, (entry.file for entry in read_entries(folder).values()))


def read_result_manifest(folder: Path) -> ResultManifest:
    """The manifest of a result.

    Raises:
        UsageError: the folder has none.
        ConmoeError: it cannot be read, or names a file outside of the folder.
    """
    file = folder / RESULT_MANIFEST
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; name a result of conmoe compress, apply or tune.")
    if not file.is_file():
        raise UsageError(f"{folder} has no {RESULT_MANIFEST}; only finished results of conmoe {__version__} have one.")
    manifest = parse_record(ResultManifest, file, FORMAT)
    for record in manifest.files:
        if not _stays_inside(record.path):
            raise ConmoeError(f"{file} names {record.path!r}, which is not a file of that folder.")
    return manifest


def check_files(folder: Path, advance: Callable[[int], None] = lambda nbytes: None) -> Checked:
    """Hold every file of a result against its manifest.

    Args:
        folder: the result.
        advance: called with the bytes that were read since the last call.

    Raises:
        ConmoeError: a file is missing, cut off or altered.
    """
    manifest = read_result_manifest(folder)
    there = set(list_files(folder))
    edited = []
    for record in manifest.files:
        file = folder / record.path
        if record.path not in there:
            raise ConmoeError(f"{file} is missing or a link; the result is not whole, make or copy it again.")
        size = file.stat().st_size
        same = size == record.size and sha256(file, advance) == record.sha256
        if record.path in EDITABLE:
            edited += [] if same else [record.path]
        elif size != record.size:
            raise ConmoeError(f"{file} has {size:,} bytes and should have {record.size:,}; make or copy it again.")
        elif not same:
            raise ConmoeError(f"{file} was altered after it was written; make or copy the result again.")
    strangers = sorted(there - {record.path for record in manifest.files} | _links(folder))
    return Checked(manifest, tuple(edited), tuple(strangers))


def list_files(folder: Path) -> list[str]:
    """Every file below ``folder`` but the manifest and the label; links are not followed and not listed."""
    found = (file for file in folder.rglob("*") if file.is_file() and not _is_link(folder, file))
    names = (file.relative_to(folder).as_posix() for file in found)
    return sorted(name for name in names if name not in (RESULT_MANIFEST, LABEL))


def sha256(file: Path, advance: Callable[[int], None] = lambda nbytes: None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _record(folder: Path, path: str, known: str | None) -> FileRecord:
    file = folder / path
    return FileRecord(path=path, size=file.stat().st_size, sha256=known or sha256(file))


def _write(folder: Path, manifest: ResultManifest) -> None:
    (folder / FOLDER).mkdir(exist_ok=True)
    write_atomic(folder / RESULT_MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    plain = path == PurePosixPath(path).as_posix() and "\\" not in path
    return bool(parts) and plain and not PurePosixPath(path).is_absolute() and ".." not in parts


def _links(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_symlink()}


def _is_link(folder: Path, file: Path) -> bool:
    """Whether the file, or a folder on the way to it, is a link: its contents lie elsewhere."""
    inside = file.relative_to(folder)
    return any((folder / part).is_symlink() for part in (inside, *inside.parents[:-1]))
