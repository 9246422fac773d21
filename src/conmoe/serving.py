"""Which expert counts the engines take: a table of rules, read from their sources, and a pure function over it.

An engine builds its kernels and splits its work for certain numbers of experts, and a compressed model may have
another. Whether one takes what `--keep` would leave is asked before any work:

    conmoe inspect MODEL --keep 0.5 --serve vllm --tp 2 --ep 4
    conmoe compress MODEL OUT --keep 0.5 --serve vllm --tp 2 --ep 4

A count that the engine refuses ends both with exit code 2 and a sentence that names the nearest counts it takes;
`inspect --json` has all findings. Without `--keep`, `inspect` asks about the checkpoint itself. The form is sliced
unless `--form shared` is given; `compress` knows the form, the budget and the layers that its result will have.

A rule **refuses** where the engine stops, or computes something else without a word. It **warns** of a slower kernel,
and of what nobody tried. Nothing is refused on a suspicion: what was not read in the engine's source, or run, is a
warning that says so. `--tp` and `--ep` are tensor- and expert-parallel ranks as the engine counts them: vLLM spreads
experts over all tensor- and data-parallel ranks, so `--tp 2 --ep 4` is `--tensor-parallel-size 2 --data-parallel-size
2 --enable-expert-parallel`; SGLang's expert-parallel ranks are a part of its tensor-parallel ones.

What was done: the Python sources of the named vLLM, SGLang, MLX and Transformers releases were read, and for CUDA
kernels and llama.cpp files of their public repositories, which are not of one release. Only Transformers was run
against these rules (in the tests), and vLLM on a CPU with results in the shared form ([serving.md](serving.md)). No
rule was tried on a GPU or on several ranks. Other releases may differ in either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["refuse", "warn"]

VERSIONS = {
    "vllm": "0.32.0",
    "sglang": "0.5.23",
    "llama.cpp": "main, 2026",
    "mlx": "mlx-lm 0.32.2",
    "transformers": "5.23",
}

#: Expert counts for which vLLM compiles its fused routers on CUDA.
COMPILED = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)

#: Families whose class in an engine wants no more tensor-parallel ranks than experts, even with expert parallelism.
RANK_BOUND = {
    "vllm": (
        "cohere2_moe",
        "ernie4_5_moe",
        "exaone_moe",
        "hy_v3",
        "hy_v4",
        "laguna",
        "lfm2_moe",
        "mimo_v2_flash",
        "minimax_m2",
        "qwen2_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
    ),
    "sglang": (
        "cohere2_moe",
        "deepseek",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "glm4_moe_lite",
        "minimax_m2",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
    ),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules need to know of a source model."""

    family: str
    experts: int  # E
    top_k: int
    groups: int = 1  # router groups
    groups_used: int = 1  # of which a token chooses from so many
    intermediate: int = 0  # I of one routed expert, 0: unknown
    heads: int = 0  # attention heads, 0: unknown
    scoring: str = ""  # the router's scoring function, where the configuration names it
    block: int = 0  # side of the blocks that share a scale in a quantised checkpoint


@dataclass(frozen=True, slots=True)
class Case:
    """A result, and how it is to be served."""

    facts: Facts
    counts: tuple[int, ...]  # experts stored by the layers; one number where all store as many
    form: str = "sliced"
    tp: int = 1
    ep: int = 1
    departs: bool = False  # shared, and more than maps: rows dropped, constants, factors, static gates, skipping
    scope: int = 1  # neighbouring layers that share one pool
    uneven: bool = False  # a budget decides later how many experts each layer keeps

    @property
    def K(self) -> int:
        """The expert count that the configuration states."""
        return max(self.counts)

    @property
    def routed(self) -> bool:
        """Whether the engine's own router chooses among the stored experts; with a map, the model's router does."""
        return self.form != "shared"

    @property
    def sharded(self) -> int:
        """Ranks over which the width of one expert is split."""
        return self.tp if self.ep == 1 else max(1, self.tp // self.ep)


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that an engine does not take; ``broken`` says of which cases, ``sentence`` is filled in from them."""

    engine: str
    name: str
    level: Level
    concerns: str
    broken: Callable[[Case], bool]
    sentence: str
    source: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that a case breaks."""

    engine: str
    version: str
    rule: str
    level: Level
    sentence: str
    source: str


@dataclass(frozen=True, slots=True)
class Nearest:
    """The accepted counts next to one that is not, None where there is none."""

    below: int | None
    above: int | None


def _ungroupable(case: Case) -> bool:
    groups = case.facts.groups
    return case.routed and groups > 1 and (case.K % groups != 0 or case.K // groups < 2)


def _unreachable(case: Case) -> bool:
    facts = case.facts
    reach = facts.groups_used * (case.K // facts.groups) if facts.groups > 1 else case.K
    return case.routed and facts.top_k > reach


def _ragged(case: Case) -> bool:
    return len(set(case.counts)) > 1


def _power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


_TOO_FEW = "a token goes to {k} experts, and the router could reach only {reach} of {K}"
_GROUPS = "the router's {groups} groups must hold equally many experts, two at least, which {K} do not"

RULES: tuple[Rule, ...] = (
    # --- vLLM ---
    Rule("vllm", "too few", "refuse", "all, sliced", _unreachable, _TOO_FEW,
         "csrc/libtorch_stable/moe/grouped_topk_kernels.cu (topk <= topk_group * experts per group), torch.topk"),
    Rule("vllm", "groups", "refuse", "routers with groups, sliced", _ungroupable,
         _GROUPS + ", so it would route without groups and without a word",
         "fused_moe/router/grouped_topk_router.py (valid_grouping)"),
    Rule("vllm", "compiled counts", "refuse", "routers that score by sqrt(softplus): DeepSeek-V4, sliced",
         lambda c: c.routed and c.facts.scoring == "sqrtsoftplus" and c.K not in COMPILED,
         "its fused router for this scoring is compiled on CUDA for " + ", ".join(map(str, COMPILED))
         + " experts alone, and has no other way",
         "csrc/libtorch_stable/moe/topk_softplus_sqrt_kernels.cu; vllm issue 51521, pull request 50982"),
    Rule("vllm", "general kernel", "warn", "softmax and sigmoid routers without groups, sliced",
         lambda c: c.routed and c.facts.groups == 1 and c.facts.scoring != "sqrtsoftplus" and c.K not in COMPILED,
         "{K} experts are routed on CUDA by the general kernels (score, then top-k) and not by the fused one, which is "
         "compiled for " + ", ".join(map(str, COMPILED)) + "; the choice is the same, the speed was not measured",
         "csrc/libtorch_stable/moe/topk_softmax_kernels.cu (topkGatingKernelLauncher, default)"),
    Rule("vllm", "more ranks than experts", "refuse", ", ".join(RANK_BOUND["vllm"]) + "; sliced",
         lambda c: c.routed and c.facts.family in RANK_BOUND["vllm"] and c.tp > c.K,
         "it wants no more tensor-parallel ranks than experts, and there would be {tp} ranks and {K} experts",
         "model_executor/models/qwen3_moe.py and others (\"Tensor parallel size ... is greater than\")"),
    Rule("vllm", "expert width", "refuse", "all, without expert parallelism",
         lambda c: c.ep == 1 and c.facts.intermediate > 0 and c.facts.intermediate % c.tp != 0,
         "tensor parallelism splits every expert, and its {I} units do not split into {tp} (--ep "
         "spreads whole experts)",
         "fused_moe/config.py (FusedMoEConfig.__post_init__)"),
    Rule("vllm", "heads", "refuse", "all", lambda c: c.facts.heads > 0 and c.facts.heads % c.tp != 0,
         "the {heads} attention heads do not split over {tp} ranks, whatever the experts",
         "config/model.py (verify_with_parallel_config)"),
    Rule("vllm", "expert-parallel size", "refuse", "all, with expert parallelism",
         lambda c: c.ep > 1 and c.ep % c.tp != 0,
         "it spreads experts over all tensor- and data-parallel ranks, so --ep is a multiple of --tp, which {ep} is "
         "not of {tp}",
         "fused_moe/config.py (FusedMoEParallelConfig.make)"),
    Rule("vllm", "gpt-oss remainder", "refuse", "gpt_oss, with expert parallelism",
         lambda c: c.routed and c.facts.family == "gpt_oss" and c.ep > 1 and c.K % c.ep != 0,
         "its loader for gpt-oss cuts {K} experts into {ep} equal parts and loses the remainder",
         "model_executor/models/gpt_oss.py (experts_per_rank)"),
    Rule("vllm", "unequal ranks", "warn", "all, with expert parallelism",
         lambda c: c.ep > 1 and c.K % c.ep != 0,
         "{K} experts over {ep} ranks leave some with one more: the plain path takes that; --enable-eplb, the DeepEP "
         "and NIXL back ends and DeepSeek-V4's MegaMoE want a multiple of {ep}",
         "fused_moe/expert_map_manager.py, layer.py (EPLB), all2all_utils.py; vllm issue 52435"),
    Rule("vllm", "empty ranks", "warn", "all, with expert parallelism", lambda c: c.ep > c.K,
         "{ep} ranks for {K} experts leave some without any, which nobody tried",
         "fused_moe/expert_map_manager.py (determine_expert_map)"),
    Rule("vllm", "scale blocks", "warn", "FP8 checkpoints with block scales, without expert parallelism",
         lambda c: c.ep == 1 and c.facts.block > 0 and c.facts.intermediate % (c.tp * c.facts.block) != 0,
         "{I} units over {tp} ranks are no whole number of blocks of {block}: it divides the blocks further or pads "
         "where the kernel can, and stops where it cannot",
         "fused_moe/oracle/fp8.py (resolve_fp8_moe_weight_block_shape), quantization/utils/fp8_utils.py"),
    Rule("vllm", "TensorRT-LLM kernels", "warn", "FP8 checkpoints with block scales, sliced",
         lambda c: c.routed and c.facts.block > 0 and (c.K % 4 != 0 or c.K > 512),
         "the FlashInfer TensorRT-LLM kernels for block scales, which it may choose on Blackwell, want a multiple of 4 "
         "experts and 512 at most",
         "fused_moe/experts/trtllm_fp8_moe.py"),
    Rule("vllm", "more than a map", "refuse", "shared, where routers lost rows, or constants, factors, static gates or "
         "skipping replace experts",
         lambda c: c.form == "shared" and c.departs,
         "in the shared form it runs maps alone, and this result has more (one number of experts in the sliced form "
         "has not)",
         "conmoe's own classes refuse to be built there (runtime/modeling_conmoe.py)"),
    Rule("vllm", "pools", "refuse", "shared, --scope above 1", lambda c: c.form == "shared" and c.scope > 1,
         "layers that share a pool of experts would be read wrongly there",
         "conmoe's own classes refuse to be built there (runtime/modeling_conmoe.py)"),
    Rule("vllm", "Phi-MoE", "warn", "phimoe, sliced",
         lambda c: c.form == "sliced" and c.facts.family == "phimoe",
         "it runs this family under the published name of its class, PhiMoEForCausalLM, and stops at the first request "
         "under that of Transformers, PhimoeForCausalLM, which a model saved anew has in its config.json",
         "run: docs/serving.md"),
    Rule("vllm", "latent attention", "warn", "deepseek_v2, deepseek_v3, shared",
         lambda c: c.form == "shared" and c.facts.family in ("deepseek_v2", "deepseek_v3"),
         "a tiny model of this family needed VLLM_MLA_DISABLE=1; a published one was not tried",
         "run: docs/serving.md"),
    Rule("vllm", "parallel maps", "warn", "shared, more than one rank",
         lambda c: c.form == "shared" and c.tp * c.ep > 1,
         "a result with maps was never run on more than one rank", "run: docs/serving.md"),
    # --- SGLang ---
    Rule("sglang", "too few", "refuse", "all, sliced", _unreachable, _TOO_FEW, "srt/layers/moe/topk.py (torch.topk)"),
    Rule("sglang", "groups", "refuse", "routers with groups, sliced", _ungroupable, _GROUPS,
         "srt/layers/moe/topk.py (grouped_topk, biased_grouped_topk: view(tokens, groups, -1), top 2 of each group)"),
    Rule("sglang", "expert-parallel size", "refuse", "all, with expert parallelism",
         lambda c: c.ep > c.tp,
         "its expert-parallel ranks are a part of the tensor-parallel ones, and {ep} are more than {tp}",
         "srt/runtime_context.py (derive_parallel_widths: moe_tp_size = tp_size // ep_size)"),
    Rule("sglang", "expert-parallel remainder", "warn", "all, with expert parallelism",
         lambda c: c.tp > c.ep > 1 and c.tp % c.ep != 0,
         "{ep} expert-parallel ranks do not divide {tp} tensor-parallel ones; what it makes of the rest was not read",
         "srt/runtime_context.py (derive_parallel_widths)"),
    Rule("sglang", "unequal ranks", "refuse", "all, with expert parallelism",
         lambda c: c.ep > 1 and c.K % c.ep != 0,
         "every expert-parallel rank holds equally many experts, and {ep} does not divide {K}",
         "srt/layers/moe/fused_moe_triton/layer.py (_num_global_routed % storage_ep_size)"),
    Rule("sglang", "more ranks than experts", "refuse", ", ".join(RANK_BOUND["sglang"]) + "; sliced",
         lambda c: c.routed and c.facts.family in RANK_BOUND["sglang"] and c.tp > c.K,
         "it wants no more tensor-parallel ranks than experts, and there would be {tp} ranks and {K} experts",
         "srt/models/deepseek_v2.py and others (\"Tensor parallel size ... is greater than\")"),
    Rule("sglang", "expert width", "refuse", "all",
         lambda c: c.facts.intermediate > 0 and c.facts.intermediate % c.sharded != 0,
         "each expert's {I} units do not split into {sharded}",
         "srt/layers/moe/fused_moe_triton/layer.py (intermediate_size % moe_tp_size)"),
    Rule("sglang", "scale blocks", "refuse", "FP8 checkpoints with block scales",
         lambda c: c.facts.block > 0 and c.facts.intermediate % (c.sharded * c.facts.block) != 0,
         "{I} units over {sharded} ranks are no whole number of scale blocks of {block}",
         "srt/layers/quantization/fp8.py"),
    Rule("sglang", "power of two", "warn", "routers with groups, sliced",
         lambda c: c.routed and c.facts.groups > 1 and not _power_of_two(c.K),
         "{K} is no power of two, so its general grouped router takes the place of the fused one; AMD's AITER before "
         "pull requests 2359 and 2604 stops at long prompts",
         "srt/layers/moe/topk.py (is_power_of_two); ROCm/aiter pull requests 2359, 2604"),
    Rule("sglang", "maps", "warn", "shared", lambda c: c.form == "shared",
         "results with maps were not run there; its Transformers backend was read, and should take them",
         "srt/models/transformers.py, read"),
    Rule("sglang", "more than a map", "warn", "shared, where there is more than a map, or layers share pools or differ",
         lambda c: c.form == "shared" and (c.departs or c.scope > 1 or _ragged(c)),
         "its fused experts read one number of experts for all layers, so this result may be read wrongly there",
         "srt/models/transformers.py, read"),
    # --- llama.cpp ---
    Rule("llama.cpp", "maps", "refuse", "shared", lambda c: c.form == "shared",
         "its converter knows no model with a map (the sliced form has none)",
         "convert_hf_to_gguf.py (one class for each architecture), not run"),
    Rule("llama.cpp", "too few", "refuse", "all", _unreachable, _TOO_FEW,
         "src/llama-model.cpp (n_expert_used <= n_expert)"),
    Rule("llama.cpp", "groups", "refuse", "routers with groups", _ungroupable, _GROUPS,
         "src/llama-model.cpp (n_expert_groups < n_expert, n_expert % n_expert_groups == 0)"),
    Rule("llama.cpp", "most experts", "warn", "all", lambda c: c.K > 512,
         "releases stop above LLAMA_MAX_EXPERTS, which was 512 in the one read; later ones may allow more",
         "src/llama-hparams.h"),
    Rule("llama.cpp", "fused top-k", "warn", "all",
         lambda c: c.form != "shared" and not (_power_of_two(c.K) and c.K <= 512) and c.K != 576,
         "on CUDA {K} experts are routed by single operations and not by the fused one, which takes powers of two up "
         "to 512, and 576; the choice is the same, the speed was not measured",
         "ggml/src/ggml-cuda/topk-moe.cu (ggml_cuda_should_use_topk_moe)"),
    Rule("llama.cpp", "parallelism", "warn", "all", lambda c: c.tp > 1 or c.ep > 1,
         "it has no --tp and --ep of this kind; they were left out of account", "not read"),
    # --- MLX ---
    Rule("mlx", "maps", "refuse", "shared", lambda c: c.form == "shared",
         "it has no class for a model with a map (the sliced form has none)",
         "mlx_lm/utils.py (Model type not supported)"),
    Rule("mlx", "too few", "refuse", "all", _unreachable, _TOO_FEW, "mlx_lm/models/*.py (argpartition)"),
    Rule("mlx", "groups", "refuse", "routers with groups", _ungroupable, _GROUPS,
         "mlx_lm/models/deepseek_v3.py, glm4_moe.py (group_expert_select: unflatten)"),
    Rule("mlx", "parallelism", "warn", "all", lambda c: c.tp > 1 or c.ep > 1,
         "tensor and expert parallelism were not looked at there", "not read"),
    # --- Transformers ---
    Rule("transformers", "too few", "refuse", "all, sliced", _unreachable, _TOO_FEW, "torch.topk in every router"),
    Rule("transformers", "groups", "refuse", "routers with groups, sliced", _ungroupable, _GROUPS,
         "models/deepseek_v3/modeling_deepseek_v3.py (view(-1, groups, experts per group), top 2 of each group)"),
    Rule("transformers", "parallelism", "warn", "all", lambda c: c.tp > 1 or c.ep > 1,
         "tensor and expert parallelism (tp_plan) were not looked at there", "not read"),
    # --- all of them ---
    *(
        Rule(engine, "budget", "warn", "shared, budgets that let layers differ", lambda c: c.uneven,
             "the budget may let layers keep different numbers of experts, which is known only when it has decided; "
             "--budget uniform keeps one number",
             "conmoe's own budgets")
        for engine in ("vllm", "sglang")
    ),
)  # fmt: skip


def preflight(
    facts: Facts, count: int, engine: str, tp: int = 1, ep: int = 1, form: str = "sliced"
) -> tuple[Finding, ...]:
    """What ``engine`` would say of a result in which every layer stores ``count`` experts.

    Args:
        facts: the source model.
        count: experts stored by each layer, ``K``.
        engine: a key of ``VERSIONS``.
        tp: tensor-parallel ranks.
        ep: expert-parallel ranks; 1: whole experts are not spread.
        form: of the result.
    """
    return examine(Case(facts, (count,), form, tp, ep), engine)


def examine(case: Case, engine: str) -> tuple[Finding, ...]:
    """Like :func:`preflight`, of any case."""
    facts, groups = case.facts, case.facts.groups
    filled = {
        "K": case.K, "E": facts.experts, "k": facts.top_k, "tp": case.tp, "ep": case.ep, "groups": groups,
        "I": facts.intermediate, "heads": facts.heads, "block": facts.block, "sharded": case.sharded,
        "reach": facts.groups_used * (case.K // groups) if groups > 1 else case.K,
    }  # fmt: skip
    return tuple(
        Finding(engine, VERSIONS[engine], rule.name, rule.level, rule.sentence.format(**filled), rule.source)
        for rule in RULES
        if rule.engine == engine and rule.broken(case)
    )


def accepted(case: Case, engine: str) -> bool:
    """Whether no rule of ``engine`` refuses ``case``."""
    return not any(finding.level == "refuse" for finding in examine(case, engine))


def nearest(case: Case, engine: str) -> Nearest:
    """The counts next to that of ``case``, for all layers alike, that ``engine`` takes."""

    def taken(counts: range) -> Iterator[int]:
        return (count for count in counts if accepted(replace(case, counts=(count,)), engine))

    below = next(taken(range(case.K - 1, 0, -1)), None)
    return Nearest(below, next(taken(range(case.K + 1, case.facts.experts + 1)), None))
