"""The file format, against the safetensors library, and what damaged files get."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conmoe.shards import (
    DTYPE_NAMES,
    INDEX,
    raw_chunks,
    read_entries,
    read_into,
    read_tensor,
    tensor_output,
    write_shards,
)
from conmoe.types import ConmoeError

TENSORS = {
    "a.weight": torch.randn(7, 5),
    "b.weight": torch.randn(3, 4).bfloat16(),
    "c": torch.arange(6),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}


def outputs(tensors: dict[str, torch.Tensor]) -> list:
    return [tensor_output(name, DTYPE_NAMES[value.dtype], value.shape, value.clone) for name, value in tensors.items()]


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_what_is_written_the_library_reads(shard_bytes: int, tmp_path: Path) -> None:
    write_shards(outputs(TENSORS), tmp_path, shard_bytes)
    loaded = {}
    for file in tmp_path.glob("*.safetensors"):
        loaded |= load_file(file)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())
    if (tmp_path / INDEX).exists():
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    entries = read_entries(tmp_path)
    assert all(torch.equal(read_tensor(entries[name]), value) for name, value in TENSORS.items())
    wide = torch.empty(3, 4)
    read_into(entries["b.weight"], wide)
    assert torch.equal(wide, TENSORS["b.weight"].float())
    raw = b"".join(bytes(chunk) for chunk in raw_chunks(entries["a.weight"], 20, 40))
    assert raw == TENSORS["a.weight"].numpy().tobytes()[20:60]


def test_finished_shards_of_a_killed_run_are_kept(tmp_path: Path) -> None:
    made: list[str] = []
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("abc")}

    def track(name: str, fail: bool) -> torch.Tensor:
        if fail and name == "c":
            raise KeyboardInterrupt
        made.append(name)
        return tensors[name]

    def run(fail: bool) -> None:
        items = [tensor_output(name, "F32", (4,), partial(track, name, fail)) for name in tensors]
        write_shards(items, tmp_path, 1)

    with pytest.raises(KeyboardInterrupt):
        run(True)
    run(False)
    assert made == ["a", "b", "c"]
    assert torch.equal(read_tensor(read_entries(tmp_path)["c"]), tensors["c"])


def damaged(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    if how == "cut in the data":
        data = data[:-8]
    elif how == "cut in the header":
        data = data[:20]
    elif how == "empty":
        data = bytearray()
    elif how == "garbled header":
        data[8:12] = b"!!!!"
    elif how == "header longer than the file":
        data[:8] = (10**12).to_bytes(8, "little")
    file.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["cut in the data", "cut in the header", "empty", "garbled header", "header longer than the file"]
)
def test_a_damaged_file_is_named(how: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    damaged(tmp_path, how)
    with pytest.raises(ConmoeError, match=r"model\.safetensors"):
        read_entries(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_cannot_point_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConmoeError, match="points outside its folder"):
        read_entries(tmp_path)


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ConmoeError, match="incomplete"):
        read_entries(tmp_path)
