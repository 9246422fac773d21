"""A model that stays on disk computes what the whole model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conmoe.source import open_source
from conmoe.stream import HiddenStates, open_stream
from conmoe.types import ConmoeError
from tests.conftest import Checkpoint, token_data
from tests.families import TINY, save_tiny


def whole_model(folder: Path, **options: object) -> PreTrainedModel:
    """The stock model, its weights at aligned addresses: matrix products differ in their last bit by alignment."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def streamed_logits(folder: Path, ids: torch.Tensor, batch: int, **options: object) -> torch.Tensor:
    with open_stream(open_source(folder, **options), ids, batch=batch) as stream:
        stream.run()
        with stream.head() as head:
            return torch.cat([head(stream.final(*pair)) for pair in stream.batches()])


@pytest.mark.parametrize("family", TINY)
def test_logits_are_bit_equal_to_the_whole_models(family: str, checkpoint: Checkpoint) -> None:
    ids = token_data(5).ids_NS  # with batches of 2 the last one is smaller
    model = whole_model(checkpoint(family))
    with torch.no_grad():
        whole = torch.cat([model(part).logits for part in ids.split(2)])
    assert torch.equal(streamed_logits(checkpoint(family), ids, 2), whole)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "ernie4_5_moe", "gpt_oss"])
def test_bfloat16_and_modules_kept_in_float32_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / family, dtype=torch.bfloat16)
    ids = token_data(2).ids_NS
    model = whole_model(folder)
    with torch.no_grad():
        assert torch.equal(streamed_logits(folder, ids, 2), model(ids).logits)


def test_tied_embeddings_are_read_once_and_used_twice(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "tied", tie_word_embeddings=True)
    ids = token_data(2).ids_NS
    model = whole_model(folder)
    with torch.no_grad():
        assert torch.equal(streamed_logits(folder, ids, 2), model(ids).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_streams(implementation: str, checkpoint: Checkpoint) -> None:
    ids = token_data(2).ids_NS
    model = whole_model(checkpoint("mixtral"), experts_implementation=implementation)
    got = streamed_logits(checkpoint("mixtral"), ids, 2, experts_implementation=implementation)
    with torch.no_grad():
        assert torch.equal(got, model(ids).logits)


def test_no_weight_stays_in_memory(checkpoint: Checkpoint) -> None:
    source = open_source(checkpoint("qwen3_moe"))
    with open_stream(source, token_data(2).ids_NS) as stream:
        stream.run()
        assert all(value.is_meta for value in source.model.state_dict().values())


def test_hidden_states_of_a_layer_survive_the_writing_of_the_next(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, 3, 4, 5, torch.float32)
    before, after = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    states.write(0, 0, before)
    states.write(1, 0, after[:2])
    states.write(1, 2, after[2:])
    assert torch.equal(states.read(0, 0, 3), before)
    assert torch.equal(states.read(1, 1, 3), after[1:])
    with pytest.raises(ConmoeError, match="ended early"):
        states.read(0, 2, 4)
