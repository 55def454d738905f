"""From a frozen run to a graph, within budgets.

1. The targets are traced once, along all paths. Of branches that no coder replaces, the units with the largest
   effects become nodes, "heads": channels of mixers and attention heads at their sources, neurons, experts. All others
   remain part of the paths through them, so that sums are preserved.
2. The targets are traced again, paths now ending at these heads; so are the heads.
3. The features found with the largest influence are traced, a batch at a time, until the budget is spent. What the
   others add is reported as each row's remainder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from circuits.attribution import attribute
from circuits.effect_rows import EffectRows
from circuits.frozen_model import FrozenModel
from circuits.graph import Graph, Node
from circuits.influence import influence
from circuits.keep import Keep
from circuits.row_nodes import ENDS, RowNodes
from circuits.targets import Feature, Logit, Target, Unit, chosen_targets
from hooked_mamba.frozen.places import Part, branch_of, in_order


def build_graph(
    frozen: FrozenModel,
    targets: Target | Sequence[Any],
    *,
    max_features: int = 500,
    max_heads: int = 100,
    keep: Keep | None = None,
    batch: int = 64,
    offload: str | Path | None = None,
    importance: Sequence[float | int] | None = None,
    verbose: bool = False,
) -> Graph:
    """The graph of one prompt.

    Parameters
    ----------
    frozen
        A run of one row, with the coders that it is read through.
    targets
        What the graph explains.
    max_features, max_heads
        How many features are traced, and how many heads (of branches that no coder replaces) are nodes.
    keep
        Exactly which are nodes instead, such as `node_effects(...).largest(200)`.
    batch
        Covectors that go down together.
    offload
        A folder for rows of effects, which are in memory otherwise: each has a number for every embedding, error,
        active feature and chosen head.
    importance
        Of the targets; None: probabilities of logit targets, else equal.
    verbose
        Show progress.

    Raises
    ------
    ValueError
        More than one row, or no target.
    MemoryError
        The rows of effects would not fit; says what to lower.
    """
    if frozen.batch != 1:
        raise ValueError(f"a graph is of one prompt, this run has {frozen.batch}: build one for each row")
    chosen = chosen_targets(targets)
    weight = _importance(frozen, chosen, importance)
    if keep is not None and any(m.dtype != torch.bool for part in (keep.heads, keep.features) for m in part.values()):
        raise ValueError("keep must be masks of True and False, one entry for each head and feature")
    heads: dict[Part, Tensor]
    if keep is None:
        heads = _choose_heads(frozen, chosen, weight, max_heads, batch)
    else:
        heads = {i: mask.to(frozen.dtype) for i, mask in keep.heads.items() if bool(mask.any())}
        max_features = sum(int(mask.sum()) for mask in keep.features.values())
        max_heads = len(keep) - max_features
    columns = RowNodes(frozen, heads)
    rows = EffectRows(len(columns), max_features + max_heads, frozen.dtype, offload)

    def trace(wanted: Sequence[Any]) -> tuple[Tensor, Tensor]:
        found = attribute(frozen, targets=wanted, keep_heads=False, nodes=heads, batch=batch)
        return RowNodes.rows(found).cpu(), found.target.cpu()  # a graph is no work for an accelerator

    effects, values = trace(chosen)
    head_places = columns.of_kind("head")
    # More at once than go down together: those that start close together can then be found among them.
    for start in range(0, len(head_places), 4 * batch):
        here = [columns[i] for i in head_places[start : start + 4 * batch]]
        found = trace([Unit(node.part, node.index, node.position) for node in here])
        rows.add(head_places[start : start + 4 * batch], *found)
    places = columns.of_kind("feature")
    if keep is not None:
        places = [i for i in places if keep.features[(at := columns[i]).part][at.position, at.index]]
    candidates = torch.tensor(places, dtype=torch.long)
    bar = tqdm(total=min(max_features, len(candidates)), desc="features", disable=not (verbose and places))
    # Few at a time while the budget is small: what is behind a feature is seen only once the feature is traced.
    step = batch if keep is not None else min(batch, max(1, max_features // 8))
    traced = 0
    while traced < max_features and len(candidates):
        reach = rows.reach(effects, weight)[candidates]
        order = reach.argsort(descending=True, stable=True)[: min(step, max_features - traced)]
        order = order if keep is not None else order[reach[order] > 0]
        best = candidates[order].tolist()
        if not best:
            break
        features = [
            Feature(frozen.coded[node.part].coder, node.index, node.position) for node in (columns[i] for i in best)
        ]
        rows.add(best, *trace(features))
        left = torch.ones(len(candidates), dtype=torch.bool)
        left[order] = False
        candidates = candidates[left]
        traced += len(best)
        bar.update(len(best))
    bar.close()
    graph = _assemble(frozen, chosen, weight, columns, effects, values, rows)
    asked_for = graph.where("target", "embed") if keep is None else graph.where("target", "embed", "feature", "head")
    # Ends that add to nothing only crowd the picture.
    return graph.keep(asked_for | (graph.weights != 0).any(0) | (influence(graph) > 0))


def _importance(frozen: FrozenModel, targets: list[Any], given: Sequence[float | int] | None) -> Tensor:
    if given is not None:
        if len(given) != len(targets) or min(given) < 0 or sum(given) <= 0:
            raise ValueError(f"importance must be {len(targets)} numbers, none negative, got {list(given)}")
        weight = torch.tensor(list(given), dtype=frozen.dtype)
    elif all(isinstance(t, Logit) and t.minus is None for t in targets):
        at = [frozen.logits_at(0, frozen.column(t.position, 0)).softmax(-1) for t in targets]
        weight = torch.stack([p[frozen.token_id(t.token)] for p, t in zip(at, targets, strict=True)])
    else:
        weight = torch.ones(len(targets), dtype=frozen.dtype)
    return (weight / weight.sum()).cpu()


def _choose_heads(
    frozen: FrozenModel, targets: list[Any], weight: Tensor, count: int, batch: int
) -> dict[Part, Float[Tensor, "l E"]]:
    """Part -> 1 at the heads that become nodes."""
    layers = frozen.open_parts()
    if not layers or count < 1:
        return {}
    found = attribute(frozen, targets=targets, batch=batch)
    given = {part: branch_of(part)[1] for i in range(frozen.n_layers) for part in frozen.given_parts(i)}
    of_layer = {i: found.token_heads[i] if i in frozen.coded else found.heads[i] for i in layers if i not in given}
    units = {i: frozen.chain(i).by_unit(effects, found.rows) for i, effects in of_layer.items()}
    units |= {i: found.carried[name].unsqueeze(-1) for i, name in given.items() if name in found.carried}
    layers = [i for i in layers if i in units]
    if not layers:
        return {}
    weight = weight.to(found.target.device)
    size = [torch.einsum("n,nle->le", weight, units[i].abs()) for i in layers]
    sizes = torch.cat([part.flatten() for part in size])
    best = sizes.topk(min(count, int((sizes > 0).sum()))).indices
    mask = torch.zeros_like(sizes)
    mask[best] = 1
    pieces = mask.split([part.numel() for part in size])
    masks = {i: piece.reshape(part.shape) for i, piece, part in zip(layers, pieces, size, strict=True)}
    return {i: mask for i, mask in masks.items() if bool(mask.any())}


def _assemble(
    frozen: FrozenModel,
    targets: list[Any],
    weight: Tensor,
    columns: RowNodes,
    effects: Tensor,
    values: Tensor,
    rows: EffectRows,
) -> Graph:
    ends = [i for kind in ENDS for i in columns.of_kind(kind)]
    kept = sorted([*rows.places, *ends])
    top, values_of = frozen.n_layers, dict(zip(rows.places, rows.values, strict=True))
    first = [
        Node("target", top, frozen.column(t.position, 0), i, float(value), name=t.label)
        for i, (t, value) in enumerate(zip(targets, values, strict=True))
    ]
    inner = [replace(node, value=values_of.get(i, node.value)) for i, node in ((i, columns[i]) for i in kept)]
    n = len(first) + len(inner)
    weights, remainder = effects.new_zeros(n, n), effects.new_zeros(n)
    left_out = torch.ones(len(columns), dtype=torch.bool)
    left_out[kept] = False
    place_of = {column: len(first) + place for place, column in enumerate(kept)}
    all_rows = [(list(range(len(first))), effects)]
    all_rows += [([place_of[i] for i in places], block) for places, block in rows.blocks()]
    for places, block in all_rows:
        at = torch.tensor(places, dtype=torch.long)
        weights[at, len(first) :] = block[:, kept]
        remainder[at] = (block * left_out).sum(1)
        if frozen.rule.name == "gradient":  # first-order effects do not sum: what they miss is reported
            whole = torch.tensor([(*first, *inner)[place].value for place in places], dtype=weights.dtype)
            remainder[at] = whole - weights[at].sum(1)
    importance = torch.cat([weight.to(effects.dtype), effects.new_zeros(len(inner))])
    tokens = tuple(frozen.words)
    about = {
        "model": _plain(frozen.model.cfg.to_dict()),
        "tokens": frozen.tokens[0].tolist(),
        "targets": [_token_of(frozen, target) for target in targets],
        "selection": frozen.rule.name,
        "shares": list(frozen.rule.shares) if frozen.rule.name == "shares" else None,
        "modes": {
            str(part): (frozen.coded[part].mode if part in frozen.coded else "mixer")
            for part in sorted({*range(top), *frozen.coded}, key=in_order)
        },
        "coders": {str(part): _plain(coded.coder.cfg.to_dict()) for part, coded in frozen.coded.items()},
    }
    return Graph((*first, *inner), weights, remainder, tokens, importance, about)


def _token_of(frozen: FrozenModel, target: Any) -> dict[str, Any]:
    """The token that a target is about and the model's probability of it; nothing for other targets."""
    if not isinstance(target, Logit):
        return {}
    token = frozen.token_id(target.token)
    p = frozen.logits_at(0, frozen.column(target.position, 0)).softmax(-1)[token]
    return {"token": token, "probability": float(p)}


def _plain(value: Any) -> Any:
    """What JSON can hold: lists for tuples, texts for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
