"""Where text comes from: files and hub data sets, read as a stream of pieces.

A *document* is one record of a file, or text between two separator lines. A *piece* is a stretch of a document short
enough that a few thousand tokens still come from many places of a book; pieces are what is drawn at random.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from conmoe.types import UsageError

Messages = list[dict[str, Any]]

#: A line of a text file that holds only this ends a document.
SEPARATOR = "<|endoftext|>"

#: About two thousand tokens: longer documents are cut here, at a line end where there is one.
PIECE_CHARACTERS = 8192

SUFFIXES = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
HUB_PREFIX = "hub:"

_HUB_SPLITS = frozenset({"train", "validation", "test"})
_HUB_BUFFER = 1000
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("problem", "solution"),
)
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text, or a whole chat; ``ends`` says that the document ends with it."""

    content: str | Messages
    ends: bool = True

    @property
    def characters(self) -> int:
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(str(message.get("content", ""))) for message in self.content)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell this text from any other."""
        content = self.content if isinstance(self.content, str) else json.dumps(self.content, sort_keys=True)
        return hashlib.sha1(content.encode(errors="surrogatepass")).hexdigest()[:16]


def check_source(source: str, option: str = "--data") -> None:
    """Refuse, before any work, a file that is not there or that cannot be read as text; ``option`` named it."""
    if source.startswith(HUB_PREFIX):
        hub_address(source, option)
        return
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"{option} {source}: {_why_no_file(path)}")
    if not path.name.endswith(SUFFIXES):
        raise UsageError(f"{option} {source}: the file's name must end in one of {', '.join(SUFFIXES)}.")


def read_pieces(source: str, seed: int | None = None) -> Iterator[Piece]:
    """Stream the pieces of a checked ``source``; ``seed`` shuffles where a full pass is too long (hub data sets)."""
    if source.startswith(HUB_PREFIX):
        return _from_records(_hub_records(source, seed))
    path = Path(source)
    if path.name.endswith(".parquet"):
        return _guarded(path, lambda: _from_records(_parquet_records(path)))
    if ".jsonl" in path.name:
        return _guarded(path, lambda: _from_records(_json_records(path)))
    return _guarded(path, lambda: _text_pieces(path))


def hub_address(source: str, option: str = "--data") -> tuple[str, str | None, str]:
    """``hub:name[:config][:split]`` -> (name, config, split); a lone second part may be a split."""
    name, *rest = source.removeprefix(HUB_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UsageError(f"{option} {source}: a hub data set is written hub:name[:config][:split].")
    if len(rest) == 1 and rest[0] in _HUB_SPLITS:
        rest = ["", rest[0]]
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or "train"


def cut(text: str) -> Iterator[Piece]:
    """The pieces of one document."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        middle, end = start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS
        found = text.rfind("\n", middle, end)
        found = found if found >= 0 else text.rfind(" ", middle, end)
        stop = found + 1 if found >= 0 else end
        yield Piece(text[start:stop], ends=False)
        start = stop
    yield Piece(text[start:])


def first_line(error: BaseException) -> str:
    """What went wrong, ready to stand inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return f"is a folder; give the files in it one by one, or {HUB_PREFIX}{path} for a data set folder."
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"no such file; did you mean {path.with_name(near[0])}?" if near else "no such file."


def _guarded(path: Path, read: Callable[[], Iterator[Piece]]) -> Iterator[Piece]:
    try:
        yield from read()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read, it may be damaged: {first_line(error)}.") from error


def _open_text(path: Path) -> IO[str]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    handle: IO[str] = opener(path, "rt", encoding="utf-8")
    return handle


def _text_pieces(path: Path) -> Iterator[Piece]:
    """A file without separator lines is one document: blank lines divide paragraphs and not documents."""
    lines: list[str] = []
    characters = 0
    with _open_text(path) as handle:
        for line in handle:
            if line.rstrip("\r\n") == SEPARATOR:
                yield from cut("".join(lines))
                lines, characters = [], 0
                continue
            if characters + len(line) > PIECE_CHARACTERS and characters > PIECE_CHARACTERS // 2:
                yield Piece("".join(lines), ends=False)
                lines, characters = [], 0
            lines.append(line)
            characters += len(line)
    yield from cut("".join(lines))


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    with _open_text(path) as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}:{number} is not JSON: {error.msg} at column {error.colno}.") from error


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"Reading {path} needs the datasets package; pip install 'conmoe[data]'.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            rows = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} cannot be read as Parquet: {first_line(error)}.") from error


def _hub_records(source: str, seed: int | None) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"Reading {source} needs the datasets package; pip install 'conmoe[data]'.") from error
    name, config, split = hub_address(source)
    # The hub is streamed, so that a few thousand tokens of a large data set do not download all of it. Offline, only
    # what datasets has already prepared in its cache can be read, and only without streaming.
    offline = bool(datasets.config.HF_HUB_OFFLINE) and not Path(name).exists()
    try:
        rows: Any = datasets.load_dataset(name, config, split=split, streaming=not offline)
        rows = rows.to_iterable_dataset() if offline else rows
        rows = rows if seed is None else rows.shuffle(seed=seed, buffer_size=_HUB_BUFFER)
        for number, row in enumerate(rows, 1):
            yield f"{source}, record {number}", row
    except UsageError:
        raise
    except Exception as error:  # datasets has no common ancestor for what can go wrong here
        hint = "; the hub is in offline mode (HF_HUB_OFFLINE)" if offline else ""
        raise UsageError(f"--data {source}: cannot be loaded{hint}: {first_line(error)}.") from error


def _from_records(records: Iterable[tuple[str, Any]]) -> Iterator[Piece]:
    for where, record in records:
        content = _content(where, record)
        if isinstance(content, str):
            yield from cut(content)
        else:
            yield Piece(content)


def _content(where: str, record: Any) -> str | Messages:
    """The text or chat of one record, by the field names in common use."""
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise UsageError(f"{where} is neither a text nor an object with named fields.")
    for key in ("messages", "conversations"):
        if isinstance(record.get(key), list):
            return [_message(where, message) for message in record[key]]
    for key in ("text", "content"):
        if isinstance(record.get(key), str):
            return str(record[key])
    for first, second in _PAIRS:
        if isinstance(record.get(first), str) and isinstance(record.get(second), str):
            return f"{record[first]}\n{record[second]}"
    pairs = ", ".join(f"{first} and {second}" for first, second in _PAIRS)
    raise UsageError(
        f"{where} has no text: none of text, content, messages, {pairs} among its fields ({', '.join(record)})."
    )


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} holds a chat message without role and content.")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role is None or content is None:
        raise UsageError(f"{where} holds a chat message without role and content.")
    return {**message, "role": _ROLES.get(role, role), "content": content}
