"""Which layers are planned, how many experts each keeps, and the search for it."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache

import pytest
import torch

import conmoe
from conmoe.allocate import parse_counts, spread
from conmoe.artifacts import read_layer, read_tokens
from conmoe.budgets.evoesap import MEASURED, _remembered, esap, overlap
from conmoe.observe import IMPLEMENTATION
from conmoe.preview import preview
from conmoe.search import Space, apportion, evolve, first_population, mutate
from conmoe.source import open_source
from conmoe.stream import open_stream
from conmoe.types import Plan
from tests.commands import runner, write_text
from tests.conftest import token_data
from tests.families import EXPERTS, TOP_K, save_tiny
from tests.results import by_layer, config_of, load, logits, silenced

LAYERS = 4
TOTAL = LAYERS * EXPERTS // 2
RANKED = ["global", "dominant"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("olmoe", tmp_path_factory.mktemp("budgets") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def statistics(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets") / "statistics"
    conmoe.calibrate(model, folder, token_data(6), conmoe.Calibration(sample=64))
    return folder


@pytest.fixture
def planned(model, statistics):
    def plan(out=None, progress=None, **request) -> Plan:
        more = {} if progress is None else {"progress": progress}
        return conmoe.plan(model, statistics, out, conmoe.Request(**request), **more)

    return plan


def sizes(plan: Plan) -> list[int]:
    return [len(scope.plan.mixing_KE) for scope in plan.scopes]


class Heard:
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.done, self.total = [], {}, {}

    def stage(self, name, total, unit):
        self.total[name], self.done[name] = total, 0
        self._name = name
        return self

    def __enter__(self):
        name = self._name

        def advance(done, total=None):
            self.done[name] += done

        return advance

    def __exit__(self, *error):
        return None

    def note(self, text):
        self.notes.append(text)


# Layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("1-2", [1, 2]), ("3", [3]), (" 0 , 2-3", [0, 2, 3]), ("2-3,1-2", [1, 2, 3]), ("", [0, 1, 2, 3])],
)
def test_only_the_layers_that_are_named_are_planned(layers, chosen, planned):
    plan = planned(method="conmoe", layers=layers, keep="3")
    assert list(by_layer(plan)) == chosen
    assert sizes(plan) == [3] * len(chosen)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ("4", "no experts there; layers with experts lie between 0 and 3"),
        ("2-4", "no experts beyond layer 3"),
        ("2-1", "ends before it begins"),
        ("1;2", "takes numbers and ranges"),
        ("-1", "takes numbers and ranges"),
        ("1-", "takes numbers and ranges"),
        (",", "takes numbers and ranges"),
    ],
)
def test_layers_that_cannot_be_planned_are_refused(layers, sentence, planned):
    with pytest.raises(conmoe.UsageError, match=sentence) as caught:
        planned(layers=layers)
    assert "\n" not in str(caught.value)


def test_a_range_may_hold_dense_layers_but_not_only_those(checkpoint, calibrated):
    assert [layer.index for layer in open_source(checkpoint("glm4_moe")).layers] == [1, 2]

    def plan(layers):
        request = conmoe.Request(layers=layers)
        return conmoe.plan(checkpoint("glm4_moe"), calibrated("glm4_moe"), None, request)

    assert list(by_layer(plan("0-1"))) == [1]
    with pytest.raises(conmoe.UsageError, match=r"--layers 0: no experts there; .* between 1 and 2"):
        plan("0")


def test_layers_that_are_not_neighbours_share_no_pool(planned):
    plan = planned(layers="0,2-3", scope=2, keep="50%")
    assert [scope.layers for scope in plan.scopes] == [(0,), (2, 3)]
    assert sizes(plan) == [4, 8]


def test_layers_that_are_not_planned_stay_as_they_are(model, planned, tmp_path):
    heard = Heard()
    plan = planned(method="reap", layers="1-2", keep="6", progress=heard)
    assert plan.default_form == "shared"
    assert any("shared form" in note for note in heard.notes)
    assert heard.done["plan"] == heard.total["plan"] == 2
    conmoe.apply(model, plan, tmp_path / "out")
    conmoe.verify(tmp_path / "out", model, plan, "shared")
    dropped = {
        index: (by_layer(plan)[index].assignment_E < 0).nonzero().flatten().tolist() if index in (1, 2) else []
        for index in range(LAYERS)
    }
    stock = load(model)
    with silenced(stock, dropped):
        torch.testing.assert_close(logits(load(tmp_path / "out")), logits(stock), rtol=1e-4, atol=1e-4)


def test_protected_experts_are_those_of_the_layers_that_are_planned(planned):
    assert planned(layers="1", protect=("0:1", "1:3")).protected == {1: (3,)}


# Counts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reap", "conmoe"])
def test_listed_counts_are_kept(method, planned):
    plan = planned(method=method, budget="2, 8,3,5")
    assert sizes(plan) == [2, 8, 3, 5]
    assert (plan.budget, plan.keep, plan.default_form) == ("2, 8,3,5", "0.5625", "shared")
    assert planned(method="reap", budget="5,5,5,5").default_form == "sliced"
    assert sizes(planned(budget="5,7", scope=2)) == [5, 7]
    assert sizes(planned(budget="3", layers="2")) == [3]
    assert sizes(planned(budget="2,2,2,2", keep="25%")) == [2] * 4
    assert sizes(planned(budget="8,8,8,8")) == [8] * 4


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"budget": "4,4"}, "lists 2 counts for 4 layers"),
        ({"budget": "4,4,4", "scope": 2}, "lists 3 counts for 2 scopes"),
        ({"budget": "4,4,9,4"}, "asks for 9 experts in layer 2, which takes 1 to 8"),
        ({"budget": "4,4,0,4"}, "asks for 0 experts in layer 2"),
        ({"budget": "4,4,4,4", "keep": "5"}, "adds up to 16 experts and --keep 5 to 20"),
        ({"budget": "4,4,1,4", "method": "reap"}, "--budget 4,4,1,4 leaves 1 experts, but every token goes to 2"),
        ({"budget": "4,4,5,4", "form": "sliced"}, "'4,4,5,4' lets layers keep different numbers"),
        ({"budget": "global", "form": "sliced"}, "'global' lets layers keep .*--budget uniform"),
        ({"method": "m-smoe", "form": "sliced"}, "'dominant' lets layers keep"),
        ({"layers": "0-2", "form": "sliced"}, "so --layers cannot leave any out"),
        ({"budget": "dominent"}, "no budget 'dominent'; did you mean 'dominant'"),
        ({"budget": "global", "budget_options": {"scor": "x"}}, "no option of global 'scor'; did you mean 'score'"),
        ({"budget": "4,4,4,4", "budget_options": {"seed": "1"}}, "no option of 4,4,4,4 'seed'"),
        ({"method": "reap", "budget": "dominant", "keep": "1"}, "leaves 1 experts, but every token goes to 2"),
        (
            {"budget": "dominant", "keep": "1", "protect": ("0:0", "0:1", "0:2", "0:3")},
            "leaves 4 experts, and the 4 layers or scopes need 8",
        ),
    ],
)
def test_a_budget_that_cannot_be_met_gets_one_sentence_and_no_folder(request_, sentence, planned, tmp_path):
    with pytest.raises(conmoe.UsageError, match=sentence) as caught:
        planned(tmp_path / "plan", **request_)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_counts_and_names_are_told_apart():
    assert parse_counts(" 12, 3 ,4") == (12, 3, 4)
    assert parse_counts("7") == (7,)
    assert parse_counts("global") == parse_counts("") == parse_counts("1,2,") == parse_counts("1.5") == ()


def test_groups_of_a_router_keep_equally_many_whatever_the_budget(checkpoint, calibrated):
    def plan(**asked):
        request = conmoe.Request(method="reap", **asked)
        return conmoe.plan(checkpoint("glm4_moe"), calibrated("glm4_moe"), None, request)

    assert sizes(plan(budget="4,6")) == [4, 6]
    with pytest.raises(conmoe.UsageError, match="must be a multiple of 2, not 5"):
        plan(budget="4,5")
    for budget in ("dominant", "global"):
        counts = sizes(plan(budget=budget, keep="6"))
        assert sum(counts) == 12
        assert all(count in (4, 6, 8) for count in counts)


@pytest.mark.parametrize("budget", RANKED)
@pytest.mark.parametrize(("method", "floor"), [("reap", TOP_K), ("conmoe", 1), ("m-smoe", 1)])
def test_a_ranked_budget_spends_all_it_has_within_bounds(budget, method, floor, planned):
    for keep in ("25%", "50%", "0.8", "100%"):
        plan = planned(method=method, budget=budget, keep=keep)
        assert sum(sizes(plan)) == sum(sizes(planned(method=method, budget="uniform", keep=keep)))
        assert all(floor <= count <= EXPERTS for count in sizes(plan))
        assert plan.budget == budget
        if keep == "100%":
            assert sizes(plan) == [EXPERTS] * LAYERS


def test_a_ragged_plan_says_so_is_stored_shared_and_read_again(model, planned, tmp_path):
    heard = Heard()
    plan = planned(tmp_path / "plan", heard, method="reap", budget="dominant", keep="0.6")
    assert len(set(sizes(plan))) > 1
    assert plan.default_form == "shared"
    assert heard.notes == ["Not all layers keep equally many experts, so the result will be stored in the shared form."]
    read = conmoe.read_plan(tmp_path / "plan")
    assert (read.budget, sizes(read), read.default_form) == ("dominant", sizes(plan), "shared")
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert record["budget"] == "dominant"
    assert [scope["prototypes"] for scope in record["scopes"]] == sizes(plan)
    assert not list((tmp_path / "plan").glob("layer-*"))
    conmoe.apply(model, read, tmp_path / "out")
    conmoe.verify(tmp_path / "out", model, read, "shared")
    assert config_of(tmp_path / "out")["model_type"] == "conmoe_olmoe"
    with pytest.raises(conmoe.UsageError, match="one number of experts for all layers"):
        conmoe.apply(model, read, tmp_path / "sliced", form="sliced")


@pytest.mark.parametrize("over", ["most", "all"])
@pytest.mark.parametrize("keep", range(2, EXPERTS))
def test_dominant_is_the_papers_rule(keep, over, planned, statistics):
    """M-SMoE, section 3: frequencies over the layer's highest, the global top B, at least one in each layer.

    In the authors' code, frequencies are shares of all uses but for the highest, which is 1.
    """
    counts = [read_layer(statistics, layer).sums["count"].tolist() for layer in range(LAYERS)]
    everyone = [
        (1.0 if uses == max(layer) else uses / (max(layer) if over == "most" else sum(layer)), -index, -expert)
        for index, layer in enumerate(counts)
        for expert, uses in enumerate(layer)
    ]
    kept = [0] * LAYERS
    for _, index, _ in sorted(everyone, reverse=True)[: keep * LAYERS]:
        kept[-index] += 1
    assert min(kept) >= 1
    plan = planned(method="m-smoe", keep=str(keep), budget_options={"over": over})
    assert plan.budget == "dominant"
    assert sizes(plan) == kept


def test_global_keeps_the_highest_shares_of_all_layers(planned, statistics):
    """With REAP's score, and the two that every router needs of each layer."""
    shares = {}
    for layer in range(LAYERS):
        sums = read_layer(statistics, layer).sums
        scores = (sums["gate_norm"].double() / sums["count"].clamp_min(1)).tolist()
        ranked = sorted(scores, reverse=True)
        shares |= {(layer, rank): score / sum(scores) for rank, score in enumerate(ranked)}
    for keep in (2, 3, 5, 7):
        kept = {(layer, rank) for layer in range(LAYERS) for rank in range(TOP_K)}
        for place in sorted(shares, key=lambda place: -shares[place]):
            if len(kept) < keep * LAYERS:
                kept.add(place)
        plan = planned(method="reap", budget="global", keep=str(keep))
        assert sizes(plan) == [sum(layer == own for own, _ in kept) for layer in range(LAYERS)]


def test_global_takes_the_score_it_is_told_and_names_those_there_are(planned):
    by_default = planned(method="conmoe", budget="global")
    told = planned(method="conmoe", budget="global", budget_options={"score": "contribution"})
    assert sizes(by_default) == sizes(told)
    with pytest.raises(conmoe.UsageError, match="reports only contribution, replaceability"):
        planned(method="conmoe", budget="global", budget_options={"score": "luck"})
    with pytest.raises(conmoe.UsageError, match="'random' reports no score of experts"):
        planned(method="random", budget="global")


def test_global_counts_protected_experts_as_kept(planned):
    protect = tuple(f"2:{expert}" for expert in range(6))
    plan = planned(method="reap", budget="global", protect=protect)
    assert sum(sizes(plan)) == TOTAL
    assert sizes(plan)[2] >= 7
    assert plan.protected == {2: tuple(range(6))}
    everyone = tuple(f"2:{expert}" for expert in range(EXPERTS))
    assert sizes(planned(method="reap", budget="global", protect=everyone))[2] == EXPERTS


def test_spread_is_the_best_choice_there_is():
    """Brute force over all counts: the kept experts of no other are worth more."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        value = [torch.rand(size, generator=generator, dtype=torch.float64) for size in (4, 3, 5)]
        ranked = [sorted(each.tolist(), reverse=True) for each in value]
        floor, cap, total = [1, 0, 2], [4, 3, 5], int(torch.randint(3, 13, (), generator=generator))

        def worth(counts, ranked=ranked):
            return sum(sum(own[:count]) for own, count in zip(ranked, counts, strict=True))

        ranges = [range(low, high + 1) for low, high in zip(floor, cap, strict=True)]
        best = max((counts for counts in itertools.product(*ranges) if sum(counts) == total), key=worth)
        assert spread(value, total, floor, cap) == list(best)


def test_spread_breaks_ties_to_the_earlier_scope_and_steps():
    even = [torch.ones(4)] * 3
    assert spread(even, 7, [1, 1, 1], [4, 4, 4]) == [4, 2, 1]
    assert spread(even, 8, [2, 2, 2], [4, 4, 4], step=2) == [4, 2, 2]
    assert spread([torch.ones(4), torch.tensor([torch.inf] * 4)], 4, [0, 0], [4, 4]) == [0, 4]


# Search -------------------------------------------------------------------------------------------------------------

SPACE = Space((1, 1, 1, 1), (8, 8, 8, 8), 16)


def inside(counts, space):
    return sum(counts) == space.total and all(
        low <= count <= high and (count - low) % space.step == 0
        for low, count, high in zip(space.floor, counts, space.cap, strict=True)
    )


def test_apportion_gives_everything_in_proportion():
    assert apportion([1, 1, 2], [9, 9, 9], 8) == [2, 2, 4]
    assert apportion([1, 1, 1], [9, 9, 9], 2) == [1, 1, 0]  # ties to the lower index
    assert apportion([0.3, 0.5, 0.2], [9, 9, 9], 4) == [1, 2, 1]  # 1.2, 2.0, 0.8: the largest remainder
    assert apportion([9, 1, 1], [2, 9, 9], 8) == [2, 3, 3]
    assert apportion([0, 0, 0], [3, 3, 3], 6) == [2, 2, 2]
    assert apportion([1, 2], [1, 1], 9) == [1, 1]


@pytest.mark.parametrize(
    "space", [SPACE, Space((2, 4), (8, 8), 12, 2), Space((1,), (8,), 4), Space((0, 3, 1), (1, 8, 3), 11)]
)
def test_candidates_stay_in_the_space(space):
    generator = torch.Generator().manual_seed(0)
    even = space.keeping([1.0] * len(space.cap))
    population = first_population(space, 20, even, generator)
    assert population[0] == even
    assert len(set(population)) == len(population) <= 20
    for _ in range(200):
        parent = population[int(torch.randint(len(population), (), generator=generator))]
        child = mutate(parent, space, generator)
        assert inside(parent, space)
        assert inside(child, space)
        population.append(child)


def test_a_mutation_moves_a_little():
    generator = torch.Generator().manual_seed(1)
    start = (4, 4, 4, 4)
    moved = [
        sum(abs(a - b) for a, b in zip(mutate(start, SPACE, generator), start, strict=True)) // 2 for _ in range(400)
    ]
    assert max(moved) <= 12
    assert sum(moved) / len(moved) < 4  # most mutations are one transfer
    assert moved.count(0) < 20


def test_a_search_finds_what_all_candidates_can_prove_best():
    def fitness(counts):
        return -sum((count - wanted) ** 2 for count, wanted in zip(counts, (2, 7, 3, 4), strict=True))

    asked = []

    def counted(counts):
        asked.append(counts)
        return fitness(counts)

    advanced = []
    generator = torch.Generator().manual_seed(0)
    first = first_population(SPACE, 12, (4, 4, 4, 4), generator)
    best = evolve(
        first, SPACE, counted, size=12, generations=40, elites=4, generator=generator, advance=advanced.append
    )
    assert best == (2, 7, 3, 4)
    assert len(asked) == len(set(asked))
    assert sum(advanced) == 12 + 39 * 8
    every = [c for c in itertools.product(range(1, 9), repeat=4) if sum(c) == 16]
    assert best == max(every, key=fitness)


def test_a_search_never_loses_its_best():
    """Also when nothing that it tries is better than the beginning."""

    @cache
    def fitness(counts):
        return float(counts == (4, 4, 4, 4))

    first = first_population(SPACE, 6, (4, 4, 4, 4), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert evolve(first, SPACE, fitness, size=6, generations=5, elites=1, generator=generator) == (4, 4, 4, 4)


# EvoESAP ------------------------------------------------------------------------------------------------------------

SMALL = {"sequences": "2", "population": "5", "generations": "3", "elites": "2"}


def test_overlap_is_the_shared_probability():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 7, 50, generator=generator)
    expected = torch.minimum(one.softmax(-1), other.softmax(-1)).sum(-1)
    torch.testing.assert_close(overlap(one, other), expected)
    assert torch.equal(overlap(one, one), torch.ones(7))
    apart = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert overlap(apart[:1], apart[1:]).tolist() == [0.0]
    assert bool(((overlap(one * 9, other * 9) >= 0) & (overlap(one * 9, other * 9) <= 1)).all())


def test_esap_is_that_of_the_whole_models(model, statistics, planned):
    """Against the two models as Transformers runs them, token by token."""
    ids = read_tokens(statistics)[:3]
    plan = planned(method="reap", budget="2,6,3,5")
    source = open_source(model, experts_implementation=IMPLEMENTATION)
    made = preview(source, plan, "shared", experts_implementation=IMPLEMENTATION)
    whole = preview(source, planned(keep="8"), "shared", experts_implementation=IMPLEMENTATION)
    with open_stream(source, ids) as one, open_stream(made, ids) as other, open_stream(whole, ids) as same:
        for stream in (one, other, same):
            stream.run()
        found, itself = esap(one, other), esap(one, same)
    assert itself == 1.0
    stock = load(model)
    dropped = {index: (part.assignment_E < 0).nonzero().flatten().tolist() for index, part in by_layer(plan).items()}
    p_NSV = logits(stock, ids).softmax(-1)
    with silenced(stock, dropped):
        q_NSV = logits(stock, ids).softmax(-1)
    assert found == pytest.approx(float(torch.minimum(p_NSV, q_NSV).sum(-1).mean()), abs=1e-4)
    assert 0 < found < 1


@pytest.mark.parametrize("method", ["reap", "conmoe"])
def test_evoesap_finds_at_least_the_best_it_begins_with(method, planned, tmp_path):
    heard = Heard()
    plan = planned(tmp_path / "plan", heard, method=method, budget="evoesap", budget_options=SMALL, keep="0.5")
    assert sum(sizes(plan)) == TOTAL
    assert plan.budget_options == {"sequences": 2, "population": 5, "generations": 3, "elites": 2, "seed": 0}
    assert heard.done["search"] == heard.total["search"] == 5 + 2 * 3
    assert heard.notes[0].startswith("ESAP 0.")
    measured = json.loads((tmp_path / "plan" / MEASURED).read_text())
    assert all(0 <= value <= 1 for value in measured.values())
    assert len(measured) > 5
    found = measured[",".join(map(str, sizes(plan)))]
    assert found == max(measured.values())
    assert found >= measured["4,4,4,4"]
    again = planned(method=method, budget="evoesap", budget_options=SMALL, keep="0.5")
    assert sizes(again) == sizes(plan)


def test_a_fitness_that_is_no_number_is_not_measured_again(tmp_path):
    asked = []

    def fitness(counts):
        asked.append(counts)
        return math.nan

    for _ in range(2):
        assert math.isnan(_remembered(fitness, tmp_path)((4, 4)))
    assert len(asked) == 1


def test_evoesap_works_around_protected_experts_and_in_scopes(planned):
    small = {"sequences": "1", "population": "4", "generations": "2", "elites": "2"}
    protect = tuple(f"2:{expert}" for expert in range(6))
    plan = planned(method="reap", budget="evoesap", budget_options=small, protect=protect)
    assert sum(sizes(plan)) == TOTAL
    assert sizes(plan)[2] >= 7
    plan = planned(method="conmoe", budget="evoesap", budget_options=small, scope=2, keep="25%")
    assert sum(sizes(plan)) == TOTAL // 2
    assert [scope.layers for scope in plan.scopes] == [(0, 1), (2, 3)]


def test_a_killed_search_goes_on(planned, tmp_path):
    class Killed(BaseException):
        pass

    class Deadly(Heard):
        def __enter__(self):
            advance = super().__enter__()

            def mortal(done, total=None):
                advance(done)
                if self.done.get("search") == 4:
                    raise Killed

            return mortal

    request = {"method": "reap", "budget": "evoesap", "budget_options": SMALL}
    with pytest.raises(Killed):
        planned(tmp_path / "plan", Deadly(), **request)
    file = tmp_path / "plan.partial" / MEASURED
    half = json.loads(file.read_text())
    assert len(half) == 4
    file.write_text(
        json.dumps({name: value + 1e-9 for name, value in half.items()})
    )  # marks what is not measured again
    resumed = planned(tmp_path / "plan", **request)
    measured = json.loads((tmp_path / "plan" / MEASURED).read_text())
    assert {name: measured[name] - 1e-9 for name in half} == pytest.approx(half, abs=1e-15)
    whole = planned(tmp_path / "whole", **request)
    assert sizes(resumed) == sizes(whole)
    assert set(measured) == set(json.loads((tmp_path / "whole" / MEASURED).read_text()))


def test_an_unsearchable_search_is_refused(planned):
    for options in ({"elites": "9", "population": "8"}, {"generations": "0"}, {"sequences": "0"}):
        with pytest.raises(conmoe.UsageError, match="evoesap takes at least one"):
            planned(method="reap", budget="evoesap", budget_options=options)


# Command line -------------------------------------------------------------------------------------------------------


def test_budgets_and_layers_on_the_command_line(model, statistics, tmp_path, capsys):
    run = runner(capsys)
    options = ["--budget", "evoesap"]
    for name, value in SMALL.items():
        options += ["--budget-option", f"{name}={value}"]
    done = run("plan", model, statistics, tmp_path / "plan", "--method", "reap", "--keep", "4", *options)
    assert done.code == 0
    assert "ESAP" in done.err
    assert sum(sizes(conmoe.read_plan(tmp_path / "plan"))) == TOTAL
    listed = run("plan", model, statistics, tmp_path / "listed", "--layers", "0,2", "--budget", "3,5")
    assert listed.code == 0
    assert sizes(conmoe.read_plan(tmp_path / "listed")) == [3, 5]
    for words, sentence in (
        (["--budget", "dominant"], "Missing option '--keep'"),
        (["--budget", "2,2,2"], "lists 3 counts for 4 layers"),
        (["--keep", "4", "--budget-option", "seed"], "--budget-option takes NAME=VALUE, not 'seed'"),
        (["--keep", "4", "--layers", "7"], "no experts there"),
    ):
        failed = run("plan", model, statistics, tmp_path / "none", *words)
        assert failed.code == 2
        assert sentence in failed.err


def test_compress_takes_a_budget(model, tmp_path, capsys):
    text = write_text(tmp_path)
    words = [
        "--method",
        "reap",
        "--refine",
        "none",
        "--layers",
        "1-3",
        "--budget",
        "dominant",
        "--keep",
        "0.6",
        "--json",
    ]
    small = ["--data", text, "--tokens", "256", "--seq-len", "32", "--eval-tokens", "128", "--sample", "64"]
    done = runner(capsys)("compress", model, tmp_path / "out", *words, *small)
    assert done.code == 0, done.err
    assert (done.json["budget"], done.json["form"]) == ("dominant", "shared")
    plan = conmoe.read_plan(tmp_path / "out" / "conmoe")
    assert list(by_layer(plan)) == [1, 2, 3]
    assert sum(sizes(plan)) == 15
    assert not (tmp_path / "out.work").exists()


def test_budgets_are_listed(capsys):
    run = runner(capsys)
    assert {"uniform", "global", "dominant", "evoesap"} <= set(run("budgets", "--json").json)
    shown = run("budgets").out
    assert all(name in shown for name in conmoe.budgets())
    assert "--budget-option generations=50" in shown
