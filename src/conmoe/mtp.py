"""Heads that predict further tokens (MTP): kept, pruned or dropped on purpose, and never lost without a word.

The classes of Transformers that conmoe compresses do not run such a head, so no statistic knows its experts; but it has
as many as the layers before it, and the configuration states one number for all of them.

* ``keep``: every tensor bit for bit. Only where the number of experts stays, or the head has none of its own.
* ``prune``: the experts of the head are pruned to the number of the other layers, by their weights alone: those with
  the lowest ``mean |w| / rms(w)`` stay (AIMER, arXiv 2603.18492), equally many in each group of the router. Which
  experts stayed in the last layer says nothing about the head, whose experts were trained by themselves. What pruning
  does to the head's drafts is not measured; a verifying engine decodes the same tokens, only perhaps more slowly.
* ``drop``: left out, and the configuration says that there is none.
* ``auto``: the first of these that can be.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from conmoe.checkpoint import MTP_FIELDS, renumbered
from conmoe.forms import check_groups
from conmoe.moe import MoeLayer, count_field
from conmoe.ops.scores import flatness
from conmoe.shards import Held, Output, copies, parts_of, raw_chunks, read_tensor, tensor_output, torch_dtype
from conmoe.source import Source
from conmoe.types import UsageError

Policy = Literal["auto", "keep", "prune", "drop"]
POLICIES: tuple[Policy, ...] = ("auto", "keep", "prune", "drop")

_NAMED = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ONE_EXPERT = re.compile(r"^(.+)\.experts\.(\d+)\.(.+)$")
_ALL_EXPERTS = re.compile(r"^(.+)\.experts\.(.+)$")
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Block:
    """The experts of one layer of a head, and the tensors that hold one row for each."""

    path: str
    experts: int
    single: Mapping[str, tuple[Held, ...]]  # what an expert consists of -> that of each expert
    fused: tuple[Held, ...]  # tensors of all experts
    rows: tuple[tuple[Held, int], ...]  # router tensors, with the axis of the experts

    @property
    def entries(self) -> Iterator[Held]:
        for pieces in self.single.values():
            yield from pieces
        yield from self.fused
        yield from (entry for entry, _ in self.rows)


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a checkpoint; ``odd`` says why their experts cannot be pruned, and is empty where they can."""

    entries: tuple[Held, ...] = ()
    blocks: tuple[Block, ...] = ()
    odd: str = ""

    @property
    def has_experts(self) -> bool:
        return bool(self.blocks or self.odd)


@dataclass(frozen=True, slots=True)
class Settled:
    """What becomes of the heads of a checkpoint. Which experts stay is looked up when it is first asked for."""

    policy: Policy | None  # None: the checkpoint has no head
    outputs: tuple[Output, ...]
    copied: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()  # tensors of the result that hold a part of the source's
    dropped: tuple[str, ...] = ()
    why: str = ""  # why they are dropped, where nobody asked for it
    kept: Callable[[], dict[str, list[int]]] = dict  # block -> experts of the source that stay

    def as_json(self) -> dict[str, Any] | None:
        if self.policy is None:
            return None
        return {
            "policy": self.policy,
            "copied": list(self.copied),
            "rewritten": list(self.rewritten),
            "dropped": list(self.dropped),
            "why": self.why,
            "experts": self.kept(),
            "rule": "lowest mean |w| / rms(w) (AIMER), not measured" if self.policy == "prune" else None,
        }


#: What becomes of the heads of a checkpoint that has none.
NO_HEAD = Settled(None, ())


def is_head(source: Source, name: str) -> bool:
    """Whether a tensor that the model's class does not read belongs to a head that predicts further tokens."""
    layer = _LAYER.search(name)
    last = int(getattr(source.config, "num_hidden_layers", 0))
    return bool(_NAMED.search(name)) or (layer is not None and int(layer[1]) >= last > 0)


def find_heads(source: Source) -> Heads:
    """The heads of a checkpoint, from its headers."""
    entries = tuple(entry for entry in source.layout.ignored if is_head(source, entry.name))
    single: dict[str, dict[str, dict[int, Held]]] = defaultdict(lambda: defaultdict(dict))
    fused: dict[str, list[Held]] = defaultdict(list)
    for entry in entries:
        one, every = _ONE_EXPERT.match(entry.name), _ALL_EXPERTS.match(entry.name)
        if one:
            single[one[1]][one[3]][int(one[2])] = entry
        elif every:
            fused[every[1]].append(entry)
    blocks, E = [], int(getattr(source.config, count_field(source.config)))
    for path in (*single, *(path for path in fused if path not in single)):
        found = _block(path, single.get(path, {}), fused.get(path, []), entries, E)
        if isinstance(found, str):
            return Heads(entries, (), found)
        blocks.append(found)
    return Heads(entries, tuple(blocks))


def settle(source: Source, count: int, policy: Policy, *, whole: bool = False) -> Settled:
    """What becomes of the heads in a result whose configuration states ``count`` experts.

    Args:
        source: the source checkpoint.
        count: experts that the result's configuration states for every layer.
        policy: what is asked.
        whole: the form stores every tensor of the source.

    Raises:
        UsageError: what is asked cannot be.
    """
    heads = find_heads(source)
    if not heads.entries:
        return NO_HEAD
    same = whole or not heads.has_experts or count == source.layers[0].logical
    hindrance = "" if same else _hindrance(source.layers[0], heads, count)
    if policy == "keep" and not same:
        raise UsageError(
            f"--mtp keep: the head for further tokens has {source.layers[0].logical} experts, and the result's "
            f"configuration states {count} for every layer, so no engine could load it; use --mtp prune or --mtp drop."
        )
    if policy == "prune" and hindrance:
        raise UsageError(f"--mtp prune: {hindrance}; use --mtp drop.")
    if policy == "drop" or hindrance:
        return Settled("drop", (), dropped=_names(heads.entries), why=hindrance if policy == "auto" else "")
    if same:
        return Settled("keep", tuple(_copied(heads.entries)), copied=_names(heads.entries))
    return _pruned(source.layers[0], heads, count)


def head_experts(source: Source, settled: Settled) -> dict[str, list[int]]:
    """Block of a head -> the experts of the source that stay in it, in order."""
    if settled.policy == "prune":
        return settled.kept()
    numbers: dict[str, set[int]] = defaultdict(set)
    for entry in find_heads(source).entries:
        if expert := _ONE_EXPERT.match(entry.name):
            numbers[expert[1]].add(int(expert[2]))
    return {path: sorted(found) if settled.policy == "keep" else [] for path, found in numbers.items()}


def most_bytes(source: Source, count: int, policy: Policy) -> int:
    """What the heads take at most in such a result; unlike what they do take it never falls as ``count`` grows."""
    heads = find_heads(source)
    if policy == "drop" or not heads.entries:
        return 0
    E = source.layers[0].logical
    experts = sum(entry.nbytes for block in heads.blocks for entry in block.entries)
    rest = sum(entry.nbytes for entry in heads.entries) - experts
    return rest + experts * min(count, E) // E if not heads.odd or count >= E else 0


def without_heads(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that announce heads, set to none; those that the class only defaults to as well."""
    changed: dict[str, Any] = {}
    for field in MTP_FIELDS:
        if field in config or getattr(source.config, field, None):
            changed |= dict.fromkeys(stated(source, config, field), 0)
    return changed


def stated(source: Source, config: Mapping[str, Any], field: str) -> list[str]:
    """Every name, the field's own or an alias, by which a config.json states it; its own if it is left to a default."""
    aliases = sorted(alias for alias, name in type(source.config).attribute_map.items() if name == field)
    return [name for name in (field, *aliases) if name in config] or [field]


def note(settled: Settled) -> str:
    """What there is to say of it, in a sentence; nothing where the checkpoint has no head."""
    tensors = f"{len(settled.copied) + len(settled.rewritten) + len(settled.dropped)} tensors"
    if settled.policy == "drop":
        because = f", because {settled.why}" if settled.why else ""
        return f"Dropped the head for further tokens (MTP, {tensors}){because}; the configuration says so."
    if settled.policy == "keep":
        return f"Kept the head for further tokens (MTP, {tensors}) as it is."
    if settled.policy == "prune":
        kept = next(iter(settled.kept().values()))
        return (
            f"Pruned the head for further tokens (MTP) to {len(kept)} experts, by their weights alone; what that does "
            "to its drafts is not measured."
        )
    return ""


def _block(
    path: str, single: Mapping[str, Mapping[int, Held]], fused: list[Held], entries: tuple[Held, ...], E: int
) -> Block | str:
    """The experts below ``path``, or the reason why they cannot be pruned."""
    for part, pieces in single.items():
        if sorted(pieces) != list(range(E)) or len({(each.dtype, each.shape) for each in pieces.values()}) != 1:
            return f"its experts ({path}.experts.*.{part}) are not {E} of one shape, as in the other layers"
    if any(entry.shape[:1] != (E,) for entry in fused):
        return f"its experts ({path}.experts) are not {E}, as in the other layers"
    matrices = [entry for pieces in single.values() for entry in pieces.values() if len(entry.shape) > 1]
    matrices += [entry for entry in fused if len(entry.shape) > 2]
    if not matrices or any(entry.dtype not in _FLOATS or parts_of(entry) != (entry,) for entry in matrices):
        return f"the weights of its experts ({path}.experts) are not plain numbers"
    rows = []
    for entry in entries:
        rest = entry.name.removeprefix(f"{path}.")
        if rest != entry.name and not rest.startswith("experts.") and "shared" not in rest and E in entry.shape:
            rows.append((entry, entry.shape.index(E)))
    if not any(len(entry.shape) == 2 and axis == 0 for entry, axis in rows):
        return f"its router (beside {path}.experts) was not found"
    ordered = {part: tuple(pieces[e] for e in range(E)) for part, pieces in single.items()}
    return Block(path, E, ordered, tuple(fused), tuple(rows))


def _hindrance(layer: MoeLayer, heads: Heads, count: int) -> str:
    """Why the experts of a head cannot be pruned to ``count``, or nothing."""
    if heads.odd:
        return heads.odd
    if count > layer.logical:
        return f"it has {layer.logical} experts, and the layers now share pools of {count}"
    if count < layer.top_k:
        return f"its router chooses {layer.top_k} experts, and only {count} would be left"
    try:
        if layer.groups > 1:
            check_groups(layer, count)
    except UsageError as error:
        return str(error).rstrip(".")
    return ""


def _pruned(layer: MoeLayer, heads: Heads, count: int) -> Settled:
    outputs: list[Output] = []
    chosen = {block.path: functools.cache(partial(_choose, block, layer.groups, count)) for block in heads.blocks}
    theirs = {entry.name for block in heads.blocks for entry in block.entries}
    others = [entry for entry in heads.entries if entry.name not in theirs]
    outputs += _copied(others)
    same = len(outputs)
    for block in heads.blocks:
        outputs += _cut(block, count, chosen[block.path])
    return Settled(
        "prune",
        tuple(outputs),
        copied=_names(others),
        rewritten=tuple(output.name for output in outputs[same:]),
        kept=lambda: {path: choose() for path, choose in chosen.items()},
    )


def _cut(block: Block, count: int, kept: Callable[[], list[int]]) -> Iterator[Output]:
    """The tensors of a block with ``count`` of its experts, renumbered from 0."""
    for pieces in block.single.values():
        like = pieces[0]
        for slot in range(count):
            name = renumbered(like.name, slot)
            yield Output(name, like.dtype, like.shape, like.nbytes, partial(_piece, pieces, kept, slot))
    for entry in block.fused:
        row = entry.nbytes // block.experts
        yield Output(
            entry.name, entry.dtype, (count, *entry.shape[1:]), count * row, partial(_rows_of, entry, kept, row)
        )
    for entry, axis in block.rows:
        shape = (*entry.shape[:axis], count, *entry.shape[axis + 1 :])
        yield tensor_output(entry.name, entry.dtype, shape, partial(_selected, entry, axis, kept))


def _piece(pieces: tuple[Held, ...], kept: Callable[[], list[int]], slot: int) -> Iterator[memoryview]:
    return raw_chunks(pieces[kept()[slot]])


def _rows_of(entry: Held, kept: Callable[[], list[int]], row: int) -> Iterator[memoryview]:
    for expert in kept():
        yield from raw_chunks(entry, expert * row, row)


def _selected(entry: Held, axis: int, kept: Callable[[], list[int]]) -> Tensor:
    return read_tensor(entry).index_select(axis, torch.tensor(kept()))


def _choose(block: Block, groups: int, count: int) -> list[int]:
    """The experts of lowest ``mean |w| / rms(w)``, equally many of each group; ties go to the lowest index."""
    score_E = torch.stack([flatness(list(_matrices(block, expert))) for expert in range(block.experts)])
    order_gE = score_E.view(groups, -1).argsort(dim=1, stable=True)[:, : count // groups]
    offset_g1 = torch.arange(groups)[:, None] * (block.experts // groups)
    return sorted((order_gE + offset_g1).flatten().tolist())


def _matrices(block: Block, expert: int) -> Iterator[Tensor]:
    """The weight matrices of one expert; biases do not count."""
    for pieces in block.single.values():
        if len(pieces[expert].shape) > 1:
            yield read_tensor(pieces[expert])
    for entry in block.fused:
        if len(entry.shape) > 2:
            row = entry.nbytes // block.experts
            data = bytearray(b"".join(raw_chunks(entry, expert * row, row)))
            yield torch.frombuffer(data, dtype=torch_dtype(entry)).view(entry.shape[1:])


def _copied(entries: Sequence[Held]) -> Iterator[Output]:
    return (output for entry in entries for output in copies(entry))


def _names(entries: Sequence[Held]) -> tuple[str, ...]:
    """As they are on disk."""
    return tuple(part.name for entry in entries for part in parts_of(entry))
