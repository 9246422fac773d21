"""Quantise a (compressed) Mixture-of-Experts checkpoint with llm-compressor, experts included, router left alone.

    pip install "llmcompressor==0.14.*"        # wants transformers < 5.18; conmoe wants >= 5.16
    python examples/quantise_llmcompressor.py OLMOE-HALF OLMOE-HALF-FP8 --recipe fp8-dynamic
    python examples/quantise_llmcompressor.py OLMOE-HALF OLMOE-HALF-INT4 --recipe w4a16 --data my-text.jsonl

The result is in the compressed-tensors format, one tensor per expert, which is what vLLM reads. llm-compressor takes
the fused experts of Transformers 5 apart into linear layers (``linearize_moe``); without that they would not be
quantised. The script fails unless every expert was. Read the result with ``load`` below.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import conmoe

#: recipe -> preset scheme of compressed-tensors, and whether it is fitted on text
RECIPES = {"fp8-dynamic": ("FP8_DYNAMIC", False), "w8a8": ("W8A8", True), "w4a16": ("W4A16", True)}
#: The output head, routers, gates of shared experts.
IGNORE = ["lm_head", r"re:.*\.(gate|router)$", r"re:.*\.(gate|router)\.", r"re:.*shared_expert_gate$"]


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    model = quantise(options)
    experts = {name: hasattr(module, "weight_scale") for name, module in experts_of(model)}
    if not experts or not all(experts.values()):
        sys.exit("Some experts of this model were left in full precision: nothing was written.")
    model.save_pretrained(options.out, save_compressed=True)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    print(f"{len(experts)} matrices of experts quantised. Wrote {options.out}.")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint, sliced, shared or not compressed at all")
    parser.add_argument("out", type=Path, help="a folder for the quantised one")
    parser.add_argument("--recipe", choices=RECIPES, default="fp8-dynamic")
    parser.add_argument(
        "--data", help="text to fit w8a8 and w4a16 on, as for conmoe; by default what comes with Python"
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=None, help="of w4a16, if 128 does not divide all sizes")
    return parser.parse_args(arguments)


def quantise(options: argparse.Namespace) -> Any:
    """The model with its weights quantised: FP8 by rounding, integers by GPTQ."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    scheme, fitted = RECIPES[options.recipe]
    how: dict[str, Any] = {"ignore": IGNORE, **targets(scheme, options.group_size)}
    recipe = GPTQModifier(**how) if fitted else QuantizationModifier(**how)
    text: dict[str, Any] = {}
    if fitted:
        from datasets import Dataset

        tokenizer = conmoe.load_tokenizer(options.model)
        specs = [conmoe.parse_spec(options.data)] if options.data else []
        data = conmoe.load_tokens(tokenizer, specs, tokens=options.tokens, seq_len=options.seq_len)
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in data.ids_NS.tolist()]
        text = {"dataset": Dataset.from_list(rows), "num_calibration_samples": len(rows)}
        text["max_seq_length"] = options.seq_len
    model = load_unfused(options.model)
    oneshot(model=model, recipe=recipe, **text)
    return model


def targets(scheme: str, group_size: int | None) -> dict[str, Any]:
    """All linear layers by a preset; with groups of another size where asked."""
    if group_size is None or scheme != "W4A16":
        return {"targets": "Linear", "scheme": scheme}
    from compressed_tensors.quantization import preset_name_to_scheme

    group = preset_name_to_scheme(scheme, ["Linear"])
    group.weights.group_size = group_size
    return {"config_groups": {"group_0": group}}


def load_unfused(folder: Path) -> Any:
    """A model whose experts are linear layers of their own."""
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model: Any = linearize_moe(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
    on_disk = {name for name in tensor_names(folder) if ".experts." in name}
    if on_disk != {f"{name}.weight" for name, _ in experts_of(model)}:
        sys.exit("This family stores its experts under other names, and would not be read again: use quantise_torchao.")
    return model


def tensor_names(folder: Path) -> list[str]:
    names: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    return names


def load(folder: Path) -> Any:
    """A quantised model in Transformers, which puts the experts back together in full precision as it reads them.

    It cannot do so with experts of eight-bit integers; these are multiplied by their scales here.
    """
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", {}).get("format") != "int-quantized":
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        return model.eval()
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    scales = {name.removesuffix("_scale"): stored.pop(name) for name in list(stored) if name.endswith(".weight_scale")}
    plain = {name: (stored[name].float() * scale.float()).to(config.dtype) for name, scale in scales.items()}
    del config.quantization_config
    with tempfile.TemporaryDirectory() as work:
        config.save_pretrained(work)
        save_file(stored | plain, Path(work) / "model.safetensors", {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(work, dtype="auto")
    return model.eval()


def experts_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    """The linear layers that make up the experts."""
    found = model.named_modules()
    return [(name, layer) for name, layer in found if ".experts." in name and isinstance(layer, torch.nn.Linear)]


if __name__ == "__main__":
    main(sys.argv[1:])
