"""A graph as one HTML page: layers by tokens, with what each node gets and gives.

The graph is JSON inside the page; the script puts all text in as text, never as markup, and no other script may run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import hooked_mamba
from circuits.faithfulness import Faithfulness
from circuits.graph import Graph, Node
from circuits.influence import influence, scores
from circuits.paths import top_paths
from hooked_mamba.frozen.places import Part
from saes.explorer.data import FeatureData
from saes.explorer.page import Page, as_json

HERE = Path(__file__).parent

SCRIPT = ("data", "work", "layout", "graph", "subgraph", "panel", "main")
"""The parts of the page's script, in order."""

HELD = {
    "none": "with norms, gates and selection frozen at this prompt",
    "half": "with a gate's product divided evenly between its factors, and norms and selection frozen at this prompt",
    "shares": "with the scan's product divided between C, B and u; norms, gates and step sizes frozen at this prompt",
    "gradient": "to first order: nothing is frozen, and what a linearisation misses is left out",
}
"""What a graph's rule holds, in words."""


def circuit_page(
    graph: Graph,
    title: str | None = None,
    features: Mapping[Part, FeatureData] | None = None,
    report: Faithfulness | str | None = None,
    contexts: int = 8,
) -> Page:
    """A page about a graph; :meth:`Page.save` writes it.

    Parameters
    ----------
    graph
        A pruned one: every node is drawn.
    title
        Heading; None: the first target, and how many others there are.
    features
        Part -> what `saes.explorer.collect` found about its dictionary, shown when a feature is clicked.
    report
        What :func:`faithfulness` found, whose verdict stands at the top; or any text to show under the graph.
    contexts
        Top contexts of each feature, at most.
    """
    flow, found = influence(graph), scores(graph)
    nodes = [
        {
            "id": node_id(node), "kind": node.kind, "layer": node.layer, "position": node.position, "index": node.index,
            "label": node.label, "name": node.name if node.kind != "target" else "", "value": _short(node.value),
            "activation": _short(node.activation), "influence": _short(float(flow[i])),
            "rest": _short(float(graph.remainder[i])),
        }
        for i, node in enumerate(graph.nodes)
    ]  # fmt: skip
    edges = [[j, i, _short(float(graph.weights[i, j]))] for i, j in graph.weights.nonzero().tolist()]
    place = {node.key: i for i, node in enumerate(graph.nodes)}
    targets = [node for node in graph.nodes if node.kind == "target"]
    listed = []
    for t in range(len(targets)):
        paths = top_paths(graph, 12, t)
        rows = [[_short(path.weight), [place[node.key] for node in path.nodes]] for path in paths]
        listed.append({"paths": rows, "remainder": _short(paths.remainder), "value": _short(paths.value)})
    data = {
        "tokens": list(graph.tokens), "nodes": nodes, "edges": edges, "paths": listed,
        "supernodes": {name: list(members) for name, members in graph.supernodes.items()},
        "features": _about_features(graph, features or {}, contexts),
        "layers": max((node.layer for node in graph.nodes), default=0),
        "fingerprint": hashlib.sha256("".join([*graph.tokens, *map(node_id, graph.nodes)]).encode()).hexdigest()[:16],
    }  # fmt: skip
    script = "\n".join((HERE / "script" / f"{part}.js").read_text(encoding="utf-8") for part in SCRIPT)
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = template.from_string((HERE / "page.html").read_text(encoding="utf-8")).render(
        title=title or _title([node.label for node in targets]),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
        data=Markup(as_json(data)),
        prompt="".join(graph.tokens),
        replacement=f"{found.replacement:.0%}",
        completeness=f"{found.completeness:.0%}",
        held=HELD.get(str(rule := graph.about.get("selection", "none")), f"by the rule {rule}"),
        report=None if report is None else str(report),
        verdict=_verdict(report) if isinstance(report, Faithfulness) else None,
        version=hooked_mamba.__version__,
    )
    return Page(text)


def _title(targets: Sequence[str]) -> str:
    others = len(targets) - 1
    more = f" and {others} other target{'s' if others > 1 else ''}" if others > 0 else ""
    return f"{targets[0]}{more}" if targets else "circuit"


def node_id(node: Node) -> str:
    """A node's name in files of saved work, such as "feature/1/5/3498"."""
    return "/".join(map(str, node.key))


def _verdict(report: Faithfulness) -> str:
    found = report.recovery
    return f"On the real model these {found.nodes} nodes recover {found.circuit:.0%} of the metric: {found.verdict}."


def _about_features(graph: Graph, features: Mapping[Part, FeatureData], contexts: int) -> dict[str, Any]:
    """Node -> promoted and suppressed tokens, and top contexts as (token, activation) pairs."""
    found: dict[str, Any] = {}
    for i, node in enumerate(graph.nodes):
        data = features.get(node.part) if node.kind == "feature" else None
        rows = [] if data is None else (data.features == node.index).nonzero()[:, 0].tolist()
        if data is None or not rows:
            continue
        row = rows[0]
        about: dict[str, Any] = {}
        for name in ("promoted", "suppressed"):
            ranked = getattr(data, name)
            if ranked is not None:
                pairs = zip(ranked.indices[row].tolist(), ranked.values[row].tolist(), strict=True)
                about[name] = [[data.vocabulary[t], _short(v)] for t, v in pairs]
        texts = []
        for tokens, values in zip(data.top.tokens[row].tolist(), data.top.activations[row].tolist(), strict=True):
            words = [[data.vocabulary[t], _short(v)] for t, v in zip(tokens, values, strict=True) if t >= 0]
            if any(v > 0 for v in values):
                texts.append(words)
        about["contexts"] = texts[:contexts]
        found[str(i)] = about
    return found


def _short(x: float) -> float:
    """Four significant digits are enough to look at."""
    return float(f"{x:.4g}")
