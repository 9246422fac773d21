"""Numbers of each domain are those of its text alone, and all text is the mean over its sequences."""

from __future__ import annotations

import json

import pytest
import torch

import conmoe
from conmoe.data import SourceCount
from tests.commands import runner, write_text
from tests.conftest import token_data
from tests.families import save_tiny

PARTS = {"first": token_data(3, 20, seed=1), "second": token_data(5, 20, seed=2)}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_tiny("olmoe", tmp_path_factory.mktemp("models") / "other", seed=1)


def test_a_domain_is_measured_as_if_alone(checkpoint, other):
    sources = tuple(SourceCount(name, 1.0, part.ids_NS.shape[0], 1) for name, part in PARTS.items())
    data = conmoe.TokenData(torch.cat([part.ids_NS for part in PARTS.values()]), sources, "both", ("document",))
    found = conmoe.evaluate(other, data, against=checkpoint("olmoe"), domains=tuple(PARTS))
    assert list(found.domains) == list(PARTS)
    for name, part in PARTS.items():
        alone = conmoe.evaluate(other, part, against=checkpoint("olmoe")).as_json()
        for key, number in found.domains[name].as_json().items():
            assert number == (pytest.approx(alone[key], rel=1e-6) if isinstance(number, dict) else alone[key]), key
    for key in ("kl", "loss", "top1_agreement"):
        pooled = sum(getattr(part, key).value * part.sequences for part in found.domains.values()) / found.sequences
        assert getattr(found, key).value == pytest.approx(pooled)
    assert "domains" not in found.as_json()


def test_named_text_on_the_command_line(checkpoint, other, tmp_path, capsys):
    run = runner(capsys)
    text, second = write_text(tmp_path), tmp_path / "second.txt"
    second.write_text("".join(f"Other words, {number} of them.\n" for number in range(200)))
    asked = ["evaluate", other, "--against", checkpoint("olmoe"), "--tokens", 512, "--seq-len", 32]
    named = run(*asked, "--data", f"fox={text}@3", "--data", second, "--json").json
    assert list(named["domains"]) == ["fox", "second"]
    assert [part["sequences"] for part in named["domains"].values()] == [12, 4]
    assert named["domains"]["fox"]["data"] == [str(text)]
    assert named["domains"]["fox"]["kl"]["value"] > 0
    plain = run(*asked, "--data", f"{text}@3", "--data", second, "--json").json
    assert "domains" not in plain
    assert plain == {key: value for key, value in named.items() if key != "domains"}
    shown = run(*asked, "--data", f"fox={text}", "--data", f"other={second}")
    assert "fox" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    twice = run(*asked, "--data", f"fox={text}", "--data", f"fox={second}")
    assert (twice.code, json.dumps(twice.err)) == (2, json.dumps(twice.err))
    assert "two domains 'fox'" in twice.err
