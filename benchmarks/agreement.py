"""Agreement with published code: the same model and tokens, which experts are kept or grouped, layer by layer.

    python benchmarks/agreement.py MODEL... [--peer-python PATH] [--reap-repo PATH] [--hc-smoe-repo PATH]

``--peer-python`` is the interpreter of another environment with llm-compressor installed (its REAP modifier);
``--reap-repo`` and ``--hc-smoe-repo`` are checkouts of github.com/CerebrasResearch/reap and
github.com/wazenmai/HC-SMoE, whose own functions score and cluster here. Each is left out if not given.

Everything runs on the checkpoint as it is stored, on a float32 copy, where sums differ by their order alone, and on a
copy whose router renormalises its gates where the source's does not. For kept sets a table shows the Jaccard index of
each layer, for groups the adjusted Rand index. Below it is how far the two scores (or distances) of an expert lie apart
at most, and for kept sets how far apart the scores on both sides of the cut are, both over the lowest score kept: sets
can only differ where twice the first exceeds the second. llm-compressor calibrates each layer on the pruned ones before
it unless told otherwise, which is our --sequential; in one shot we differ from it after the first layer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEQ_LEN = 256
Layers = dict[int, Tensor]


def peer(folder: Path, ids: Path, out: Path, keep: float, propagate: bool) -> None:
    """llm-compressor's REAP modifier: the experts it retains, and by which scores. Runs in its environment."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker
    from transformers import AutoModelForCausalLM

    scores, retain = [], REAPSaliencyTracker.compute_retained_experts

    def recorded(self: Any, *arguments: Any) -> Any:
        scores.append(self.mean_saliency.tolist())
        return retain(self, *arguments)

    REAPSaliencyTracker.compute_retained_experts = recorded
    rows = np.load(ids)
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        dataset=Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}),
        recipe=[REAPPruningModifier(sparsity=1 - keep, report_path=str(out.with_suffix(".report.json")))],
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
        propagate_error=propagate,
    )
    retained = json.loads(out.with_suffix(".report.json").read_text())
    names = sorted(retained, key=layer_of)
    layers = [
        {"layer": layer_of(name), "kept": retained[name], "score": score}
        for name, score in zip(names, scores, strict=True)
    ]
    out.write_text(json.dumps(layers))


def run_peer(python: str, folder: Path, ids: Path, work: Path, keep: float, propagate: bool) -> tuple[Layers, Layers]:
    out = work / f"peer-{propagate}.json"
    if out.exists():
        return read_peer(out)
    step = [python, __file__, "--step", str(folder.resolve()), str(ids), str(out), str(keep), str(int(propagate))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(step, cwd=work, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return read_peer(out)


def read_peer(out: Path) -> tuple[Layers, Layers]:
    layers = json.loads(out.read_text())
    return (
        {layer["layer"]: torch.tensor(layer["kept"]) for layer in layers},
        {layer["layer"]: torch.tensor(layer["score"]) for layer in layers},
    )


def layer_of(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdecimal())


class Ours:
    """What conmoe decides, by method: plans of one calibration, whose sample is all of its tokens."""

    def __init__(self, folder: Path, ids_NS: Tensor, work: Path, keep: float) -> None:
        import conmoe
        from conmoe.artifacts import read_layer
        from conmoe.data import SourceCount
        from conmoe.source import open_source, read_experts

        source = open_source(folder)
        self.experts = {layer.index: read_experts(source, layer) for layer in source.layers}
        self.folder, self.keep, self.statistics = folder, keep, work / "statistics"
        count = SourceCount("agreement", 1.0, len(ids_NS), 1)
        data = conmoe.TokenData(ids_NS, (count,), "agreement", ())
        conmoe.calibrate(folder, self.statistics, data, conmoe.Calibration(sample=ids_NS.numel()), force=True)
        self.read = lambda layer: read_layer(self.statistics, layer)

    def plans(self, method: str, sequential: bool = False) -> dict[int, Any]:
        """No expert is protected: the others do not protect any by default."""
        import conmoe

        request = conmoe.Request(method=method, keep=str(self.keep), protect=("none",), sequential=sequential)
        plan = conmoe.plan(self.folder, self.statistics, request=request)
        return {scope.layers[0]: scope.plan for scope in plan.scopes}

    def distances(self, method: str) -> Layers:
        """What the groups of a method are made from."""
        from conmoe.ops.similarity import logit_cosine, mean_output_distance

        if method == "m-smoe":
            return {index: 1 - logit_cosine(self.read(index).sums["logit_gram"]) for index in self.experts}
        return {index: mean_output_distance(self.read(index).sample, part) for index, part in self.experts.items()}


def activations(folder: Path, ids_NS: Tensor, batch: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(layer, outputs of every expert for every token, chosen experts, router logits), from Transformers' own model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    seen: dict[int, dict[str, Any]] = {}
    for name, experts in model.named_modules():
        if not hasattr(experts, "gate_up_proj"):
            continue
        index = layer_of(name)
        seen[index] = {"experts": experts}
        router = next(
            module
            for child, module in model.get_submodule(name.rpartition(".")[0]).named_children()
            if child in ("gate", "router")
        )
        router.register_forward_hook(lambda _, args, out, at=seen[index]: at.update(logits=out[0]))
        experts.register_forward_pre_hook(lambda _, args, at=seen[index]: at.update(x=args[0], chosen=args[1]))
    with torch.no_grad():
        for rows in ids_NS.split(batch):
            model(rows, logits_to_keep=1)
            for index, layer in seen.items():
                experts, x_TD, chosen_Tk, logits_TE = (layer[name] for name in ("experts", "x", "chosen", "logits"))
                every_T1 = torch.zeros(len(x_TD), 1, dtype=torch.int64)
                ones_T1 = torch.ones(len(x_TD), 1, dtype=x_TD.dtype)
                outputs = [experts(x_TD, every_T1 + e, ones_T1) for e in range(len(experts.gate_up_proj))]
                yield index, torch.stack(outputs), chosen_Tk, logits_TE


def reap_repo(folder: Path, ids_NS: Tensor, batch: int) -> dict[int, dict[str, Any]]:
    """The sums of the repository's observer, fed with these activations (its own hook is for Transformers 4)."""
    from reap.metrics import OnlineStatsTracker, get_distance_fn
    from reap.pruning_metrics import initialize_pruning_state, update_pruning_state

    renormalise = bool(json.loads((folder / "config.json").read_text()).get("norm_topk_prob"))
    state: dict[int, dict[str, Any]] = {}
    for layer, y_ETD, chosen_Tk, logits_TE in activations(folder, ids_NS, batch):
        E, _, D = y_ETD.shape
        if layer not in state:
            state[layer] = initialize_pruning_state(E) | {
                "characteristic_activation": OnlineStatsTracker((E, D)),
                "router_logit_similiarity": OnlineStatsTracker((E, E)),
            }
        prepared = update_pruning_state(
            state[layer],
            activations=y_ETD.float(),
            selected_experts=chosen_Tk,
            router_logits=logits_TE,
            num_experts=E,
            renormalize_router_weights=renormalise,
        )
        state[layer]["characteristic_activation"].update(y_ETD.float().mean(dim=1), prepared.num_tokens)
        columns = logits_TE.float().T
        cosine_EE = get_distance_fn("cosine")(columns.view(1, E, 1, -1), columns.view(1, 1, E, -1)).squeeze()
        state[layer]["router_logit_similiarity"].update(cosine_EE, prepared.num_tokens)
    return state


def compare_kept(plans: dict[int, Any], kept: Layers, score: Layers) -> list[dict[str, Any]]:
    rows = []
    for layer, plan in plans.items():
        ours, theirs = set(plan.mixing_KE.argmax(dim=1).tolist()), set(kept[layer].tolist())
        own_E, other_E = plan.scores["score"], score[layer].double()
        last, first = own_E.sort(descending=True).values[len(ours) - 1 :][:2].tolist()
        rows.append(
            {
                "layer": layer,
                "jaccard": len(ours & theirs) / len(ours | theirs),
                "equal": ours == theirs,
                "score_apart": float((own_E - other_E).abs().max()) / last,
                "cut_apart": (last - first) / last,
            }
        )
    return rows


def compare_groups(plans: dict[int, Any], labels: Layers, ours: Layers, theirs: Layers) -> list[dict[str, Any]]:
    rows = []
    for layer, plan in plans.items():
        rand = adjusted_rand(plan.assignment_E.tolist(), labels[layer].tolist())
        apart = float((ours[layer] - theirs[layer]).abs().max() / ours[layer].max())
        rows.append({"layer": layer, "adjusted_rand": rand, "equal": rand == 1.0, "distance_apart": apart})
    return rows


def adjusted_rand(one: list[int], other: list[int]) -> float:
    """Hubert and Arabie 1985: 1 for equal partitions, 0 on average for random ones."""
    table = np.zeros((max(one) + 1, max(other) + 1))
    np.add.at(table, (one, other), 1)
    pairs: Callable[[Any], float] = lambda counts: float((counts * (counts - 1) / 2).sum())  # noqa: E731
    both, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected, most = rows * columns / pairs(np.array([len(one)])), (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def variants(folder: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """The checkpoint, a float32 copy, and one whose router renormalises its gates, or not, unlike the source's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yield "as stored", folder
    model.save_pretrained(work / "float32")
    yield "float32", work / "float32"
    if hasattr(model.config, "norm_topk_prob"):
        model.config.norm_topk_prob = not model.config.norm_topk_prob
        model.save_pretrained(work / "flipped")
        yield f"float32, norm_topk_prob={model.config.norm_topk_prob}", work / "flipped"


def run(folder: Path, ids_NS: Tensor, given: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    ours = Ours(folder, ids_NS, work, given.keep)
    if given.peer_python:
        np.save(work / "ids.npy", ids_NS.numpy())
        for how, propagate, sequential in (
            ("propagate_error=False", False, False),
            ("its default, ours with sequential=True", True, True),
            ("its default, ours in one shot", True, False),
        ):
            kept, score = run_peer(given.peer_python, folder, work / "ids.npy", work, given.keep, propagate)
            yield result("reap", f"llm-compressor, {how}", compare_kept(ours.plans("reap", sequential), kept, score))
    if given.reap_repo:
        sys.path.insert(0, str(given.reap_repo / "src"))
        yield from run_reap_repo(folder, ids_NS, given, ours)
    if given.hc_smoe_repo:
        clustering = load(given.hc_smoe_repo / "hcsmoe" / "merging" / "clustering.py")
        total: Layers = {}
        for layer, y_ETD, _, _ in activations(folder, ids_NS, 8):
            total[layer] = total.get(layer, 0) + y_ETD.sum(dim=1, dtype=torch.float64) / ids_NS.numel()
        labels, plans = {}, ours.plans("hc-smoe")
        for layer, mean_ED in total.items():
            with contextlib.redirect_stdout(io.StringIO()):
                groups = len(plans[layer].mixing_KE)
                labels[layer] = clustering.hierarchical_clustering(mean_ED.float(), groups, "average")[0]
        distances = {layer: torch.cdist(mean_ED, mean_ED) for layer, mean_ED in total.items()}
        rows = compare_groups(plans, labels, ours.distances("hc-smoe"), distances)
        yield result("hc-smoe", "its authors' clustering", rows)


def run_reap_repo(folder: Path, ids_NS: Tensor, given: argparse.Namespace, ours: Ours) -> Iterator[dict[str, Any]]:
    from reap.cluster import hierarchical_clustering, mc_smoe_clustering
    from reap.metrics import get_distance_fn

    state, plans = reap_repo(folder, ids_NS, 8), ours.plans("reap")
    score = {layer: found["reap"].mean for layer, found in state.items()}
    kept = {layer: lowest_dropped(score_E, len(plans[layer].mixing_KE)) for layer, score_E in score.items()}
    yield result("reap", "REAP repository", compare_kept(plans, kept, score))

    plans, own = ours.plans("hc-smoe"), ours.distances("hc-smoe")
    distances = between(get_distance_fn("euclidean"), column(state, "characteristic_activation"))
    labels = {
        layer: torch.tensor(hierarchical_clustering(distance_EE.clone(), "average", len(plans[layer].mixing_KE)))
        for layer, distance_EE in distances.items()
    }
    rows = compare_groups(plans, labels, own, distances)
    yield result("hc-smoe", "REAP repository, Euclidean distance of mean outputs, average linkage", rows)

    plans, own = ours.plans("m-smoe"), ours.distances("m-smoe")
    whole = reap_repo(folder, ids_NS, len(ids_NS))
    cosine = column(state, "router_logit_similiarity")
    for how, distances in (
        ("cosine of all router logits", column(whole, "router_logit_similiarity")),
        ("mean of the cosines of batches of 8 sequences", cosine),
        ("cosine between rows of that, as its main.py does", between(get_distance_fn("cosine"), cosine)),
    ):
        labels = {}
        for layer, distance_EE in distances.items():
            probability = state[layer]["expert_frequency"] / state[layer]["total_tokens"]
            labels |= mc_smoe_clustering({layer: distance_EE}, {layer: probability}, len(plans[layer].mixing_KE))
        yield result("m-smoe", f"REAP repository, {how}", compare_groups(plans, labels, own, distances))


def column(state: dict[int, dict[str, Any]], name: str) -> Layers:
    return {layer: found[name].mean for layer, found in state.items()}


def between(distance: Callable[[Tensor, Tensor], Tensor], rows: Layers) -> Layers:
    return {layer: distance(row_EX.unsqueeze(0), row_EX.unsqueeze(1)) for layer, row_EX in rows.items()}


def lowest_dropped(score_E: Tensor, keep: int) -> Tensor:
    """What its prune.py leaves: the one line of it that can be called without a Transformers 4 model."""
    dropped = torch.topk(score_E, len(score_E) - keep, largest=False).indices
    return torch.tensor([expert for expert in range(len(score_E)) if expert not in dropped])


def result(method: str, other: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"method": method, "other": other, "layers": layers}


def load(file: Path) -> Any:
    """One file of a repository whose package cannot be imported here as a whole."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def show(entry: dict[str, Any]) -> None:
    print(f"{entry['model']}, {entry['variant']}: {entry['method']} and {entry['other']}")
    for name in entry["layers"][0]:
        print(f"    {name:<15}", *(f"{row[name]:>10.3g}" for row in entry["layers"]))


def versions(given: argparse.Namespace) -> dict[str, str]:
    """Which code was compared with: releases and commits."""
    asked = {"REAP repository": given.reap_repo, "HC-SMoE repository": given.hc_smoe_repo}
    commands = {name: ["git", "-C", str(path), "rev-parse", "HEAD"] for name, path in asked.items() if path}
    if given.peer_python:
        ask = (
            "from importlib.metadata import version as v; print(v('llmcompressor'), 'transformers', v('transformers'))"
        )
        commands["llm-compressor"] = [given.peer_python, "-c", ask]
    return {
        name: subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        for name, command in commands.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--data", action="append", help="text, as conmoe calibrate takes it")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--peer-python")
    parser.add_argument("--reap-repo", type=Path)
    parser.add_argument("--hc-smoe-repo", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        folder, ids, out, keep, propagate = given.step
        peer(Path(folder), Path(ids), Path(out), float(keep), bool(int(propagate)))
        return

    from conmoe.data import BUILTIN_NAME, load_tokenizer, load_tokens, parse_spec

    entries = []
    for model in given.models:
        specs = [parse_spec(text) for text in given.data or [BUILTIN_NAME]]
        tokens = load_tokens(load_tokenizer(model), specs, tokens=given.tokens, seq_len=SEQ_LEN)
        with tempfile.TemporaryDirectory() as temporary:
            for variant, folder in variants(model, Path(temporary)):
                work = Path(temporary) / f"work {variant}"
                work.mkdir()
                for entry in run(folder, tokens.ids_NS, given, work):
                    entries.append({"model": model.name, "variant": variant, **entry})
                    show(entries[-1])
    if given.output:
        names = [Path(text).name for text in given.data or [BUILTIN_NAME]]
        head = {"tokens": given.tokens, "sequence": SEQ_LEN, "keep": given.keep, "data": names}
        head["with"] = versions(given)
        given.output.write_text(json.dumps({**head, "comparisons": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
