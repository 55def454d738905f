"""From nodes of a graph to the edits that take them away."""

from __future__ import annotations

from circuits.frozen_model import FrozenModel
from circuits.graph import Node
from circuits.interventions.edits import CutHead, Intervention, ScaleEmbedding, ScaleError, ScaleFeature


def edit_of(frozen: FrozenModel, node: Node) -> Intervention:
    """The edit that ablates a node: of a feature, an error, an embedding or a head.

    A split layer's sources are tokens, and what a token gives to its own position belongs to the features: its
    targets are the positions behind it.

    Parameters
    ----------
    frozen
        The run that the graph was built from; tells coders and modes.

    Raises
    ------
    ValueError
        A target, biases or the initial state, which are no place to intervene.
    KeyError
        A feature or an error of a layer that has no coder in this run.
    """
    if node.kind in ("feature", "error") and node.layer not in frozen.coded:
        raise KeyError(f"{node.label}: layer {node.layer} has no coder here; layers with one: {sorted(frozen.coded)}")
    if node.kind == "feature":
        return ScaleFeature(frozen.coded[node.layer].coder, node.index, node.position)
    if node.kind == "error":
        return ScaleError(frozen.coded[node.layer].coder, node.position)
    if node.kind == "embed":
        return ScaleEmbedding(node.position)
    if node.kind == "head":
        if node.layer in frozen.coded:
            return CutHead(node.layer, node.position, node.index, slice(node.position + 1, None), "token")
        return CutHead(node.layer, node.position, node.index)
    raise ValueError(f"{node.label} cannot be edited: choose embeddings, errors, features or heads")
