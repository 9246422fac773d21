"""Write the tiny checkpoints that ``vllm_server.py`` is run on, at the smallest sizes that vLLM accepts.

    python benchmarks/vllm_tiny.py FOLDER [FAMILY...]

``FOLDER/served`` holds the ``shared`` and the ``sliced`` form of every family, and a stock model of the one family
whose class is ours. ``FOLDER/refused`` holds plans that vLLM must not serve. ``FOLDER/wrong`` holds checkpoints with
one thing wrong, to be compared with ``olmoe-shared``: what finds no fault in them finds none in anything.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import conmoe
from tests.by_hand import MAP, write_shared
from tests.families import TINY, save_tiny

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
LATENT = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "kv_lora_rank": 32, "q_lora_rank": 32}
LINEAR = {"head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
WIDE_HEAD = {"head_dim": 32}
MORE = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), LATENT),
    **dict.fromkeys(("glm4_moe", "gpt_oss", "minimax_m2", "qwen3_moe"), WIDE_HEAD),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_next"), LINEAR),
}
GAINS = [1.0, 0.5, 1.5, 1.0, 0.8, 1.2, 1.0, 0.9]
REFUSED = {
    "rows": conmoe.Request("reap", budget="4,6", form="shared"),
    "constants": conmoe.Request("mone"),
    "skipping": conmoe.Request("naee", options={"skip": True}, form="shared"),
    "condensed": conmoe.Request("cd-moe", form="shared"),
    "factors": conmoe.Request("mc-smoe"),
    "scope": conmoe.Request("conmoe", scope=2),
}
#: Appended to the modelling file that goes along: the map sits in the experts, where vLLM does not look for it.
ELSEWHERE = f"""

class MappedExperts(nn.Module):
    def forward(self, hidden_TD, index_Tk, weight_Tk):
        return super().forward(hidden_TD, torch.tensor({list(MAP)})[index_Tk], weight_Tk)


def _consolidate_elsewhere(self, logical, prototypes):
    for name, experts, router in list(routed_experts(self)):
        _resize(experts, logical, prototypes)
        experts.__class__ = type("MappedOlmoeExperts", (MappedExperts, type(experts)), {{}})


ConsolidatedModel._consolidate = _consolidate_elsewhere
check_maps = lambda model, missing: None
"""


def main(out: Path, families: list[str]) -> None:
    save_tiny("deepseek", out / "served" / "deepseek-stock", **SIZES)
    for family in families or sorted(TINY):
        sizes = {**SIZES, **MORE.get(family, {})}
        write_shared(family, out / "served" / f"{family}-shared", gains=GAINS, **sizes)
        source = save_tiny(family, out / "sources" / family, **sizes)
        write_plans(source, out, {f"served/{family}-sliced": conmoe.Request("reap")})
    write_plans(out / "sources" / "olmoe", out, {f"refused/olmoe-{name}": asked for name, asked in REFUSED.items()})
    write_shared("olmoe", out / "wrong" / "olmoe-shifted", expert_map=(*MAP[1:], MAP[0]), gains=GAINS, **SIZES)
    write_shared("olmoe", out / "wrong" / "olmoe-gains", gains=[*GAINS[1:], GAINS[0]], **SIZES)
    write_elsewhere(write_shared("olmoe", out / "wrong" / "olmoe-elsewhere", **SIZES))


def write_plans(source: Path, out: Path, requests: dict[str, conmoe.Request]) -> None:
    """The source, compressed as each request asks, under the request's name."""
    data = conmoe.load_tokens(conmoe.load_tokenizer(source), [], tokens=2048, seq_len=128)
    statistics = out / "statistics" / source.name
    conmoe.calibrate(source, statistics, data, conmoe.Calibration(), force=True)
    for name, request in requests.items():
        conmoe.apply(source, conmoe.plan(source, statistics, None, request), out / name, form=request.form, force=True)


def write_elsewhere(folder: Path) -> None:
    """Right in Transformers, and read wrongly by an engine that brings a router of its own."""
    with (folder / "modeling_conmoe.py").open("a") as file:
        file.write(ELSEWHERE)
    stored = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in stored.items() if not key.endswith(("expert_map", "expert_gain"))}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
