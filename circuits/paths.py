"""Single paths through a graph, largest first, and what they leave unexplained.

A path target <- a <- b adds weights[target, a] (weights[a, b] / value_a) to the target: of what a adds, the share that
came from b.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from circuits.graph import TRACED, Graph, Node


@dataclass(frozen=True)
class Path:
    """Nodes from a target down to where the path ends."""

    nodes: tuple[Node, ...]
    edges: tuple[float, ...]
    """Direct effects, one between each two nodes."""
    weight: float
    """What the path adds to the target, signed."""

    def __str__(self) -> str:
        steps = [self.nodes[0].label]
        steps += [f"{node.label}: {edge:.2g}" for node, edge in zip(self.nodes[1:], self.edges, strict=True)]
        return " -> ".join(steps)


@dataclass(frozen=True)
class Paths:
    """The largest paths of one target."""

    paths: tuple[Path, ...]
    value: float
    """Of the target."""

    @property
    def remainder(self) -> float:
        """What the listed paths leave unexplained."""
        return self.value - sum(path.weight for path in self.paths)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        lines = [f"{path.weight:+.3g}  {path}" for path in self.paths]
        return "\n".join([*lines, f"{self.remainder:+.3g}  all other paths, of {self.value:.3g}"])


def _edges(graph: Graph) -> list[list[tuple[int, float]]]:
    """Each node's sources with their effects, the largest first; none where paths end or the value is 0."""
    found: list[list[tuple[int, float]]] = []
    for i, node in enumerate(graph.nodes):
        traced = node.kind in TRACED and (node.kind == "target" or node.value != 0)
        sources = graph.weights[i].nonzero()[:, 0].tolist() if traced else []
        found.append(sorted(((j, float(graph.weights[i, j])) for j in sources), key=lambda edge: -abs(edge[1])))
    return found


def _target(graph: Graph, target: int) -> int:
    targets = [i for i, node in enumerate(graph.nodes) if node.kind == "target"]
    if not 0 <= target < len(targets):
        raise IndexError(f"target {target} is out of range: this graph has {len(targets)}")
    return targets[target]


def _path(graph: Graph, places: tuple[int, ...]) -> Path:
    edges = tuple(float(graph.weights[i, j]) for i, j in pairwise(places))
    weight = edges[0]
    for place, edge in zip(places[1:], edges[1:], strict=False):
        weight *= edge / graph.nodes[place].value
    return Path(tuple(graph.nodes[i] for i in places), edges, weight)


def greedy_path(graph: Graph, target: int = 0) -> Path:
    """From the target, always to the node with the largest contribution in absolute size."""
    edges = _edges(graph)
    places = [_target(graph, target)]
    while edges[places[-1]]:
        places.append(edges[places[-1]][0][0])
    if len(places) == 1:
        raise ValueError(f"nothing adds to {graph.nodes[places[0]].label}")
    return _path(graph, tuple(places))


def top_paths(graph: Graph, k: int = 10, target: int = 0) -> Paths:
    """The k largest of all paths from a target to where paths end, by absolute weight; exact.

    The k best continuations of each node are merged from those of its sources, so each is found once however many
    paths lead to it.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    edges = _edges(graph)
    best: dict[int, list[tuple[float, tuple[int, ...]]]] = {}

    def below(i: int) -> list[tuple[float, tuple[int, ...]]]:
        """The k largest products of shares from node i down, with their nodes after i; 1 at an end."""
        if i not in best:
            if not edges[i]:
                ends = graph.nodes[i].kind not in TRACED
                best[i] = [(1.0, ())] if ends else []
            else:
                value = 1.0 if graph.nodes[i].kind == "target" else abs(graph.nodes[i].value)
                found = ((abs(w) / value * size, (j, *rest)) for j, w in edges[i] for size, rest in below(j))
                best[i] = heapq.nlargest(k, found, key=lambda item: item[0])
        return best[i]

    start = _target(graph, target)
    # Sources first, so that `below` never goes deep.
    for i in sorted(range(len(graph)), key=lambda i: (graph.nodes[i].layer, graph.nodes[i].kind == "feature")):
        below(i)
    paths = tuple(_path(graph, (start, *rest)) for _, rest in below(start))
    return Paths(paths, graph.nodes[start].value)
