"""Does vLLM draft with a head that conmoe pruned, and does it stop at one that was left as it was?

python benchmarks/vllm_mtp.py write FOLDER     with conmoe: four tiny GLM-4.5 checkpoints
python benchmarks/vllm_mtp.py run FOLDER       with vLLM (CPU build): decodes with each of them, with and without head
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
PROMPTS = ([1, 2, 3, 4, 5], [9, 8, 7])
NAMES = ("source", "prune", "drop", "unpruned")


def write(out: Path) -> None:
    """The source, its result with the head pruned and dropped, and with the source's head left beside fewer experts."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    import conmoe
    from conmoe.ops.plans import prune
    from tests.heads import with_head
    from tests.results import hand_made

    folder, head = with_head("glm4_moe", out / "source", n_group=1, topk_group=1, **SIZES)
    plan = hand_made(folder, {(layer,): prune(torch.arange(0, 8, 2), 8) for layer in (1, 2)})
    conmoe.apply(folder, plan, out / "prune", form="sliced", mtp="prune")
    conmoe.apply(folder, plan, out / "drop", form="sliced", mtp="drop")
    shutil.copytree(out / "prune", out / "unpruned")
    (file,) = (out / "unpruned").glob("*.safetensors")
    rest = {name: value for name, value in load_file(file).items() if not name.startswith("model.layers.3.")}
    save_file({**rest, **head}, file, {"format": "pt"})


def run_one(folder: Path, drafting: bool) -> None:
    from vllm import LLM, SamplingParams

    speculative = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}} if drafting else {}
    settings = {"enforce_eager": True, "dtype": "float32", "max_model_len": 64, "disable_log_stats": False}
    engine = LLM(str(folder), **settings, **speculative)
    sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling)
    counted = {m.name: m.value for m in engine.get_metrics() if m.name.startswith("vllm:spec") and hasattr(m, "value")}
    print("RESULT", json.dumps({"tokens": [list(each.outputs[0].token_ids) for each in outputs], **counted}))


def run(out: Path) -> None:
    """Each in a process of its own, for one that cannot be loaded ends it."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    for name in NAMES:
        for drafting in ("plain", "draft"):
            command = [sys.executable, __file__, "one", str(out / name), drafting]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
            lines = (done.stdout + done.stderr).splitlines()
            found = [line for line in lines if line.startswith("RESULT")] or [line for line in lines if "Error" in line]
            print(f"{name:<9} {drafting:<6} {found[-1] if found else 'stopped without an error'}", flush=True)


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        write(folder)
    elif what == "run":
        run(folder)
    else:
        run_one(folder, sys.argv[3] == "draft")
