"""From a frozen run to a graph, within budgets.

1. The targets are traced once, all paths through. Of layers that are mixers, the heads (layer, source, channel) with
   the largest effects become nodes; all others stay part of the paths that pass them, so that sums are kept.
2. The targets are traced again, paths now ending at these heads; so are the heads.
3. Of the features that have been found, those with the largest influence are traced, a batch at a time, until the
   budget is spent. What the others add is reported as each row's remainder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from circuits.attribution import Attribution, attribute
from circuits.effect_rows import EffectRows
from circuits.frozen_model import FrozenModel
from circuits.graph import Graph, Node
from circuits.influence import influence
from circuits.keep import Keep
from circuits.targets import Channel, Feature, Logit, Target, chosen_targets


@dataclass(frozen=True)
class RowNodes:
    """What a row of effects is made of, in order: embeddings, errors, features, heads, bias, initial state."""

    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, frozen: FrozenModel, heads: dict[int, Tensor]) -> RowNodes:
        nodes = [Node("embed", -1, t, value=1.0) for t in range(frozen.length)]
        for layer in sorted(frozen.coded):
            nodes += [Node("error", layer, t, value=1.0) for t in range(frozen.length)]
        for layer, coded in sorted(frozen.coded.items()):
            values, indices = coded.codes.values[0].tolist(), coded.codes.indices[0].tolist()
            for t in range(frozen.length):
                nodes += [
                    Node("feature", layer, t, j, activation=z) for z, j in zip(values[t], indices[t], strict=True)
                ]
        for layer, mask in sorted(heads.items()):
            nodes += [Node("head", layer, s, e) for s, e in mask.nonzero().tolist()]
        return cls((*nodes, Node("bias", -1, -1, value=1.0), Node("initial", -1, -1, value=1.0)))

    @staticmethod
    def rows(found: Attribution) -> Float[Tensor, "n m"]:
        """Effects of all columns on each target."""
        parts = [found.embeddings]
        parts += [found.errors[i] for i in sorted(found.errors)]
        parts += [found.features[i].flatten(1) for i in sorted(found.features)]
        parts += [found.node_heads[i] for i in sorted(found.node_heads)]
        constants = [found.offset, *found.coder_biases.values(), *found.biases.values()]
        bias = torch.stack(constants).sum(0)
        initial = torch.stack([torch.zeros_like(bias), *found.initial.values()]).sum(0)
        return torch.cat([*parts, bias[:, None], initial[:, None]], 1)


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
        How many features are traced, and how many heads of mixer and split layers are nodes.
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
    if keep is None:
        heads = _choose_heads(frozen, chosen, weight, max_heads, batch)
    else:
        heads = {i: mask.to(frozen.dtype) for i, mask in keep.heads.items() if bool(mask.any())}
        max_features = sum(int(mask.sum()) for mask in keep.features.values())
        max_heads = len(keep) - max_features
    columns = RowNodes.of(frozen, heads)
    rows = EffectRows(len(columns.nodes), max_features + max_heads, frozen.dtype, offload)

    def trace(wanted: Sequence[Any]) -> tuple[Tensor, Tensor]:
        found = attribute(frozen, targets=wanted, keep_heads=False, nodes=heads, batch=batch)
        return RowNodes.rows(found).cpu(), found.target.cpu()  # a graph is no work for an accelerator

    effects, values = trace(chosen)
    head_places = [i for i, node in enumerate(columns.nodes) if node.kind == "head"]
    for start in range(0, len(head_places), batch):
        places = head_places[start : start + batch]
        here = [columns.nodes[i] for i in places]
        rows.add(places, *trace([Channel(node.layer, node.index, node.position) for node in here]))
    candidates = {i for i, node in enumerate(columns.nodes) if node.kind == "feature" and node.activation != 0}
    if keep is not None:
        candidates = {i for i in candidates if keep.features[(at := columns.nodes[i]).layer][at.position, at.index]}
    bar = tqdm(total=min(max_features, len(candidates)), desc="features", disable=not verbose)
    traced = 0
    while traced < max_features and candidates:
        reach = rows.reach(effects, weight)
        best = sorted(candidates, key=lambda i: -float(reach[i]))[: min(batch, max_features - traced)]
        best = best if keep is not None else [i for i in best if reach[i] > 0]
        if not best:
            break
        features = [
            Feature(frozen.coded[node.layer].coder, node.index, node.position)
            for node in (columns.nodes[i] for i in best)
        ]
        rows.add(best, *trace(features))
        candidates -= set(best)
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
        p = frozen.logits[0].softmax(-1)
        weight = torch.stack([p[frozen.column(t.position, 0), frozen.token_id(t.token)] for t in targets])
    else:
        weight = torch.ones(len(targets), dtype=frozen.dtype)
    return (weight / weight.sum()).cpu()


def _choose_heads(
    frozen: FrozenModel, targets: list[Any], weight: Tensor, count: int, batch: int
) -> dict[int, Float[Tensor, "l E"]]:
    """Layer -> 1 at the heads that become nodes."""
    layers = frozen.mixed_layers()
    if not layers or count < 1:
        return {}
    found = attribute(frozen, targets=targets, batch=batch)
    of_layer = {i: found.token_heads[i] if i in frozen.coded else found.heads[i] for i in layers}
    weight = weight.to(found.target.device)
    size = [torch.einsum("n,nle->le", weight, of_layer[i].abs()) for i in layers]
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
    ends = [i for i, node in enumerate(columns.nodes) if node.kind not in ("feature", "head")]
    traced = rows.by_place()
    kept = sorted([*traced, *ends])
    top = frozen.n_layers
    first = [
        Node("target", top, frozen.column(t.position, 0), i, float(value), name=t.label)
        for i, (t, value) in enumerate(zip(targets, values, strict=True))
    ]
    inner = []
    for i in kept:
        node = columns.nodes[i]
        value = traced[i][1] if i in traced else node.value
        inner.append(Node(node.kind, node.layer, node.position, node.index, value, node.activation, node.name))
    n = len(first) + len(inner)
    weights, remainder = effects.new_zeros(n, n), effects.new_zeros(n)
    left_out = torch.ones(len(columns.nodes), dtype=torch.bool)
    left_out[kept] = False
    all_rows = [(i, effects[i]) for i in range(len(first))]
    all_rows += [(len(first) + place, traced[i][0]) for place, i in enumerate(kept) if i in traced]
    for place, row in all_rows:
        weights[place, len(first) :] = row[kept]
        remainder[place] = row[left_out].sum()
        if frozen.rule.name == "gradient":  # first-order effects do not sum: what they miss is reported
            remainder[place] = (*first, *inner)[place].value - weights[place].sum()
    importance = torch.cat([weight.to(effects.dtype), effects.new_zeros(len(inner))])
    tokens = tuple(frozen.words)
    about = {
        "model": _plain(frozen.model.cfg.to_dict()),
        "tokens": frozen.tokens[0].tolist(),
        "targets": [_token_of(frozen, target) for target in targets],
        "selection": frozen.rule.name,
        "shares": list(frozen.rule.shares) if frozen.rule.name == "shares" else None,
        "modes": {str(i): (frozen.coded[i].mode if i in frozen.coded else "mixer") for i in range(top)},
        "coders": {str(i): _plain(coded.coder.cfg.to_dict()) for i, coded in frozen.coded.items()},
    }
    return Graph((*first, *inner), weights, remainder, tokens, importance, about)


def _token_of(frozen: FrozenModel, target: Any) -> dict[str, Any]:
    """The token that a target is about and the model's probability of it; nothing for other targets."""
    if not isinstance(target, Logit):
        return {}
    token = frozen.token_id(target.token)
    p = frozen.logits[0, frozen.column(target.position, 0)].softmax(-1)[token]
    return {"token": token, "probability": float(p)}


def _plain(value: Any) -> Any:
    """What JSON can hold: lists for tuples, texts for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
