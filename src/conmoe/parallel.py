"""Several processes that share the tokens: started by ``torchrun``, they add their sums; alone, nothing happens."""

from __future__ import annotations

import atexit
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from conmoe.types import TokenSample, UsageError, sample_tensors


def refuse_several(verb: str) -> None:
    """Raise if ``torchrun`` started several processes for something that is written by one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"conmoe {verb} runs in one process; only calibrate and evaluate run under torchrun.")


def local_rank() -> int:
    """Which process of this machine this is, and so which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    size: int

    @staticmethod
    def join() -> Ranks:
        """Join the group that ``torchrun`` describes in the environment, or stay alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks(0, 1)
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank())
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(dist.destroy_process_group)
        return Ranks(dist.get_rank(), dist.get_world_size())

    def share(self, items: int) -> range:
        """The consecutive part of ``items`` that falls to this process."""
        if items < self.size:
            raise UsageError(f"{self.size} processes cannot share {items} sequences; start fewer, or use more tokens.")
        return range(items * self.rank // self.size, items * (self.rank + 1) // self.size)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def reduce(self, value: Tensor, how: Literal["sum", "max"]) -> Tensor:
        """The sum (or maximum) over all processes."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return value

    def minimum(self, value: int) -> int:
        return -int(self.reduce(torch.tensor(-value), "max"))

    def gather(self, sample: TokenSample) -> list[TokenSample]:
        """The samples of all processes, on the first one; the others get an empty list."""
        named = sample_tensors(sample)
        columns = [self.gather_rows(value) for value in named.values()]
        return [TokenSample(**dict(zip(named, tensors, strict=True))) for tensors in zip(*columns, strict=True)]

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """A tensor's rows from all processes, on the first one; the others get an empty list."""
        if self.size == 1:
            return [rows]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(rows)]))
        raw = rows.contiguous().view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
        padded = torch.zeros(max(map(int, lengths)), raw.shape[1], dtype=torch.uint8)
        padded[: len(raw)] = raw
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, parts)
        shape = (-1, *rows.shape[1:])
        return [part[: int(n)].view(rows.dtype).view(shape) for part, n in zip(parts or [], lengths, strict=False)]
