"""Safetensors files as byte ranges: headers read without data, tensors read into place, shards written as a stream.

The safetensors library maps whole files, which counts as resident memory, and writes only tensors that are all in
memory; a checkpoint larger than memory needs neither. The format is the library's own: an eight byte length, a JSON
header, the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe.types import ConmoeError, UsageError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CHUNK = 16 * 2**20
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor on disk: where its bytes are and what they mean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to be written: ``chunks()`` yields exactly ``nbytes`` bytes when its turn comes.

    One with ``parts`` lies on disk as these, in low precision, and is computed from them when it is read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]
    parts: tuple[Held, ...] = ()

    @property
    def file(self) -> Path:
        """Where an error would say that it is."""
        return self.parts[0].file if self.parts else Path("(not written)")


#: A tensor of a checkpoint, written or not.
Held = Entry | Output


def parts_of(entry: Held) -> tuple[Held, ...]:
    """The tensors on disk that hold ``entry``: itself, or the parts that it is computed from."""
    return entry.parts if isinstance(entry, Output) and entry.parts else (entry,)


def copies(entry: Held, name: str = "") -> Iterator[Output]:
    """A tensor byte by byte, with everything that it is made of; all under ``name``, if it gets another."""
    module = (name or entry.name).rpartition(".")[0]
    for part in parts_of(entry):
        own = part.name if not name else name if part is entry else f"{module}.{part.name.rpartition('.')[2]}"
        yield Output(own, part.dtype, part.shape, part.nbytes, partial(raw_chunks, part))


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of the checkpoint in ``folder``, from its headers alone.

    Raises:
        UsageError: no safetensors file.
        ConmoeError: an index that names a missing file, a file outside the folder or a tensor
            that is not there; a header that is cut off, malformed or disagrees with the size of its file.
    """
    files = _shard_files(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        for entry in _read_header(file):
            if entry.name in entries:
                raise ConmoeError(f"Tensor {entry.name} is stored twice: in {entries[entry.name].file} and {file}.")
            entries[entry.name] = entry
    return entries


def read_tensor(entry: Held) -> Tensor:
    """The tensor of ``entry``, in its dtype on disk."""
    tensor = torch.empty(entry.shape, dtype=torch_dtype(entry))
    read_into(entry, tensor)
    return tensor


def read_into(entry: Held, out: Tensor) -> None:
    """Read ``entry`` into the contiguous tensor ``out``, casting where their dtypes differ.

    An output that is not written is made on the spot: what a checkpoint would hold can be read like one.
    """
    if tuple(out.shape) != entry.shape:
        raise ConmoeError(
            f"Tensor {entry.name} in {entry.file} has shape {list(entry.shape)}, but the configuration of the model "
            f"asks for {list(out.shape)}."
        )
    if out.dtype != torch_dtype(entry) or not out.is_contiguous():
        out.copy_(read_tensor(entry))
    elif isinstance(entry, Output):
        position, memory = 0, bytes_of(out)
        for chunk in entry.chunks():
            memory[position : position + len(chunk)] = chunk
            position += len(chunk)
    elif entry.nbytes:
        _pread(entry.file, entry.start, bytes_of(out))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, to read from or to write into."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def raw_chunks(entry: Held, start: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
    """The bytes ``start .. start + nbytes`` of a tensor's data, a few megabytes at a time."""
    end = entry.nbytes if nbytes is None else start + nbytes
    if isinstance(entry, Output):
        yield bytes_of(read_tensor(entry).contiguous())[start:end]
        return
    buffer = bytearray(min(_CHUNK, max(end - start, 0)))
    while start < end:
        view = memoryview(buffer)[: min(len(buffer), end - start)]
        _pread(entry.file, entry.start + start, view)
        yield view
        start += len(view)


def torch_dtype(entry: Held) -> torch.dtype:
    try:
        return DTYPES[entry.dtype]
    except KeyError:
        raise ConmoeError(f"Tensor {entry.name} in {entry.file} has the unknown dtype {entry.dtype}.") from None


def tensor_output(name: str, dtype: str, shape: Sequence[int], make: Callable[[], Tensor]) -> Output:
    """An output that is computed when it is written."""
    expected, count = DTYPES[dtype], 1
    for size in shape:
        count *= size

    def chunks() -> Iterator[memoryview]:
        tensor = make()
        if tensor.dtype != expected or tuple(tensor.shape) != tuple(shape):
            raise ConmoeError(f"{name} came out as {tensor.dtype} {list(tensor.shape)}, planned {dtype} {list(shape)}.")
        yield bytes_of(tensor.contiguous())

    return Output(name, dtype, tuple(shape), count * expected.itemsize, chunks)


def write_shards(
    outputs: Sequence[Output], folder: Path, shard_bytes: int, advance: Callable[[int], None] = lambda nbytes: None
) -> dict[str, str]:
    """Write ``outputs`` as a sharded checkpoint; shards already complete from an earlier, killed run are kept.

    A shard gets its name only when all of it is on disk, so a file under its final name is whole. Returns the SHA-256
    of the shards that were written, by their names; a shard that was kept is not read for it.
    """
    shards = _partition(outputs, shard_bytes)
    names = [
        SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    digests = {}
    for name, shard in zip(names, shards, strict=True):
        target = folder / name
        if target.exists():
            advance(sum(output.nbytes for output in shard))
        else:
            temporary = target.with_suffix(".tmp")
            digests[name] = _write_shard(temporary, shard, advance)
            os.replace(temporary, target)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(output.nbytes for output in outputs)},
            "weight_map": {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return digests


def _shard_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).is_file():
            raise UsageError(f"{folder} holds no {SINGLE} and no {INDEX}; conmoe reads safetensors checkpoints only.")
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConmoeError(f"{index} is not a valid safetensors index.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ConmoeError(f"{index} points outside its folder: {name!r}.")
        if not (folder / name).is_file():
            raise ConmoeError(f"{index} names {name}, which is not there; the checkpoint is incomplete.")
    return [folder / name for name in names]


def _read_header(file: Path) -> list[Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ConmoeError(f"{file} is cut off or no safetensors file: its header does not fit in {size} bytes.")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = [_entry(file, name, record, 8 + length) for name, record in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConmoeError(f"{file} has a malformed safetensors header.") from error
    for entry in entries:
        if entry.start + entry.nbytes > size:
            raise ConmoeError(
                f"{file} is cut off: tensor {entry.name} ends at byte {entry.start + entry.nbytes}, "
                f"the file at byte {size}."
            )
    return entries


def _entry(file: Path, name: str, record: dict[str, Any], offset: int) -> Entry:
    begin, end = record["data_offsets"]
    entry = Entry(name, record["dtype"], tuple(record["shape"]), file, offset + begin, end - begin)
    if begin < 0 or end < begin:
        raise ValueError(name)
    if entry.dtype in DTYPES and math.prod(entry.shape) * DTYPES[entry.dtype].itemsize != entry.nbytes:
        raise ValueError(name)
    return entry


def _pread(file: Path, start: int, view: memoryview) -> None:
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        done = 0
        while done < len(view):
            got = stream.readinto(view[done : done + 2**30])
            if not got:
                raise ConmoeError(f"{file} ended early, at byte {start + done}; the file is cut off.")
            done += got


def _partition(outputs: Sequence[Output], shard_bytes: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.nbytes
    return shards


def _write_shard(file: Path, outputs: Sequence[Output], advance: Callable[[int], None]) -> str:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in outputs:
        header[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [position, position + output.nbytes],
        }
        position += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(prefix)
    with file.open("wb") as stream:
        stream.write(prefix)
        for output in outputs:
            written = 0
            for chunk in output.chunks():
                stream.write(chunk)
                digest.update(chunk)
                written += len(chunk)
                advance(len(chunk))
            if written != output.nbytes:
                raise ConmoeError(f"{output.name} gave {written} bytes where {output.nbytes} were planned.")
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()
