"""From nodes of a graph to the edits that ablate them."""

from __future__ import annotations

from circuits.frozen_model import FrozenModel
from circuits.graph import Node
from circuits.interventions.edits import CutHead, Intervention, ScaleEmbedding, ScaleError, ScaleFeature, ScaleUnit
from hooked_mamba.frozen.places import in_order


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
    if node.kind in ("feature", "error") and node.part not in frozen.coded:
        there = sorted(frozen.coded, key=in_order)
        raise KeyError(f"{node.label}: layer {node.part} has no coder here; layers with one: {there}")
    if node.kind == "feature":
        return ScaleFeature(frozen.coded[node.part].coder, node.index, node.position)
    if node.kind == "error":
        return ScaleError(frozen.coded[node.part].coder, node.position)
    if node.kind == "embed":
        return ScaleEmbedding(node.position)
    if node.kind == "head" and (node.branch != "mixer" or frozen.chain(node.part).bypass is not None):
        return ScaleUnit(node.part, node.index, node.position)
    if node.kind == "head":
        if node.layer in frozen.coded:
            return CutHead(node.layer, node.position, node.index, slice(node.position + 1, None), "token")
        return CutHead(node.layer, node.position, node.index)
    raise ValueError(f"{node.label} cannot be edited: choose embeddings, errors, features or heads")
