"""What is known of a graph's features: for its page, from a text or from the prompt alone."""

from __future__ import annotations

from typing import Any

from circuits.frozen_model import FrozenModel
from circuits.graph import Graph
from saes.explorer.collect import collect
from saes.explorer.data import FeatureData
from saes.store.data import Text


def about_features(
    frozen: FrozenModel, graph: Graph, text: Text | None = None, **options: Any
) -> dict[int, FeatureData]:
    """Layer -> where the graph's features of this layer are active, and which tokens they promote.

    Parameters
    ----------
    frozen
        The run that the graph was built from; its coders are asked.
    graph
        Its features alone are looked at.
    text
        Where to look; None: the prompt.
    options
        As of `saes.explorer.collect`, such as n_tokens.
    """
    found = {}
    for layer, coded in frozen.coded.items():
        wanted = sorted({node.index for node in graph.nodes if (node.kind, node.layer) == ("feature", layer)})
        if wanted:
            where = frozen.tokens if text is None else text
            (found[layer],) = collect(frozen.model, coded.coder, where, features=wanted, **options).values()
    return found
