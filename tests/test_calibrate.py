"""Statistics: equal to a naive loop, independent of how the work is cut, bit-identical after an interruption."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import conmoe
from conmoe.artifacts import read_layer, read_manifest, read_tokens
from conmoe.calibrate import calibrate
from conmoe.moe import moe_layers
from conmoe.observe import IMPLEMENTATION
from conmoe.source import open_source
from conmoe.types import sample_tensors
from tests.conftest import Checkpoint, token_data
from tests.families import TINY
from tests.results import load_stock

ROOT = Path(__file__).parent.parent


class Stop(Exception):
    pass


def naive(folder: Path, ids: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """Counts, gates, norms, outputs and peaks by a Python loop over tokens and slots of the whole eager model."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    found: dict[int, dict[str, torch.Tensor]] = {}
    hooks = []
    for layer in moe_layers(model):
        experts = model.get_submodule(layer.experts)
        sums = {
            name: torch.zeros(layer.logical, dtype=torch.float64) for name in ("count", "gate", "gate_norm", "peak")
        }
        sums["output"] = torch.zeros(layer.logical, model.config.hidden_size, dtype=torch.float64)
        found[layer.index] = sums

        def watch(module, args, kwargs, output, sums=sums, experts=experts):
            hidden, index, weight = (*args, *kwargs.values())[:3]
            for t in range(hidden.shape[0]):
                for expert, gate in zip(index[t].tolist(), weight[t].tolist(), strict=True):
                    one = torch.ones(1, 1, dtype=weight.dtype)
                    out = type(experts).forward.__wrapped__(experts, hidden[t : t + 1], torch.tensor([[expert]]), one)[
                        0
                    ]
                    sums["count"][expert] += 1
                    sums["gate"][expert] += gate
                    sums["gate_norm"][expert] += gate * float(out.double().norm())
                    sums["output"][expert] += out.double()
                    sums["peak"][expert] = max(float(sums["peak"][expert]), float(out.abs().max()))

        hooks.append(experts.register_forward_hook(watch, with_kwargs=True))
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("family", TINY)
def test_statistics_equal_a_loop_over_tokens(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = token_data(2, 12)
    calibrate(checkpoint(family), tmp_path / "stats", data)
    for layer, sums in naive(checkpoint(family), data.ids_NS).items():
        got = read_layer(tmp_path / "stats", layer).sums
        for name, expected in sums.items():
            torch.testing.assert_close(
                got[name].double(), expected, rtol=2e-4, atol=1e-5, msg=f"{name} of layer {layer}"
            )


@pytest.mark.parametrize("family", TINY)
def test_observed_logits_equal_the_eager_models(family: str, checkpoint: Checkpoint) -> None:
    ids = token_data(2).ids_NS
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(family), experts_implementation="eager").eval()
    watched = AutoModelForCausalLM.from_pretrained(checkpoint(family), experts_implementation=IMPLEMENTATION).eval()
    with torch.no_grad():
        torch.testing.assert_close(watched(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in read_manifest(folder).layers:
        statistics = read_layer(folder, layer)
        tensors |= {f"{layer}.{name}": value for name, value in statistics.sums.items()}
        tensors |= {f"{layer}.{name}": value for name, value in sample_tensors(statistics.sample).items()}
    return tensors


def assert_same(left: Path, right: Path) -> None:
    """Equal up to rounding, the sample token by token (which experts tie is left to the routing)."""
    expected = stored(right)
    for name, value in stored(left).items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-4, atol=1e-4, msg=name)


def test_the_size_of_batches_does_not_matter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for batch in (1, 5, 12):
        calibrate(
            checkpoint("qwen2_moe"), tmp_path / str(batch), token_data(), conmoe.Calibration(sample=50, batch=batch)
        )
    assert_same(tmp_path / "1", tmp_path / "5")
    assert_same(tmp_path / "1", tmp_path / "12")


@pytest.mark.parametrize("tokens_until_stop", [30, 300, 500])
def test_a_resumed_run_is_bit_identical(tokens_until_stop: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, options = checkpoint("deepseek_v3"), conmoe.Calibration(sample=40, batch=4)
    calibrate(folder, tmp_path / "whole", token_data(), options)
    seen = 0

    def stop(tokens: int) -> None:
        nonlocal seen
        seen += tokens
        if seen > tokens_until_stop:
            raise Stop

    with pytest.raises(Stop):
        calibrate(folder, tmp_path / "resumed", token_data(), options, advance=stop)
    assert not (tmp_path / "resumed").exists()
    calibrate(folder, tmp_path / "resumed", token_data(), options)
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "resumed").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes() for name in files)


def test_a_run_with_other_inputs_does_not_resume(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def stop(tokens: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        calibrate(checkpoint("olmoe"), tmp_path / "stats", token_data(seed=1), advance=stop)
    calibrate(checkpoint("olmoe"), tmp_path / "stats", token_data(seed=2))
    calibrate(checkpoint("olmoe"), tmp_path / "fresh", token_data(seed=2))
    assert_same(tmp_path / "stats", tmp_path / "fresh")


def test_merged_statistics_are_those_of_all_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, both = checkpoint("mixtral"), token_data(12)
    calibrate(folder, tmp_path / "both", both, conmoe.Calibration(sample=0))
    for name, rows in (("a", both.ids_NS[:7]), ("b", both.ids_NS[7:])):
        part = conmoe.TokenData(rows, both.sources, name, (name,))
        calibrate(folder, tmp_path / name, part, conmoe.Calibration(sample=0))
    merged = conmoe.merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert merged.tokens == both.tokens
    assert merged.documents == ("a", "b")
    assert_same(tmp_path / "merged", tmp_path / "both")


def test_statistics_of_different_models_do_not_merge(calibrated: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(conmoe.UsageError, match="different models"):
        conmoe.merge_statistics([calibrated("olmoe"), calibrated("mixtral")], tmp_path / "merged")


def test_the_sample_is_seeded_and_capped(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        calibrate(checkpoint("olmoe"), tmp_path / name, token_data(), conmoe.Calibration(sample=20, seed=seed))
    a, b, c = (read_layer(tmp_path / name, 0).sample for name in "abc")
    assert len(a.hidden_nD) == 20
    assert torch.equal(a.hidden_nD, b.hidden_nD)
    assert not torch.equal(a.hidden_nD, c.hidden_nD)
    assert bool((a.priority_n.diff() > 0).all())


def test_two_processes_give_the_single_process_result(checkpoint: Checkpoint, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; from pathlib import Path; import conmoe\n"
        "from tests.conftest import token_data\n"
        "options = conmoe.Calibration(sample=50, batch=3)\n"
        "conmoe.calibrate(Path(sys.argv[1]), Path(sys.argv[2]), token_data(13), options)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run(
        [*command, str(checkpoint("glm4_moe")), str(tmp_path / "two")], check=True, env=environment, timeout=240
    )
    calibrate(checkpoint("glm4_moe"), tmp_path / "one", token_data(13), conmoe.Calibration(sample=50, batch=3))
    assert_same(tmp_path / "two", tmp_path / "one")


def test_what_a_block_adds_beside_its_routed_experts_is_sampled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("deepseek_v3")
    calibrate(folder, tmp_path / "stats", token_data(), conmoe.Calibration(sample=30))
    layer = open_source(folder).layers[0]
    sample = read_layer(tmp_path / "stats", layer.index).sample
    shared = load_stock(folder).get_submodule(f"{layer.block}.shared_experts")
    with torch.no_grad():
        expected = shared(sample.hidden_nD)
    assert sample.rest_nD is not None
    torch.testing.assert_close(sample.rest_nD, expected, rtol=1e-4, atol=1e-4)
    calibrate(checkpoint("olmoe"), tmp_path / "plain", token_data(), conmoe.Calibration(sample=30))
    assert read_layer(tmp_path / "plain", 0).sample.rest_nD is None


def test_the_tokens_are_kept_with_the_statistics(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name, sequences in (("a", 3), ("b", 2)):
        calibrate(checkpoint("olmoe"), tmp_path / name, token_data(sequences), conmoe.Calibration(sample=10))
    conmoe.merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    expected = torch.cat([token_data(3).ids_NS, token_data(2).ids_NS])
    assert torch.equal(read_tokens(tmp_path / "both"), expected)
    calibrate(checkpoint("olmoe"), tmp_path / "long", token_data(2, 30), conmoe.Calibration(sample=10))
    conmoe.merge_statistics([tmp_path / "a", tmp_path / "long"], tmp_path / "mixed")
    with pytest.raises(conmoe.UsageError, match="does not hold its calibration tokens"):
        read_tokens(tmp_path / "mixed")
