"""The vLLM plugin: consolidated checkpoints are served without remote code wherever this package is installed.

vLLM calls :func:`register` in each of its processes, through the entry point group ``vllm.general_plugins``.
"""

from __future__ import annotations

from conmoe.runtime import CLASS_PREFIX, FAMILIES, class_names
from conmoe.runtime import register as register_auto_classes

#: vLLM's generic backend, which runs the Transformers classes with vLLM's own attention and fused experts.
BACKEND = "vllm.model_executor.models.transformers:TransformersMoEForCausalLM"


def register() -> None:
    """Tell Transformers about our classes, and vLLM which backend runs them."""
    from vllm import ModelRegistry

    register_auto_classes()
    known = ModelRegistry.get_supported_archs()
    for model_type in FAMILIES:
        architecture = CLASS_PREFIX + class_names(model_type).causal
        if architecture not in known:
            ModelRegistry.register_model(architecture, BACKEND)
