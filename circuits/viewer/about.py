"""What a graph's page shows of its features, from a text or from the prompt alone."""

from __future__ import annotations

from typing import Any

from circuits.frozen_model import FrozenModel
from circuits.graph import Graph
from hooked_mamba.frozen.places import Part
from saes.explorer.collect import collect
from saes.explorer.data import FeatureData
from saes.store.data import Text


def about_features(
    frozen: FrozenModel, graph: Graph, text: Text | None = None, **options: Any
) -> dict[Part, FeatureData]:
    """Part -> where the graph's features of this layer are active, and which tokens they promote.

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
    wanted: dict[Part, set[int]] = {}
    for node in graph.nodes:
        if node.kind == "feature":
            wanted.setdefault(node.part, set()).add(node.index)
    if not wanted:
        return {}
    found = collect(
        frozen.model,
        {str(part): frozen.coded[part].coder for part in wanted},
        frozen.tokens if text is None else text,
        features={str(part): sorted(indices) for part, indices in wanted.items()},
        **{"progress": text is not None, **options},
    )
    return {part: found[str(part)] for part in wanted}
