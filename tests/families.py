"""Tiny real models of every family, with random weights that route and answer differently for every token.

``TINY[family](**overrides)`` gives a config, :func:`tiny_model` a model, :func:`save_tiny` a whole checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB, EXPERTS, TOP_K = 256, 8, 2
PAD, EOS = 254, 255

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_DENSE_FIRST: dict[str, Any] = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
_FINE = {"moe_intermediate_size": 16, "intermediate_size": 48}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 24}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_GROUPS = {"n_group": 2, "topk_group": 1}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
}


def _stock(config_class: str, **family: Any) -> Callable[..., PretrainedConfig]:
    def build(**overrides: Any) -> PretrainedConfig:
        config: PretrainedConfig = getattr(transformers, config_class)(**{**_COMMON, **family, **overrides})
        return config

    return build


def _deepseek(**overrides: Any) -> PretrainedConfig:
    from conmoe.runtime import register_family
    from conmoe.runtime.modeling_deepseek import DeepseekConfig

    register_family("deepseek")
    family = {"n_routed_experts": EXPERTS, "n_shared_experts": 2, "num_key_value_heads": 4}
    return DeepseekConfig(**{**_COMMON, **_DENSE_FIRST, **_FINE, **family, **overrides})


TINY: dict[str, Callable[..., PretrainedConfig]] = {
    "olmoe": _stock("OlmoeConfig", num_experts=EXPERTS, intermediate_size=16),
    "qwen2_moe": _stock("Qwen2MoeConfig", num_experts=EXPERTS, **_FINE, **_SHARED_EXPERT),
    "qwen3_moe": _stock("Qwen3MoeConfig", num_experts=EXPERTS, head_dim=8, norm_topk_prob=True, **_FINE),
    "qwen3_next": _stock("Qwen3NextConfig", num_experts=EXPERTS, **_FINE, **_SHARED_EXPERT, **_LINEAR),
    "qwen3_5_moe_text": _stock(
        "Qwen3_5MoeTextConfig", num_experts=EXPERTS, moe_intermediate_size=16, **_SHARED_EXPERT, **_LINEAR
    ),
    "mixtral": _stock("MixtralConfig", num_local_experts=EXPERTS, intermediate_size=16),
    "phimoe": _stock("PhimoeConfig", num_local_experts=EXPERTS, intermediate_size=16, attention_bias=True),
    "deepseek_v2": _stock(
        "DeepseekV2Config",
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        topk_method="group_limited_greedy",
        **{**_DENSE_FIRST, **_FINE, **_LATENT, **_GROUPS},
    ),
    "deepseek_v3": _stock(
        "DeepseekV3Config",
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        **{**_DENSE_FIRST, **_FINE, **_LATENT, **_GROUPS},
    ),
    "glm4_moe": _stock(
        "Glm4MoeConfig", n_routed_experts=EXPERTS, head_dim=8, use_qk_norm=True, **{**_DENSE_FIRST, **_FINE, **_GROUPS}
    ),
    "ernie4_5_moe": _stock(
        "Ernie4_5_MoeConfig",
        moe_num_experts=EXPERTS,
        moe_k=TOP_K,
        num_hidden_layers=3,
        moe_layer_start_index=1,
        **_FINE,
    ),
    "gpt_oss": _stock(
        "GptOssConfig",
        num_local_experts=EXPERTS,
        intermediate_size=16,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=131072,  # its default rotary scaling presumes this
    ),
    "granitemoe": _stock("GraniteMoeConfig", num_local_experts=EXPERTS, intermediate_size=16),
    "minimax_m2": _stock("MiniMaxM2Config", num_local_experts=EXPERTS, intermediate_size=16, head_dim=8),
    "deepseek": _deepseek,
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """An eval-mode model of ``family`` with seeded, well spread weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(TINY[family](**overrides))
    spread_weights(model, seed)
    # Rotary frequencies are buffers: casting only the parameters leaves them as a reload would compute them.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


@torch.no_grad()
def spread_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw weights of order one, so that tokens differ in routing, experts in output and biases in effect."""
    generator = torch.Generator().manual_seed(seed)
    routers = tuple(
        name
        for name, _ in model.named_parameters()
        if name.endswith(("gate.weight", "router.weight", "router.layer.weight"))
    )
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2:
            tensor.add_(0.1 * noise)
        else:
            tensor.copy_((0.6 if name in routers else 0.2) * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; the two bytes that no UTF-8 text contains give their places to padding and end of text."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\u00fe", "\u00ff"})
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<|pad|>": PAD, "<|end|>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def save_tiny(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write :func:`tiny_model` and :func:`tiny_tokenizer` to ``folder`` as a published checkpoint would be."""
    tiny_model(family, seed, dtype, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_loud_head(source: Path, folder: Path, factor: float) -> Path:
    """A copy of a checkpoint whose logits are ``factor`` times as far apart."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": factor * tensors["lm_head.weight"]}, file, metadata={"format": "pt"})
    return folder
