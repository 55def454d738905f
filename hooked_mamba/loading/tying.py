"""Tied embeddings: one tensor under two names in a checkpoint, under one name here."""

from __future__ import annotations

import torch
from torch import Tensor

from hooked_mamba.loading.tables import CheckpointError, LazyState

__all__ = ["drop_tied", "repeat_tied"]

ROWS_AT_ONCE = 4096


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    pairs = zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def drop_tied(state: LazyState, tied: bool) -> LazyState:
    """`state` without its unembedding when that is the embedding again; one that is there under the unembedding's name
    alone is the embedding.

    Raises
    ------
    CheckpointError
        The config says tied, the two tensors say otherwise.
    """
    if not tied or "unembed.weight" not in state:
        return state
    if "embed.weight" not in state:
        return state.renamed({name: "embed.weight" if name == "unembed.weight" else name for name in state})
    if not _equal(state["embed.weight"], state["unembed.weight"]):
        raise CheckpointError(
            f"the config ties the unembedding to the embedding, but {state.place('unembed.weight')} is another tensor "
            f"than {state.place('embed.weight')}; correct the config (tie_word_embeddings or tie_embeddings: false) if"
            " the first one is meant"
        )
    return state.without("unembed.weight")


def repeat_tied(state: LazyState, tied: bool) -> LazyState:
    """`state` with the embedding under the unembedding's name too, for formats that store both."""
    return state.with_copy("embed.weight", "unembed.weight") if tied and "embed.weight" in state else state
