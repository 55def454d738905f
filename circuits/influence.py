"""How much of the targets flows through each node and edge, and what to prune.

Ameisen et al. 2025 (Circuit tracing, transformer-circuits.pub): rows of |weights| are normalised to sum to 1, an
influence is the sum over all paths from a target of the products of these, found by powers of the matrix (the graph
has no cycles, so that they end).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import Graph


class Scores(NamedTuple):
    """How much a graph explains. Both from 0 to 1."""

    replacement: float
    """Influence that reaches embeddings (and biases, memory) rather than errors and what is no node."""
    completeness: float
    """Share of the input of nodes, weighted by their influence, that does not come from errors or the remainder."""


class Pruned(NamedTuple):
    """What :func:`prune` found."""

    graph: Graph
    nodes: Bool[Tensor, " n"]
    """Which nodes of the first graph stayed."""
    edges: Bool[Tensor, "n n"]
    """Which of its edges."""


def _shares(graph: Graph) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Each row's |weights| and |remainder| by their sum."""
    size = graph.weights.abs()
    rest = graph.remainder.abs()
    total = (size.sum(1) + rest).clamp_min(torch.finfo(size.dtype).tiny)
    return size / total.unsqueeze(1), rest / total


def influence(graph: Graph) -> Float[Tensor, " n"]:
    """Share of the targets that flows through each node; 1 in all over the targets themselves."""
    shares, _ = _shares(graph)
    return _all_the_way_down(graph.importance.to(shares.dtype), shares)


def _all_the_way_down(arriving: Float[Tensor, " n"], shares: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """What arrives at each node, and what it passes on by its shares, and so on to the end."""
    total = arriving.clone()
    for _ in range(len(shares)):
        arriving = arriving @ shares
        if not bool(arriving.any()):
            return total
        total += arriving
    raise ValueError("this graph has a cycle: what flows down it has no end")


def total_effects(graph: Graph, target: int = 0) -> Float[Tensor, " n"]:
    """What each node adds to a target over all paths of the graph, signed; the target's own value at the target.

    A node passes on the same share of everything that adds to it: weights are linear in a head's u and in a feature's
    activation, which moves as its pre-activation does. (In gated coders, whose gate alone is traced, that is a first
    approximation.)

    Raises
    ------
    IndexError
        There is no such target.
    """
    targets = graph.where("target").nonzero()[:, 0].tolist()
    if not 0 <= target < len(targets):
        raise IndexError(f"target {target} is out of range: this graph has {len(targets)}")
    passed = [node.activation if node.kind == "feature" else node.value for node in graph.nodes]
    size = torch.tensor(passed, dtype=graph.weights.dtype)
    share = torch.where(size.unsqueeze(1) == 0, 0, graph.weights / size.unsqueeze(1))
    # From what the target gets, not from its value and its shares: it may be 0, as a tie of two logits is.
    total = _all_the_way_down(graph.weights[targets[target]], share)
    total[targets[target]] = size[targets[target]]
    return total


def edge_influence(graph: Graph) -> Float[Tensor, "n n"]:
    """Share of the targets that flows along each edge."""
    shares, _ = _shares(graph)
    return influence(graph).unsqueeze(1) * shares


def scores(graph: Graph) -> Scores:
    """Replacement and completeness."""
    flow = influence(graph)
    shares, rest = _shares(graph)
    ends = graph.where("embed", "bias", "initial")
    lost = flow[graph.where("error")].sum() + (flow * rest).sum()
    reached = flow[ends].sum()
    traced = flow * (shares.sum(1) + rest > 0)
    clean = 1 - shares[:, graph.where("error")].sum(1) - rest
    completeness = (traced * clean).sum() / traced.sum().clamp_min(1e-30)
    return Scores(float(reached / (reached + lost).clamp_min(1e-30)), float(completeness))


def _enough(amounts: Tensor, share: float) -> Tensor:
    """The largest of `amounts`, as many as make up `share` of their sum, as a mask."""
    flat = amounts.flatten()
    order = flat.argsort(descending=True, stable=True)
    reached = flat[order].cumsum(0) / flat.sum().clamp_min(1e-30)
    count = int((reached < share).sum()) + 1
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order[:count]] = True
    return (mask & (flat > 0)).reshape(amounts.shape)


def prune(graph: Graph, nodes: float | int = 0.8, edges: float | int = 0.98) -> Pruned:
    """Prune what carries little.

    Parameters
    ----------
    nodes, edges
        Shares of the summed influence of nodes, then of edges, that stay. Targets, embeddings and biases always do;
        features and heads stay only where something of theirs still leads to a target and on.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {share}")
    always = graph.where("target", "embed", "bias", "initial")
    inner = torch.where(always, 0, influence(graph))
    kept = always | _enough(inner, nodes)
    thinned = torch.where(kept[:, None] & kept[None], edge_influence(graph), 0)
    mask = _enough(thinned, edges)
    target, traced = graph.where("target"), graph.where("feature", "head")
    while True:
        has_use = mask.any(0) | target
        has_source = mask.any(1) | ~traced
        still = kept & (always | (has_use & has_source))
        if bool((still == kept).all()):
            break
        kept, mask = still, mask & still[:, None] & still[None]
    return Pruned(_only_edges(graph, mask | ~kept[None]).keep(kept), kept, mask)


def thin(graph: Graph, edges: float | int = 0.98) -> Graph:
    """Prune edges that carry little; all nodes stay, also those that no path of the graph's rule goes through."""
    if not 0 < edges <= 1:
        raise ValueError(f"edges must be above 0 and at most 1, got {edges}")
    return _only_edges(graph, _enough(edge_influence(graph), edges))


def _only_edges(graph: Graph, mask: Bool[Tensor, "n n"]) -> Graph:
    """What an edge that is cut carried belongs to the remainder of its target, so that rows still sum."""
    cut = torch.where(mask, 0, graph.weights).sum(1)
    return replace(graph, weights=torch.where(mask, graph.weights, 0), remainder=graph.remainder + cut)
