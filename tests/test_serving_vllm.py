"""vLLM's own server on results, in an environment that has vLLM: pytest -m vllm tests/test_serving_vllm.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tests.by_hand import MAP, write_shared

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: importlib.import_module(name)
    for name in ("vllm_server", "vllm_tiny"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "phimoe", "gpt_oss"])
def test_the_server_answers_as_transformers_does_by_remote_code_and_by_the_plugin(family, bench, tmp_path):
    tiny = bench("vllm_tiny")
    folder = write_shared(family, tmp_path / "shared", gains=tiny.GAINS, **tiny.SIZES, **tiny.MORE.get(family, {}))
    assert bench("vllm_server").main([str(folder)]) == 0


def test_the_server_is_found_wrong_where_a_map_is(bench, tmp_path):
    tiny = bench("vllm_tiny")
    right, wrong = (tmp_path / name for name in ("right", "wrong"))
    write_shared("olmoe", right, gains=tiny.GAINS, **tiny.SIZES)
    write_shared("olmoe", wrong, expert_map=(*MAP[1:], MAP[0]), gains=tiny.GAINS, **tiny.SIZES)
    asked = [str(wrong), "--against", str(right), "--route", "plugin"]
    assert bench("vllm_server").main(asked) == 1


def test_the_server_refuses_what_it_would_read_wrongly(bench, tmp_path):
    tiny = bench("vllm_tiny")
    source = tiny.save_tiny("olmoe", tmp_path / "source", **tiny.SIZES)
    tiny.write_plans(source, tmp_path, {name: tiny.REFUSED[name] for name in ("rows", "scope")})
    folders = [str(tmp_path / name) for name in ("rows", "scope")]
    assert bench("vllm_server").main(["--refused", *folders, "--route", "plugin"]) == 0
