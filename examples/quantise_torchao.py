"""Quantise a (compressed) Mixture-of-Experts checkpoint with torchao, experts included, router left alone.

    pip install torchao
    python examples/quantise_torchao.py OLMOE-HALF OLMOE-HALF-INT8 --recipe int8-weight-only

Transformers 5 stores the experts of a layer as one parameter of three dimensions, which is no ``nn.Linear``: a recipe
that names no parameters quantises the attention and leaves the experts, most of the model, as they were. So they are
named here, and the script fails unless they were quantised. Read the result with ``load`` below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import conmoe  # noqa: F401  teaches the Auto classes the shared form

#: Fused experts, by the names they have in Transformers; dense and shared-expert MLPs and attention.
EXPERTS = r"re:.*\.experts\.(gate_up_proj|up_proj|down_proj)"
LINEARS = r"re:.*\.\w+_proj\.weight"
#: Never converted, whatever class a family makes them of: the output head, routers, gates of shared experts.
IGNORE = ["lm_head", r".*\.(gate|router|shared_expert_gate)"]
RECIPES = ("int8-weight-only", "int8-dynamic", "fp8-weight-only")


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    model = quantise(options.model, options.recipe, trust_remote_code=options.trust_remote_code)
    kept = [name for name, tensor in weights(model) if not is_quantised(tensor)]
    print("Left in full precision:", ", ".join(kept) or "nothing")
    experts = [is_quantised(tensor) for name, tensor in weights(model) if ".experts." in name]
    if not experts or not all(experts):
        sys.exit(
            "Experts stayed in full precision, because this family names them in another way than EXPERTS, or because "
            "Transformers is too old to quantise them (5.17 is, 5.23 is not): nothing was written."
        )
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    print(f"Wrote {options.out}.")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint, sliced, shared or not compressed at all")
    parser.add_argument("out", type=Path, help="a folder for the quantised one")
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[0])
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    return parser.parse_args(arguments)


def quantise(folder: Path, recipe: str, *, trust_remote_code: bool = False) -> Any:
    """The model of ``folder``, its weights quantised as they are loaded."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        FqnToConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
    )
    from transformers import TorchAoConfig

    scheme: Any = {
        "int8-weight-only": Int8WeightOnlyConfig,
        "int8-dynamic": Int8DynamicActivationInt8WeightConfig,
        "fp8-weight-only": Float8WeightOnlyConfig,
    }[recipe]()
    names = FqnToConfig({EXPERTS: scheme, LINEARS: scheme})
    how = TorchAoConfig(names, modules_to_not_convert=IGNORE)
    return load(folder, quantization_config=how, trust_remote_code=trust_remote_code)


def load(folder: Path, **options: Any) -> Any:
    """A model, quantised or not; torchao's tensors can be taken expert by expert, which is what ``eager`` does."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager", **options)
    return model.eval()


def weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What could be quantised: the parameters of two or more dimensions, without the embeddings."""
    for name, tensor in model.named_parameters():
        if tensor.ndim >= 2 and "embed_tokens" not in name:
            yield name, tensor


def is_quantised(tensor: Tensor) -> bool:
    """Whether this is one of torchao's tensors (a subclass), which holds integers or float8 and scales."""
    return type(tensor.data) is not Tensor


if __name__ == "__main__":
    main(sys.argv[1:])
