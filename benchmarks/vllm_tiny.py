"""Write the tiny checkpoints that ``vllm_check.py`` is run on, at the smallest sizes that vLLM accepts.

python benchmarks/vllm_tiny.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conmoe  # noqa: F401  (teaches the Auto classes our types)
from tests.by_hand import write_shared
from tests.families import save_tiny

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
LATENT = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "kv_lora_rank": 32, "q_lora_rank": 32}
MORE = {"qwen3_moe": {"head_dim": 32}, "deepseek_v3": LATENT}
GAINS = [1.0, 0.5, 1.5, 1.0, 0.8, 1.2, 1.0, 0.9]

if __name__ == "__main__":
    out = Path(sys.argv[1])
    save_tiny("deepseek", out / "deepseek-stock", **SIZES)
    save_tiny("olmoe", out / "olmoe-stock", **SIZES)
    for family in ("olmoe", "qwen3_moe", "mixtral", "deepseek", "deepseek_v3"):
        write_shared(family, out / f"{family}-shared", gains=GAINS, **SIZES, **MORE.get(family, {}))
