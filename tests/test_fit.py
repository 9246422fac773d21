"""``--fit``: the largest keep whose result is no larger than a size."""

from __future__ import annotations

import shutil

import pytest

import conmoe
from conmoe.allocate import parse_size
from conmoe.fit import fit
from conmoe.forms import check_form
from conmoe.source import open_source
from tests.commands import runner, write_text
from tests.families import EXPERTS, TOP_K, save_tiny
from tests.results import by_layer, on_disk
from tests.test_budgets import sizes

#: Requests of every form and shape, by what is special about them.
REQUESTS = {
    "sliced": {"method": "reap"},
    "dropped, shared": {"method": "reap", "form": "shared"},
    "redirected": {"method": "conmoe"},
    "redirected, sliced": {"method": "conmoe", "form": "sliced"},
    "merged": {"method": "mergemoe"},
    "constants": {"method": "mone"},
    "silence": {"method": "conmoe", "options": {"redirect": "zero"}},
    "uneven": {"method": "conmoe", "budget": "dominant"},
    "uneven, dropped": {"method": "reap", "budget": "global", "form": "shared"},
    "pools": {"method": "conmoe", "scope": 2},
    "some layers": {"method": "reap", "layers": "1"},
    "skipping": {"method": "naee", "options": {"skip": "true"}, "form": "shared"},
    "refined": {"method": "conmoe", "refine": "refit"},
    "router refined": {"method": "reap", "refine": "reconstruct"},
}
#: As fused tensors and one by one, with biases, shared experts, dense layers, groups in the router.
FAMILIES = ["olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "qwen2_moe", "glm4_moe"]


def whole(model):
    return sum(tensor.nbytes for tensor in on_disk(model).values())


def written(folder):
    return sum(tensor.nbytes for tensor in on_disk(folder).values())


def asked(model, **request):
    return fit(open_source(model), conmoe.Request(**request))


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24_000_000_000),
        ("500 MB", 500_000_000),
        ("1.5kB", 1500),
        ("7B", 7),
        (" 2KiB ", 2048),
        ("0.5GiB", 2**29),
        ("3mib", 3 * 2**20),
        ("1TiB", 2**40),
        ("60%", 600),
        ("33.35%", 333),
    ],
)
def test_sizes_are_read_to_the_byte(text, size):
    assert parse_size(text, 1000) == size


@pytest.mark.parametrize("text", ["24", "GB", "0.5", "-1GB", "1,5GB", "24G", "1iB", "%", "24 gigabytes", "1e9B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(conmoe.UsageError, match=r"takes a size \(24GB, 500MB, 20GiB\) or a share"):
        parse_size(text, 1000)


@pytest.mark.parametrize("text", ["0MB", "0%", "0.01%", "0.5B"])
def test_a_size_of_nothing_is_refused(text):
    with pytest.raises(conmoe.UsageError, match="leaves room for nothing"):
        parse_size(text, 1000)


# The promise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["sliced", "dropped, shared", "redirected", "redirected, sliced"])
def test_what_is_written_fits_and_one_expert_more_would_not(what, family, checkpoint, calibrated, tmp_path):
    _check_promise(checkpoint(family), calibrated(family), REQUESTS[what], tmp_path)


@pytest.mark.parametrize("what", list(REQUESTS)[4:])
def test_whatever_a_plan_stores_is_counted(what, checkpoint, calibrated, tmp_path):
    _check_promise(checkpoint("olmoe"), calibrated("olmoe"), REQUESTS[what], tmp_path)


def _check_promise(model, statistics, request, tmp_path):
    def result(keep):
        """Written by a plan of so many, or None if there can be none."""
        try:
            plan = conmoe.plan(model, statistics, None, conmoe.Request(**request, keep=str(keep)))
            form = request.get("form")
            return conmoe.apply(model, plan, tmp_path / f"{keep}", form=form, force=True)
        except conmoe.UsageError:
            return None

    by_keep = {keep: done for keep in range(1, EXPERTS + 1) if (done := result(keep))}
    assert all(done.bytes == written(tmp_path / str(keep)) for keep, done in by_keep.items())
    source = whole(model)
    for keep, done in by_keep.items():
        following = min((each for each in by_keep if each > keep), default=None)
        limits = [done.bytes] + ([by_keep[following].bytes - 1] if following else [])
        for limit in (limit for limit in limits if limit < source):
            found = asked(model, **request, fit=f"{limit}B")
            assert (found.kept, found.bytes, found.form) == (keep, done.bytes, done.form)
            assert (found.request.keep, found.request.fit) == (str(keep), "")
    smallest = by_keep[min(by_keep)].bytes
    with pytest.raises(conmoe.UsageError, match=rf"smallest that can be made, .* with {min(by_keep)} experts? a layer"):
        asked(model, **request, fit=f"{smallest - 1}B")


def test_groups_of_a_router_are_kept_even(checkpoint, calibrated):
    model = checkpoint("deepseek_v3")
    assert {asked(model, method="reap", fit=f"{percent}%").kept for percent in range(80, 100)} == {4, 6}
    plan = conmoe.plan(model, calibrated("deepseek_v3"), None, conmoe.Request("reap", fit="95%"))
    check_form(open_source(model).layers, plan, "sliced")
    assert {asked(model, method="conmoe", fit=f"{percent}%").kept for percent in range(66, 100)} == set(range(1, 8))


def test_counts_that_may_differ_are_promised_the_form_that_holds_them(checkpoint, calibrated, tmp_path):
    """Where they come out equal after all, the result is sliced, and smaller by the maps."""
    model = checkpoint("olmoe")
    forms = set()
    for keep in range(TOP_K, EXPERTS):
        plan = conmoe.plan(model, calibrated("olmoe"), None, conmoe.Request("reap", str(keep), budget="global"))
        done = conmoe.apply(model, plan, tmp_path / f"{keep}")
        forms.add(done.form)
        found = asked(model, method="reap", budget="global", fit=f"{done.bytes + 12 * sum(sizes(plan))}B")
        assert (found.kept, found.form) == (keep, "shared")
        assert done.bytes <= found.bytes
    assert forms == {"sliced", "shared"}


def test_a_share_is_one_of_the_bytes_of_the_source(checkpoint):
    model = checkpoint("olmoe")
    share, size = asked(model, method="reap", fit="70%"), asked(model, method="reap", fit=f"{whole(model) * 7 // 10}B")
    assert (share.kept, share.bytes) == (size.kept, size.bytes)
    assert TOP_K <= share.kept < EXPERTS


def test_only_headers_are_read(checkpoint, tmp_path):
    shutil.copytree(checkpoint("olmoe"), tmp_path / "hollow")
    file = tmp_path / "hollow" / "model.safetensors"
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.truncate(8 + header)
        stream.truncate(size)  # a hole instead of the data
    assert asked(tmp_path / "hollow", fit="70%") == asked(checkpoint("olmoe"), fit="70%")


def test_experts_of_half_precision_take_half(tmp_path):
    """Against arithmetic by hand: three matrices of 16 x 32 in bfloat16, an index and a gain for each of 8 experts."""
    import torch

    model = save_tiny("olmoe", tmp_path / "model", dtype=torch.bfloat16)
    layers, expert = 2, 3 * 16 * 32 * 2
    for kept in (1, 5, 7):
        left = whole(model) - layers * (EXPERTS - kept) * expert + layers * EXPERTS * (8 + 4)
        assert asked(model, method="conmoe", fit=f"{left}B").kept == kept
        assert asked(model, method="conmoe", fit=f"{left}B").bytes == left


# What cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"fit": "70%", "keep": "0.5"}, "--fit chooses how much to keep, and so does --keep 0.5"),
        ({"fit": "70%", "budget": "4,4"}, "and so does --budget 4,4"),
        ({"fit": "1MB"}, "and fits as it is; there is nothing to do"),
        ({"fit": "100%"}, "there is nothing to do"),
        ({"fit": "1kB", "method": "reap"}, "smallest that can be made, .* kB with 2 experts a layer; allow more"),
        ({"fit": "70%", "method": "mc-smoe"}, "'mc-smoe' makes is not known before it is made; use --keep"),
        ({"fit": "70%", "method": "cd-moe"}, "'cd-moe' makes is not known before it is made; use --keep"),
        ({"fit": "70%", "form": "expanded"}, "expanded form is as large as the source"),
        ({"fit": "much"}, "takes a size"),
        ({"fit": "70%", "method": "luck"}, "There is no method 'luck'"),
        ({"fit": "70%", "layers": "9"}, "no experts there"),
        ({"fit": "70%", "method": "reap", "budget": "global", "form": "sliced"}, "lets layers keep different numbers"),
    ],
)
def test_what_cannot_be_fitted_is_refused(request_, sentence, checkpoint, calibrated, tmp_path):
    for act in (
        lambda request: conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), None, request),
        lambda request: conmoe.check(checkpoint("olmoe"), tmp_path / "out", request),
    ):
        with pytest.raises(conmoe.UsageError, match=sentence) as caught:
            act(conmoe.Request(**request_))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_pools_of_grouped_routers_cannot_lose_experts(family, checkpoint, calibrated, tmp_path):
    """A plan for them would be one that nobody can apply; so it is refused before any work."""
    for more in ({"keep": "0.5"}, {"keep": "6"}, {"fit": "90%"}, {"budget": "8"}):
        request = conmoe.Request("reap", **more, scope=2, form="shared")
        with pytest.raises(conmoe.UsageError, match=r"2 groups that must keep equally many.*use --scope 1"):
            conmoe.check(checkpoint(family), tmp_path / "out", request)
    for method, keep in (("conmoe", "0.5"), ("reap", "1.0")):  # nothing is dropped
        request = conmoe.Request(method, keep, scope=2, form="shared")
        plan = conmoe.plan(checkpoint(family), calibrated(family), None, request)
        check_form(open_source(checkpoint(family)).layers, plan, "shared")


# Command line -------------------------------------------------------------------------------------------------------


def test_compress_to_a_size(checkpoint, tmp_path, capsys):
    model, run = checkpoint("olmoe"), runner(capsys)
    words = ["--data", write_text(tmp_path), "--tokens", "256", "--seq-len", "32", "--eval-tokens", "0"]
    words += ["--work", tmp_path / "work", "--method", "reap", "--refine", "none"]
    done = run("compress", model, tmp_path / "out", "--fit", "70%", *words, "--json")
    assert done.code == 0, done.err
    limit = whole(model) * 7 // 10
    assert done.json["bytes"] == written(tmp_path / "out") <= limit
    kept = int(done.json["keep"])
    assert f"--fit 70%: keeps {kept} of {EXPERTS} experts a layer, {done.json['bytes'] / 1e3:.4g} kB in the" in done.err
    assert done.err.index("--fit 70%") < done.err.index("calibrate")
    again = run("compress", model, tmp_path / "again", "--keep", str(kept), *words)
    assert "plan" in again.err
    assert "matches; not planning again" in again.err
    more = run("compress", model, tmp_path / "more", "--keep", str(kept + 1), *words)
    assert more.code == 0
    assert written(tmp_path / "more") > limit


def test_plan_to_a_size(checkpoint, calibrated, tmp_path, capsys):
    model, run = checkpoint("olmoe"), runner(capsys)
    words = [model, calibrated("olmoe"), tmp_path / "plan", "--scope", "2"]
    done = run("plan", *words, "--fit", "150kB")
    assert done.code == 0, done.err
    made = conmoe.read_plan(tmp_path / "plan")
    assert f"--fit 150kB: keeps {made.keep} of {EXPERTS} experts a layer" in done.err
    assert sizes(made) == [2 * int(made.keep)]
    assert list(by_layer(made)) == [0, 1]
    assert conmoe.apply(model, made, tmp_path / "out").bytes <= 150_000
    for more, sentence in ((["--fit", "150kB", "--keep", "4"], "leave one of them out"), ([], "or --fit 24GB")):
        failed = run("plan", *words, *more, "--force")
        assert failed.code == 2
        assert sentence in failed.err
