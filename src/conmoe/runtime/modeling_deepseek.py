"""DeepSeekMoE (arXiv 2401.06066), the family of deepseek-moe-16b, which Transformers itself does not have.

A Llama decoder whose feed-forward layers, but for the first, are fine-grained routed experts (greedy top-k over a
softmax) beside shared experts that every token visits. Experts and router keep to the seams of Transformers 5: fused
expert tensors behind ``experts_implementation``, and a router that returns (logits, weights, indices).

This file is copied next to the weights of consolidated checkpoints, so it needs nothing but torch and transformers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.moe import use_experts_implementation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from transformers.utils.output_capturing import OutputRecorder


class DeepseekConfig(LlamaConfig):
    """The published fields; the defaults are those of deepseek-moe-16b-base."""

    model_type = "deepseek"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    n_shared_experts: int | None = 2
    n_routed_experts: int | None = 64
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.scoring_func != "softmax":
            raise ValueError(f"DeepSeekMoE scores experts by softmax; scoring_func {self.scoring_func!r} is not known.")
        super().__post_init__(**kwargs)

    def is_sparse(self, layer: int) -> bool:
        """Whether a decoder layer has routed experts."""
        routed = self.n_routed_experts is not None and layer >= self.first_k_dense_replace
        return routed and layer % self.moe_layer_freq == 0


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts of a layer as two fused tensors."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.num_experts = config.n_routed_experts
        D, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, D, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        output_TD = torch.zeros_like(hidden_TD)
        for expert in range(self.num_experts):
            token_n, slot_n = torch.where(index_Tk == expert)
            if token_n.numel() == 0:
                continue
            gate_nI, up_nI = F.linear(hidden_TD[token_n], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_nD = F.linear(self.act_fn(gate_nI) * up_nI, self.down_proj[expert])
            output_TD.index_add_(0, token_n, (expert_nD * weight_Tk[token_n, slot_n, None]).to(output_TD.dtype))
        return output_TD


class DeepseekTopkRouter(nn.Module):
    """Greedy top-k of a softmax over all experts; the chosen gates sum to one only if ``norm_topk_prob``."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = F.linear(hidden_TD, self.weight)
        weight_Tk, index_Tk = logits_TE.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalise:
            weight_Tk = weight_Tk / weight_Tk.sum(dim=-1, keepdim=True)
        return logits_TE, weight_Tk.to(logits_TE.dtype), index_Tk


class DeepseekMoE(nn.Module):
    """Routed experts beside shared ones, the latter fused into one wider feed-forward layer."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekTopkRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = _shared_experts(config) if config.n_shared_experts else None

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        _, weight_Tk, index_Tk = self.gate(hidden_TD)
        routed: Tensor = self.experts(hidden_TD, index_Tk, weight_Tk).view_as(hidden)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden)


def _shared_experts(config: DeepseekConfig) -> LlamaMLP:
    width = (config.n_shared_experts or 0) * config.moe_intermediate_size
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": width}
    return LlamaMLP(SimpleNamespace(**sizes, mlp_bias=config.mlp_bias, hidden_act=config.hidden_act))


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    """What the base model and the causal language model have in common."""

    config_class = DeepseekConfig
    _can_record_outputs = {  # noqa: RUF012  (Transformers declares it without saying that it belongs to the class)
        "router_logits": OutputRecorder(DeepseekTopkRouter, index=0),
        "hidden_states": LlamaDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekExperts | DeepseekTopkRouter):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            if config.is_sparse(index):
                layer.mlp = DeepseekMoE(config)
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    """The decoder with its language modelling head."""

    def __init__(self, config: DeepseekConfig) -> None:
        # Not LlamaForCausalLM's own: it would build a Llama first, which refuses to hear of experts.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("deepseek_v2"), overwrite=True)
