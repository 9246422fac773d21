"""NAEE: not all experts are equal (arXiv 2402.14800, ACL 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch

from conmoe.ops import plans
from conmoe.ops.skipping import skip_threshold
from conmoe.ops.subset_search import fewest_changes, routed_loss
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, UsageError, sample_tensors


@method("naee", paper="https://arxiv.org/abs/2402.14800", needs=("sample", "weights"), form="sliced")
def naee(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    tokens: Annotated[int, "tokens of the sample on which outputs are compared"] = 512,
    limit: Annotated[int, "try all sets of experts if there are no more; else so many exchanges in a row"] = 2000,
    skip: Annotated[bool, "also skip chosen experts of low gate at run time (needs --form shared)"] = False,
) -> LayerPlan:
    """Keep the set of experts with which the layer's own output changes least, drop the others.

    ``argmin over sets C of ||F(x) - F_C(x)||``, the Frobenius norm over tokens in float64; ``F_C`` is the layer whose
    router, by its own code, has only the experts ``C`` to choose from. All sets are tried if there are at most
    ``limit``, as the paper does for 8 experts. Beyond, where the paper does not go: remove experts greedily, then
    exchange a kept and a dropped one until none of the ``limit`` most promising exchanges helps.

    ``skip`` adds the paper's dynamic skipping: experts whose gate is below ``beta`` times the token's highest do not
    run, ``beta`` the median ratio of lowest to highest gate after pruning. Layers are planned on the original model's
    inputs (the paper's layer-wise variant) unless they are compressed one after the other. ``predicted_error`` is the
    squared loss over ``||F(x)||^2``, on these tokens. Experts that were set aside (protected, or of another router
    group) stay with the router, but what they add is not seen.
    """
    if tokens < 1 or limit < 0:
        raise UsageError("Option 'tokens' of 'naee' is at least 1, and 'limit' is not negative.")
    E = statistics.owner_E.numel()
    if keep == E:
        return plans.identity(keep)
    if experts.reroute is None:
        raise UsageError("'naee' asks the router of a layer what it would choose; plan each layer alone (--scope 1).")
    drawn = statistics.sample.priority_n.argsort(stable=True)[:tokens]
    sample = replace(
        statistics.sample, **{name: tensor[drawn] for name, tensor in sample_tensors(statistics.sample).items()}
    )
    loss = routed_loss(sample, experts, experts.reroute)
    kept = fewest_changes(loss, E, keep, limit, least=sample.index_nk.shape[1])
    plan = replace(plans.prune(torch.tensor(kept), E), predicted_error=loss(kept))
    if skip:
        _, weight_nk = experts.reroute(sample.hidden_nD, torch.tensor(kept))
        plan = replace(plan, skip=skip_threshold(weight_nk))
    return plan
