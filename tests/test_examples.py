"""The scripts in examples/ do what their first line says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conmoe.data import load_tokenizer, load_tokens, parse_spec

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = "--hidden 16 --layers 2 --heads 2 --experts 8 --width 8 --top-k 2 --vocab 300 --seq-len 16 --batch 16"


def example(name, folder="examples"):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES.parent / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_train_tiny_moe(family, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "model"
    text.write_text("\n<|endoftext|>\n".join(f"{i} and {i + 1} are {2 * i + 1}." for i in range(900)))
    lengths = ["--tokens", "9000", "--unique-tokens", "4000", "--lr", "0.01"]
    example("train_tiny_moe").main([str(out), "--family", family, "--data", str(text), *SMALL.split(), *lengths])
    assert "Held-out perplexity" in capsys.readouterr().out
    readme = (out / "README.md").read_text()
    assert f"python examples/train_tiny_moe.py OUT --family {family}" in readme
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == family
    assert model.dtype == torch.bfloat16
    ids_NS = load_tokens(load_tokenizer(out), [parse_spec(str(text))], tokens=512, seq_len=16).ids_NS
    assert model(input_ids=ids_NS, labels=ids_NS).loss < 5  # an untrained model's is log(300) = 5.7
