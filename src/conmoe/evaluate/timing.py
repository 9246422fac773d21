"""One turn of timing one model, run as a process of its own: ``python -m conmoe.evaluate.timing JOB RESULT``.

The peak memory of a process never falls, and libraries keep what they once took: two models measured in one process
would share both.
"""

from __future__ import annotations

import gc
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from conmoe.whole import load_whole


def turn(job: dict[str, Any]) -> dict[str, Any]:
    """Load a model, warm it up, and time it ``repeats`` times: seconds, and bytes of memory."""
    device = job["device"]
    cuda = device.startswith("cuda")
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    before = memory().resident
    dtype = getattr(torch, job["dtype"]) if job["dtype"] else None
    loaded = load_whole(Path(job["model"]), device=device, dtype=dtype, trust_remote_code=job["remote"])
    gc.collect()
    held, allocated = memory(), torch.cuda.memory_allocated(device) if cuda else 0
    ids_BS = torch.tensor(job["ids"], device=device)
    with torch.inference_mode():
        _run(loaded, ids_BS, min(4, job["new"]), device)
        times = [_run(loaded, ids_BS, job["new"], device) for _ in range(job["repeats"])]
    return {
        "prefill_seconds": [prefill for prefill, _ in times],
        "decode_seconds": [decode for _, decode in times],
        "weights": sum(each.numel() * each.element_size() for each in (*loaded.parameters(), *loaded.buffers())),
        "libraries": 0 if cuda else before,
        "mapped": 0 if cuda else held.mapped,
        "resident": allocated if cuda else held.resident,
        "peak": torch.cuda.max_memory_allocated(device) if cuda else memory().peak,
        "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
        "experts": str(getattr(loaded.config, "_experts_implementation", None)),
    }


def _run(loaded: Any, ids_BS: torch.Tensor, new: int, device: str) -> tuple[float, float]:
    """Seconds to read the prompts, and to write ``new`` tokens after them, one at a time."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(loaded.forward).parameters else {}
    begun = _now(device)
    out = loaded(ids_BS, use_cache=True, **last)
    read = _now(device)
    for _ in range(new):
        out = loaded(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True, **last)
    return read - begun, _now(device) - read


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Memory(NamedTuple):
    """Bytes of this process: in memory now, the most there ever were, and pages of files among the first."""

    resident: int
    peak: int
    mapped: int


def memory() -> Memory:
    """What the system tells of this process.

    Linux tells it of this program; ``getrusage`` there also counts the process that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        rows = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        resident, peak, mapped = (int(rows[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssFile"))
        return Memory(resident, max(resident, peak), mapped)  # the kernel updates them at different times
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, where the present use is not told
    return Memory(peak, peak, 0)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(turn(json.loads(Path(sys.argv[1]).read_text()))), encoding="utf-8")
