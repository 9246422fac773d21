"""A preview is the checkpoint that would be written."""

from __future__ import annotations

import pytest
import torch

import conmoe
from conmoe.evaluate.fidelity import measure, run_through
from conmoe.preview import preview
from conmoe.shards import read_tensor
from conmoe.source import open_source
from tests.conftest import token_data
from tests.families import TINY
from tests.results import assert_bits, on_disk

CASES = [("conmoe", "shared"), ("reap", "sliced"), ("conmoe", "expanded")]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("method", "form"), CASES)
def test_a_preview_holds_what_would_be_written(family, method, form, checkpoint, calibrated, tmp_path):
    folder = checkpoint(family)
    options = {"fusion": "frequency"} if method == "conmoe" else {}
    request = conmoe.Request(method=method, form=form, options=options)
    plan = conmoe.plan(folder, calibrated(family), request=request)
    conmoe.apply(folder, plan, tmp_path / "out", form=form)
    seen = preview(open_source(folder), plan, form)
    assert_bits({name: read_tensor(entry) for name, entry in seen.entries.items()}, on_disk(tmp_path / "out"))
    assert seen.config.to_dict() | {"_name_or_path": ""} == open_source(tmp_path / "out").config.to_dict() | {
        "_name_or_path": ""
    }


def test_a_preview_measures_like_the_checkpoint(checkpoint, calibrated, tmp_path):
    folder, data = checkpoint("olmoe"), token_data(4, 16, seed=7)
    plan = conmoe.plan(folder, calibrated("olmoe"), tmp_path / "plan")
    conmoe.apply(folder, plan, tmp_path / "out")
    written = conmoe.evaluate(tmp_path / "out", data, against=folder)
    source = open_source(folder, experts_implementation="conmoe_observed")
    with run_through(source, data, "cpu") as passed:
        seen = measure(preview(source, plan, experts_implementation="conmoe_observed"), data, passed)
        itself = measure(open_source(folder, experts_implementation="conmoe_observed"), data, passed)
    # sums of floats differ in the last bits with where their operands happen to lie in memory
    assert seen.loss.value == pytest.approx(written.loss.value, rel=1e-6)
    assert seen.kl is not None
    assert written.kl is not None
    assert seen.kl.value == pytest.approx(written.kl.value, rel=1e-4)
    assert (seen.bytes, seen.parameters, seen.tokens) == (written.bytes, written.parameters, written.tokens)
    assert itself.kl is not None
    assert itself.kl.value == 0.0
    assert torch.isfinite(torch.tensor(seen.loss.value))
