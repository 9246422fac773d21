"""What the engines would say of a result: every rule against a case on each side of it, and how the verbs use them."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch

import conmoe
from conmoe.preflight import Serve, case_of_checkpoint, case_of_request, facts_of, look
from conmoe.request import check_request
from conmoe.serving import COMPILED, RULES, VERSIONS, Case, Facts, accepted, examine, nearest, preflight
from conmoe.source import open_source
from tests.commands import runner
from tests.families import EXPERTS, TOP_K, save_tiny, tiny_model
from tests.low_precision import EVEN, quantised

PLAIN = Facts("olmoe", 64, 8, intermediate=1024, heads=16)
QWEN = Facts("qwen3_moe", 128, 8, intermediate=768, heads=32)
GROUPED = Facts("deepseek_v3", 256, 8, 8, 4, intermediate=2048, heads=128)
SQRT = Facts("deepseek_v4", 256, 6, intermediate=2048, heads=64, scoring="sqrtsoftplus")
FP8 = Facts("deepseek_v3", 256, 8, 8, 4, intermediate=2048, heads=128, block=128)
OSS = Facts("gpt_oss", 128, 4, intermediate=2880, heads=64)
PHI = Facts("phimoe", 16, 2, intermediate=6400, heads=32)


def case(facts, count, form="sliced", **how):
    return Case(facts, (count,), form, **how)


#: (engine, rule) -> a case that it lets pass, and one next to it that it does not.
SIDES = {
    ("vllm", "too few"): (case(PLAIN, 8), case(PLAIN, 7)),
    ("vllm", "groups"): (case(GROUPED, 16), case(GROUPED, 20)),
    ("vllm", "compiled counts"): (case(SQRT, 192), case(SQRT, 144)),
    ("vllm", "general kernel"): (case(QWEN, 64), case(QWEN, 96)),
    ("vllm", "more ranks than experts"): (case(QWEN, 16, tp=16), case(QWEN, 8, tp=16)),
    ("vllm", "expert width"): (case(QWEN, 64, tp=64, ep=64), case(QWEN, 64, tp=512)),
    ("vllm", "heads"): (case(QWEN, 64, tp=32), case(QWEN, 64, tp=64)),
    ("vllm", "expert-parallel size"): (case(QWEN, 64, tp=2, ep=4), case(QWEN, 64, tp=4, ep=2)),
    ("vllm", "gpt-oss remainder"): (case(OSS, 64, ep=4), case(OSS, 66, ep=4)),
    ("vllm", "unequal ranks"): (case(QWEN, 64, ep=4), case(QWEN, 66, ep=4)),
    ("vllm", "empty ranks"): (case(QWEN, 64, ep=64), case(QWEN, 64, ep=128)),
    ("vllm", "scale blocks"): (case(FP8, 128, tp=16), case(FP8, 128, tp=32)),
    ("vllm", "TensorRT-LLM kernels"): (case(FP8, 128), case(FP8, 130)),
    ("vllm", "more than a map"): (case(QWEN, 64, "shared"), case(QWEN, 64, "shared", departs=True)),
    ("vllm", "pools"): (case(QWEN, 64, "shared"), case(QWEN, 64, "shared", scope=2)),
    ("vllm", "Phi-MoE"): (case(PHI, 8, "shared"), case(PHI, 8)),
    ("vllm", "latent attention"): (case(GROUPED, 128), case(GROUPED, 128, "shared")),
    ("vllm", "parallel maps"): (case(QWEN, 64, "shared"), case(QWEN, 64, "shared", tp=2)),
    ("vllm", "budget"): (case(QWEN, 64, "shared"), case(QWEN, 64, "shared", uneven=True)),
    ("sglang", "too few"): (case(PLAIN, 8), case(PLAIN, 7)),
    ("sglang", "groups"): (case(GROUPED, 128), case(GROUPED, 100)),
    ("sglang", "expert-parallel size"): (case(QWEN, 64, tp=4, ep=2), case(QWEN, 64, tp=2, ep=4)),
    ("sglang", "expert-parallel remainder"): (case(QWEN, 64, tp=4, ep=2), case(QWEN, 63, tp=4, ep=3)),
    ("sglang", "unequal ranks"): (case(QWEN, 64, tp=4, ep=4), case(QWEN, 66, tp=4, ep=4)),
    ("sglang", "more ranks than experts"): (case(QWEN, 16, tp=16), case(QWEN, 8, tp=16)),
    ("sglang", "expert width"): (case(QWEN, 64, tp=512, ep=512), case(QWEN, 64, tp=512, ep=1)),
    ("sglang", "scale blocks"): (case(FP8, 128, tp=32, ep=2), case(FP8, 128, tp=32)),
    ("sglang", "power of two"): (case(GROUPED, 128), case(GROUPED, 160)),
    ("sglang", "maps"): (case(QWEN, 64), case(QWEN, 64, "shared")),
    ("sglang", "more than a map"): (case(QWEN, 64, "shared"), Case(QWEN, (64, 48), "shared")),
    ("sglang", "budget"): (case(QWEN, 64, "shared"), case(QWEN, 64, "shared", uneven=True)),
    ("llama.cpp", "maps"): (case(QWEN, 64), case(QWEN, 64, "shared")),
    ("llama.cpp", "too few"): (case(PLAIN, 8), case(PLAIN, 7)),
    ("llama.cpp", "groups"): (case(GROUPED, 128), case(GROUPED, 8)),
    ("llama.cpp", "most experts"): (case(PLAIN, 512), case(PLAIN, 513)),
    ("llama.cpp", "fused top-k"): (case(QWEN, 64), case(QWEN, 96)),
    ("llama.cpp", "parallelism"): (case(QWEN, 64), case(QWEN, 64, tp=2)),
    ("mlx", "maps"): (case(QWEN, 64), case(QWEN, 64, "shared")),
    ("mlx", "too few"): (case(PLAIN, 8), case(PLAIN, 7)),
    ("mlx", "groups"): (case(GROUPED, 128), case(GROUPED, 132)),
    ("mlx", "parallelism"): (case(QWEN, 64), case(QWEN, 64, ep=2)),
    ("transformers", "too few"): (case(PLAIN, 8), case(PLAIN, 7)),
    ("transformers", "groups"): (case(GROUPED, 128), case(GROUPED, 132)),
    ("transformers", "parallelism"): (case(QWEN, 64), case(QWEN, 64, tp=2)),
}


def test_every_rule_has_a_name_of_its_own_and_cases():
    names = [(rule.engine, rule.name) for rule in RULES]
    assert len(names) == len(set(names))
    assert set(names) == SIDES.keys()
    assert {rule.engine for rule in RULES} == VERSIONS.keys()
    assert all(rule.source and rule.concerns for rule in RULES)


@pytest.mark.parametrize(("engine", "rule"), SIDES)
def test_a_rule_lets_one_side_pass_and_not_the_other(engine, rule):
    passing, broken = SIDES[engine, rule]
    assert rule not in {found.rule for found in examine(passing, engine)}
    (found,) = [found for found in examine(broken, engine) if found.rule == rule]
    assert "{" not in found.sentence
    assert accepted(broken, engine) == (not any(f.level == "refuse" for f in examine(broken, engine)))


def test_checkpoints_that_are_known_to_have_died_in_vllm_are_refused():
    """DeepSeek-V4 with 144, 160 and 272 experts (vLLM 51521, PR 50982); the counts of the message are taken."""
    for count in (144, 160, 272):
        facts = Facts("deepseek_v4", 384, 6, scoring="sqrtsoftplus")
        (found,) = (f for f in preflight(facts, count, "vllm") if f.level == "refuse")
        assert "51521" in found.source
        near = nearest(case(facts, count), "vllm")
        assert near.below == max(c for c in COMPILED if c < count)
        assert near.above == min(c for c in COMPILED if c > count)


def test_the_nearest_counts_are_taken_and_nothing_between_them():
    settings = itertools.product(
        (PLAIN, QWEN, GROUPED, OSS, PHI), VERSIONS, ("sliced", "shared"), ((1, 1), (2, 4), (3, 1))
    )
    refused = 0
    for facts, engine, form, (tp, ep) in settings:
        taken = {n for n in range(1, facts.experts + 1) if accepted(case(facts, n, form, tp=tp, ep=ep), engine)}
        for count in (1, 7, facts.experts // 2 + 1, facts.experts - 1):
            near = nearest(case(facts, count, form, tp=tp, ep=ep), engine)
            assert near.below == max((n for n in taken if n < count), default=None)
            assert near.above == min((n for n in taken if n > count), default=None)
            refused += count not in taken
    assert refused > 100


@pytest.mark.parametrize(
    ("family", "groups"),
    [("olmoe", {}), ("deepseek_v3", {"n_group": 2, "topk_group": 1}), ("glm4_moe", {"n_group": 1})],
)
def test_transformers_runs_the_counts_that_the_rules_take_and_stops_at_the_others(family, groups):
    field = "num_experts" if family == "olmoe" else "n_routed_experts"
    for count in range(1, EXPERTS + 1):
        facts = Facts(family, EXPERTS, TOP_K, groups.get("n_group", 1), groups.get("topk_group", 1))
        try:
            tiny_model(family, **{field: count, **groups})(torch.arange(5).unsqueeze(0))
            runs = True
        except (RuntimeError, IndexError):
            runs = False
        assert runs == accepted(case(facts, count), "transformers"), count


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "ernie4_5_moe"])
def test_the_facts_are_those_of_the_model(family, checkpoint):
    source = open_source(checkpoint(family))
    facts, config = facts_of(source), source.config
    down = source.model.get_submodule(source.layers[0].experts).get_parameter("down_proj")
    assert facts.intermediate in down.shape[1:]
    assert facts.intermediate == 16
    assert (facts.family, facts.experts, facts.top_k) == (family, EXPERTS, TOP_K)
    assert facts.heads == config.num_attention_heads
    assert (facts.groups, facts.groups_used) == ((2, 1) if family == "deepseek_v3" else (1, 1))
    legal = tuple(n for n in range(1, EXPERTS + 1) if accepted(case(facts, n), "transformers"))
    assert legal == conmoe.inspect(checkpoint(family)).legal_sliced_counts


@pytest.mark.parametrize(("kind", "rows"), [("fp8-even", EVEN[0]), ("fp8-tensor", 0), ("ct-int4", 0)])
def test_the_facts_know_the_blocks_that_scales_belong_to(kind, rows, checkpoint, tmp_path):
    folder = quantised(checkpoint("qwen3_moe"), tmp_path / "low", kind)
    assert facts_of(open_source(folder)).block == rows


def test_requests_become_the_cases_that_they_will_make(checkpoint):
    source = open_source(checkpoint("olmoe"))

    def asked(**request):
        return case_of_request(source, check_request(source.layers, conmoe.Request(**request)), Serve("vllm", 2, 4))

    assert asked(method="reap", keep="4") == Case(facts_of(source), (4,), "sliced", 2, 4)
    assert asked(keep="3") == Case(facts_of(source), (3,), "shared", 2, 4)
    assert asked(keep="3", options={"redirect": "zero"}).departs
    dropped = asked(method="reap", keep="4", layers="0")
    assert (dropped.counts, dropped.form, dropped.departs) == ((4, EXPERTS), "shared", True)
    assert asked(method="reap", keep="4", form="shared").departs
    assert asked(keep="4", scope=2).scope == 2
    assert asked(keep="4", budget="error").uneven
    assert asked(budget="4,6").counts == (4, 6)
    assert asked(method="mone", keep="4", form="shared").departs
    assert asked(keep="8").counts == (EXPERTS,)


def test_results_are_judged_by_what_they_store(checkpoint, calibrated, tmp_path):
    model = checkpoint("olmoe")
    plan = conmoe.plan(model, calibrated("olmoe"), None, conmoe.Request(budget="3,5"))
    conmoe.apply(model, plan, tmp_path / "out")
    found = case_of_checkpoint(open_source(tmp_path / "out"), Serve("vllm"), None, "sliced")
    assert (found.counts, found.form, found.departs, found.scope) == ((3, 5), "shared", False, 1)
    assert look(found, "vllm").accepted
    assert not look(found, "llama.cpp").accepted


@pytest.fixture
def run(capsys):
    return runner(capsys)


def test_inspect_refuses_what_vllm_would_refuse_and_names_the_nearest_counts(run, checkpoint):
    model = checkpoint("deepseek_v3")
    found = run("inspect", model, "--keep", "5", "--serve", "vllm")
    assert found.code == 2
    assert "family" in found.out
    assert found.err.count("\n") == 1
    assert "vllm 0.32.0 would not serve 5 of 8 experts a layer in the sliced form" in found.err
    assert "2 groups" in found.err
    assert "--keep 4 and --keep 6" in found.err
    for keep in ("4", "6", "0.5"):
        assert run("inspect", model, "--keep", keep, "--serve", "vllm").code == 0
    assert run("inspect", model, "--keep", "5").code == 0
    assert run("inspect", model, "--keep", "5", "--serve", "vllm", "--form", "shared").code == 0
    assert run("inspect", model, "--serve", "vllm").code == 0


def test_inspect_refuses_more_ranks_than_experts_and_says_how_many_would_do(run, tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "model", num_attention_heads=8, num_experts=16, moe_intermediate_size=64)
    found = run("inspect", model, "--keep", "0.25", "--serve", "vllm", "--tp", "8", "--ep", "8", "--json")
    assert found.code == 2
    serving = found.json["serving"]
    assert serving["counts"] == [4]
    assert not serving["accepted"]
    assert serving["nearest"] == {"below": None, "above": 8}
    assert {"more ranks than experts", "unequal ranks"} <= {each["rule"] for each in serving["findings"]}
    assert all({"level", "sentence", "source", "version"} <= each.keys() for each in serving["findings"])
    assert "--keep 8" in found.err
    found = run("inspect", model, "--keep", "8", "--serve", "vllm", "--tp", "8", "--ep", "8", "--json")
    assert (found.code, found.json["serving"]["accepted"], found.json["serving"]["sentence"]) == (0, True, "")


def test_questions_that_cannot_be_asked_are_refused(run, checkpoint):
    model = checkpoint("olmoe")
    assert "--serve takes vllm" in run("inspect", model, "--serve", "vlm").err
    assert "name it by --serve" in run("inspect", model, "--tp", "2").err
    assert run("inspect", model, "--serve", "vllm", "--keep", "9").code == 2


def test_compress_refuses_before_any_text_is_read(run, checkpoint, tmp_path):
    model = checkpoint("deepseek_v3")
    out, data = tmp_path / "out", tmp_path / "missing.txt"
    arguments = ("compress", model, out, "--method", "reap", "--keep", "4", "--data", data)
    found = run(*arguments, "--serve", "sglang", "--tp", "3", "--ep", "3")
    assert found.code == 2
    assert "sglang 0.5.23 would not serve 4 of 8 experts" in found.err
    assert "missing.txt" not in found.err
    assert not list(tmp_path.iterdir())
    assert "missing.txt" in run(*arguments, "--serve", "sglang").err


def test_compress_says_what_is_only_slow_and_goes_on(run, checkpoint, tmp_path):
    found = run(
        *("compress", checkpoint("olmoe"), tmp_path / "out", "--method", "reap", "--keep", "3", "--effort", "quick"),
        *("--refine", "none", "--tokens", "64", "--seq-len", "32", "--eval-tokens", "0", "--serve", "vllm"),
    )
    assert found.code == 0
    assert "Warning: vllm 0.32.0: 3 experts are routed on CUDA by the general kernels" in found.err
    shutil.rmtree(tmp_path / "out")
