"""Graphs on disk, and in the forms that other tools read.

A saved graph is a folder: `graph.json` (nodes, tokens, supernodes, what it is about) and `weights.safetensors`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from circuits.graph import KINDS, Graph, Node
from circuits.influence import influence, scores
from hooked_mamba.durable import write_file

FORMAT = 1
"""Of graph.json."""

TENSORS = ("weights", "remainder", "importance")

_FIELDS = {field.name: field.type for field in dataclasses.fields(Node)}


def save_graph(graph: Graph, folder: str | Path) -> Path:
    """Write a graph; files appear whole or not at all.

    Parameters
    ----------
    folder
        Made if need be; an older graph in it is replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text, tensors = graph_parts(graph)
    write_file(folder / "weights.safetensors", save_tensors(tensors))
    write_file(folder / "graph.json", text.encode())
    return folder


def graph_parts(graph: Graph) -> tuple[str, dict[str, Tensor]]:
    """A graph as the text of graph.json and the tensors of weights.safetensors."""
    about = {
        "format": FORMAT,
        "nodes": [dataclasses.asdict(node) for node in graph.nodes],
        "tokens": list(graph.tokens),
        "about": graph.about,
        "supernodes": {name: list(members) for name, members in graph.supernodes.items()},
    }
    text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
    return text, {name: getattr(graph, name).contiguous() for name in TENSORS}


def load_graph(folder: str | Path) -> Graph:
    """Read what :func:`save_graph` wrote.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        A file is damaged or inconsistent; says which and how.
    """
    folder = Path(folder)
    for name in ("graph.json", "weights.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: a graph is graph.json and weights.safetensors")
    try:
        about = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
        tensors = load_tensors((folder / "weights.safetensors").read_bytes())
    except Exception as error:
        raise ValueError(f"{folder} holds no readable graph ({type(error).__name__}: {error})") from None
    return graph_of(about, tensors, folder)


def graph_of(about: Any, tensors: Mapping[str, Tensor], folder: Path) -> Graph:
    """A graph from what :func:`graph_parts` made of it, checked; `folder` is for messages.

    Raises
    ------
    ValueError
        The parts are inconsistent; says which and how.
    """
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"{folder / 'graph.json'}: format is {found!r}, expected {FORMAT}")
    for name in TENSORS:
        if name not in tensors:
            raise ValueError(f"{folder / 'weights.safetensors'} lacks {name!r}; it has {sorted(tensors)}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{folder / 'weights.safetensors'}: {name} holds numbers that are not finite")
    try:
        nodes = tuple(_node(values) for values in about["nodes"])
        supernodes = {str(name): tuple(int(i) for i in members) for name, members in about["supernodes"].items()}
        tokens = tuple(str(token) for token in about["tokens"])
        return Graph(
            nodes, tensors["weights"], tensors["remainder"], tokens, tensors["importance"], about["about"], supernodes
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder / 'graph.json'} does not fit ({type(error).__name__}: {error})") from None


def _node(values: dict[str, Any]) -> Node:
    for name in values:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            raise ValueError(f"a node has no field {name!r}" + (f"; nearest: {near[0]!r}" if near else ""))
    if values.get("kind") not in KINDS:
        raise ValueError(f"a node's kind must be one of {', '.join(KINDS)}, got {values.get('kind')!r}")
    if values.get("at", "out") not in ("out", "u"):
        raise ValueError(f"a node's at must be 'out' or 'u', got {values['at']!r}")
    for name in ("name", "branch"):
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"a node's {name} must be a text, got {values[name]!r}")
    for name in ("layer", "position", "index"):
        if not isinstance(values.get(name, 0), int) or isinstance(values.get(name, 0), bool):
            raise ValueError(f"a node's {name} must be an integer, got {values[name]!r}")
    for name in ("value", "activation"):
        if not isinstance(values.get(name, 0.0), int | float) or not math.isfinite(values.get(name, 0.0)):
            raise ValueError(f"a node's {name} must be a finite number, got {values[name]!r}")
    return Node(**values)


def to_networkx(graph: Graph) -> Any:
    """A networkx.DiGraph; edges go from sources to targets and carry `weight`, nodes their fields and `influence`."""
    import networkx

    out = networkx.DiGraph(tokens=list(graph.tokens))
    flow = influence(graph)
    for i, node in enumerate(graph.nodes):
        out.add_node(i, **dataclasses.asdict(node), label=node.label, influence=float(flow[i]))
    for i, j in graph.weights.nonzero().tolist():
        out.add_edge(j, i, weight=float(graph.weights[i, j]))
    return out


_TYPES = {
    "target": "logit", "feature": "cross layer transcoder", "head": "mixer head", "error": "mlp reconstruction error",
    "embed": "embedding", "bias": "bias", "initial": "initial state",
}  # fmt: skip
"""Names of kinds in circuit-tracer's files, and ours for what it has not."""

_HEADS = {"attn": "attention head", "mlp": "mlp neuron", "moe": "expert"}
"""The same of heads of other branches than mixers."""


def to_circuit_tracer(graph: Graph, slug: str, scan: str = "hooked-mamba") -> dict[str, Any]:
    """The JSON that circuit-tracer's and Neuronpedia's front ends read: metadata, qParams, nodes, links.

    Parameters
    ----------
    graph
        A pruned one: front ends draw every node.
    slug
        Name of the graph: letters, digits, dash and underscore.
    scan
        Which dictionaries the features belong to.

    Raises
    ------
    ValueError
        A slug with other characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", slug):
        raise ValueError(f"slug may hold letters, digits, dash and underscore, got {slug!r}")
    flow, ids = influence(graph), [_node_id(graph, node) for node in graph.nodes]
    order = flow.argsort(descending=True)
    reached = torch.zeros_like(flow)
    reached[order] = flow[order].cumsum(0) / flow.sum()
    nodes = [
        {
            "node_id": ids[i],
            "feature": _feature_number(graph, node),
            "layer": _layer_name(node),
            "ctx_idx": max(node.position, 0),
            "feature_type": _HEADS.get(node.branch, _TYPES["head"]) if node.kind == "head" else _TYPES[node.kind],
            "token_prob": _probability(graph, node),
            "is_target_logit": node.kind == "target",
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": ids[i],
            "clerp": _title(graph, node),
            "influence": None if node.kind == "target" else float(reached[i]),
            "activation": node.activation if node.kind == "feature" else None,
        }
        for i, node in enumerate(graph.nodes)
    ]
    links = [
        {"source": ids[j], "target": ids[i], "weight": float(graph.weights[i, j])}
        for i, j in graph.weights.nonzero().tolist()
    ]
    found = scores(graph)
    return {
        "metadata": {
            "slug": slug, "scan": scan, "prompt": "".join(graph.tokens), "prompt_tokens": list(graph.tokens),
            "transcoder_list": [scan],
            "node_threshold": 1.0, "schema_version": 1,
            "info": {"generator": {"name": "hooked-mamba circuits"}},
            "replacement_score": found.replacement, "completeness_score": found.completeness,
        },
        "qParams": {
            "linkType": "both", "pinnedIds": [ids[i] for i in range(len(ids)) if graph.nodes[i].kind == "target"],
            "clickedId": "", "sg_pos": "",
            "supernodes": [[name, *(ids[i] for i in members)] for name, members in graph.supernodes.items()],
        },
        "nodes": nodes,
        "links": links,
    }  # fmt: skip


def _target(graph: Graph, node: Node) -> dict[str, Any]:
    """What the graph knows of a target's token; nothing for other nodes."""
    known = graph.about.get("targets", [])
    return known[node.index] if node.kind == "target" and node.index < len(known) else {}


def _probability(graph: Graph, node: Node) -> float:
    """The model's probability of a target's token; 0, as in circuit-tracer, for all that is no token."""
    return float(_target(graph, node).get("probability", 0.0))


def _title(graph: Graph, node: Node) -> str:
    """What front ends show; they look for a probability in a logit's title, and fail where there is none."""
    title = node.name or node.label
    return f'Output "{title}" (p={_probability(graph, node):.3f})' if node.kind == "target" else title


def _layer_name(node: Node) -> str:
    if node.kind in ("embed", "bias", "initial"):
        return "E"
    return str(node.layer + 1 if node.kind == "target" else node.layer)  # theirs leave one layer out before the logits


def _index(graph: Graph, node: Node) -> int:
    """What stands between layer and position in a node's id: a latent, a token, -1 for an error; for kinds that
    circuit-tracer has not, numbers that no other node of the layer has."""
    other = _other_branches(graph).index(node.branch) + 1 if node.branch != "mixer" else 0
    if node.kind == "feature":
        return node.index + other * 100_000_000
    if node.kind == "error":
        return -1 - other
    tokens = graph.about.get("tokens", [])
    if node.kind == "embed" and node.position < len(tokens):
        return int(tokens[node.position])
    if node.kind == "target" and "token" in (known := _target(graph, node)):
        same = [other.index for other in graph.nodes if _target(graph, other).get("token") == known["token"]]
        return int(known["token"]) if node.index == min(same) else 10_000_000 * len(KINDS) + node.index
    return KINDS.index(node.kind) * 10_000_000 + node.index + other * 100_000_000


def _other_branches(graph: Graph) -> list[str]:
    """Names of branches beside mixers: theirs have one kind of layer, so that these get numbers of their own."""
    return sorted({node.branch for node in graph.nodes} - {"mixer"})


def _feature_number(graph: Graph, node: Node) -> int:
    """`feature`: of a latent its layer and index as one number (Cantor's pairing), of an embedding its position."""
    if node.kind == "feature":
        index = _index(graph, node)
        return (node.layer + index) * (node.layer + index + 1) // 2 + index
    return node.position if node.kind == "embed" else _index(graph, node)


def _node_id(graph: Graph, node: Node) -> str:
    """layer_index_position, as the front ends take it apart; unique for features, heads and errors alike."""
    return f"{_layer_name(node)}_{_index(graph, node)}_{max(node.position, 0)}"
