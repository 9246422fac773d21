"""What planning and refining one layer costs, beside the arithmetic that it cannot do without.

    python benchmarks/refine_cost.py [--tokens 16384] [--experts 128 256 512] [--device cpu] [--json FILE]

One layer of the shape of Qwen3-30B-A3B (8 of 128 experts for a token, D = 2048, I = 768) with random weights in
bfloat16, of which half the experts are kept: plumbing, never quality. Each row times one part of the work. Its limit
is the multiplications of the part's docstring over the rate at which this machine multiplies matrices of these shapes
and dtypes in the same run; the ratio says how much more than these products the part takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from conmoe.ops import coverage, plans
from conmoe.ops.answers import open_answers
from conmoe.ops.similarity import functional_distance
from conmoe.refine import held_out_tokens
from conmoe.registry import get_refinement
from conmoe.types import Experts, TokenSample

K_SLOTS, D, WIDTH, BATCH = 8, 2048, 768, 4096
#: For how many seconds, at least, a product is repeated to tell its rate.
LEAST = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One part of the work."""

    part: str
    experts: int
    tokens: int
    seconds: float
    limit: float  # seconds of the products alone
    gigabytes: float  # the highest use of memory so far in this process (CPU), or in this part (CUDA)


def swiglu(gate_nI: Tensor, up_nI: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate_nI) * up_nI


def layer(E: int, tokens: int, device: str) -> tuple[TokenSample, Experts]:
    """Experts and a sample, each token routed to experts at random, like a router in balance."""
    generator = torch.Generator().manual_seed(E)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16().to(device)

    gate, up, down = draw(E, WIDTH, D), draw(E, WIDTH, D), draw(E, D, WIDTH)
    x_nD = torch.randn(tokens, D, generator=generator).bfloat16().to(device)
    logits_nE = torch.randn(tokens, E, generator=generator)
    weight_nk, index_nk = logits_nE.softmax(dim=1).topk(K_SLOTS)
    weight_nk = weight_nk / weight_nk.sum(dim=1, keepdim=True)
    priority_n = torch.rand(tokens, generator=generator)
    sample = TokenSample(x_nD, index_nk.int().to(device), weight_nk.to(device), logits_nE.to(device), priority_n)
    return sample, Experts(gate, up, down, swiglu)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rate(dtype: torch.dtype, rows: int, device: str) -> float:
    """Multiplications a second of ``[rows, D] @ [D, I]``."""
    left, right = torch.randn(rows, D).to(device, dtype), torch.randn(D, WIDTH).to(device, dtype)
    left @ right
    began, times = clock(device), 0
    while clock(device) - began < LEAST:
        left @ right
        times += 1
    return times * rows * D * WIDTH / (clock(device) - began)


def gigabytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def timed(device: str, work: Callable[[], object]) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = clock(device)
    work()
    return clock(device) - began


def planning(E: int, tokens: int, device: str, rates: dict[str, float]) -> list[Row]:
    """Distances of all experts, and the choice of half of them."""
    sample, experts = layer(E, tokens, device)
    cost: list[Tensor] = []
    seconds = timed(device, lambda: cost.append(functional_distance(sample, experts)))
    limit = 3 * tokens * E * D * WIDTH / rates["bfloat16"] + tokens * E * K_SLOTS * D / rates["float32"]
    rows = [Row("functional distance", E, tokens, seconds, limit, gigabytes(device))]
    weight_E = torch.rand(E, generator=torch.Generator().manual_seed(0))
    seconds = timed(device, lambda: coverage.cover(cost[0].cpu(), weight_E, E // 2))
    return [*rows, Row("coverage", E, tokens, seconds, float("nan"), gigabytes(device))]


def refining(E: int, tokens: int, steps: int, device: str, rates: dict[str, float]) -> list[Row]:
    """Half the experts answer for two each."""
    sample, experts = layer(E, tokens, device)
    plan = plans.remap(torch.arange(0, E, 2), torch.arange(E) // 2)
    held_n, K = held_out_tokens(sample).to(device), E // 2
    product = tokens * K_SLOTS * D * WIDTH
    found = []
    with torch.no_grad():
        seconds = timed(device, lambda: found.append(open_answers(sample, experts, plan)))
    rows = [Row("answers of both", E, tokens, seconds, 6 * product / rates["float32"], gigabytes(device))]
    refit = get_refinement("refit").function
    # refinements bring the residual up to date in place
    fresh = replace(found[0], residual_nD=found[0].residual_nD.clone())
    with torch.no_grad():
        seconds = timed(device, lambda: refit(fresh, held_n, (), sweeps=1))
    least64 = tokens * K_SLOTS * WIDTH * (WIDTH + D) + 2 * K * D * WIDTH**2 + K * WIDTH**3 / 6
    limit = 3 * product / rates["float32"] + least64 / rates["float64"]
    rows.append(Row("refit, a sweep", E, tokens, seconds, limit, gigabytes(device)))
    # each run ends with a look; both are the same but for the steps between
    reconstruct = get_refinement("reconstruct").function
    batch = min(BATCH, tokens)
    short = timed(device, lambda: one_run(reconstruct, found[0], held_n, 1, batch))
    long = timed(device, lambda: one_run(reconstruct, found[0], held_n, 1 + steps, batch))
    looks = min(10, 1 + steps) - 1
    look = timed(device, lambda: open_answers(sample, experts, plan)) / 2
    seconds = (long - short - looks * look) / steps
    kind = "bfloat16" if device == "cuda" else "float32"
    size = min(batch, int((~held_n).sum()))
    limit = 9 * size * K_SLOTS * D * WIDTH / rates[kind]
    return [*rows, Row("reconstruct, a step", E, size, seconds, limit, gigabytes(device))]


def one_run(reconstruct: Callable[..., object], answers: object, held_n: Tensor, steps: int, batch: int) -> None:
    """A rate so low that what is learned does not matter; the held-out error falls, so that one run is all."""
    reconstruct(answers, held_n, (), steps=steps, batch=batch, rate=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--experts", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--steps", type=int, default=3, help="of reconstruct, beside the first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kinds = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
    # as many rows as a prototype gets tokens; at least so many that weights are not all that is moved
    rows = max(256, 2 * given.tokens * K_SLOTS // given.experts[0])
    rates = {name: rate(dtype, rows, given.device) for name, dtype in kinds.items()}
    found = refining(given.experts[0], given.tokens, given.steps, given.device, rates)
    for E in given.experts:
        found += planning(E, given.tokens, given.device, rates)
    print("rates, 10^9 multiplications a second: " + ", ".join(f"{name} {r / 1e9:.1f}" for name, r in rates.items()))
    print(f"{'part':22}{'experts':>8}{'tokens':>8}{'seconds':>10}{'limit':>10}{'times':>7}{'GB':>7}")
    for row in found:
        ratio = row.seconds / row.limit
        print(
            f"{row.part:22}{row.experts:8}{row.tokens:8}{row.seconds:10.2f}{row.limit:10.2f}{ratio:7.2f}"
            f"{row.gigabytes:7.2f}"
        )
    if given.json:
        machine = {
            "device": given.device,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": given.threads,
            "torch": torch.__version__,
        }
        record = {
            "shape": {"slots": K_SLOTS, "hidden": D, "intermediate": WIDTH, "tokens": given.tokens},
            "machine": machine,
            "multiplications per second": rates,
            "rows": [{name: None if value != value else value for name, value in asdict(row).items()} for row in found],
        }
        given.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
