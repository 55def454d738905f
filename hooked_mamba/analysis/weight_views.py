"""What the weights alone show: how mixers write into what later mixers read, and norms folded away.

Conventions: matrices multiply from the right; the block norm's weight belongs to what the mixer reads, the gated norm's
weight (Mamba-2) to what it writes. Convolution, SiLU and scan are left out: these views are linear.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.factored_matrix import FactoredMatrix

Input = Literal["x", "z", "B", "C", "dt"]


def read_weights(model: Any) -> Float[Tensor, "layer d E"]:
    """Residual stream (over its scale) to convolution input, the norm's weight included."""
    return model.w_norm.unsqueeze(-1) * model.W_in_x


def write_weights(model: Any) -> Float[Tensor, "layer E d"]:
    """Gated output to residual stream, the gated norm's weight included where there is one."""
    return torch.stack([model.mixer(i).write_weight().t() for i in range(model.cfg.n_layers)])


def mixer_OV(model: Any) -> FactoredMatrix:
    """What a mixer does to a direction if all its channels pass it through: layer d d, inner width E."""
    return FactoredMatrix(read_weights(model), write_weights(model))


def channel_OV(model: Any) -> FactoredMatrix:
    """Each channel alone, W_in_x times W_out: layer E d d, of rank 1."""
    A = rearrange(read_weights(model), "layer d e -> layer e d 1")
    return FactoredMatrix(A, rearrange(write_weights(model), "layer e d -> layer e 1 d"))


def head_OV(model: Any) -> FactoredMatrix:
    """Each head: layer H d d, inner width P.

    Raises
    ------
    ValueError
        The mixers have no heads, as in Mamba-1.
    """
    mixer = model.mixer(0)
    if mixer.head_width is None:
        raise ValueError(f"{mixer.title} has no heads: use channel_OV or mixer_OV")
    A = rearrange(read_weights(model), "layer d (h p) -> layer h d p", p=mixer.head_width)
    return FactoredMatrix(A, rearrange(write_weights(model), "layer (h p) d -> layer h p d", p=mixer.head_width))


def input_matrix(model: Any, input: Input) -> FactoredMatrix:
    """Residual stream (over its scale) to one of a mixer's inputs, layer d k."""
    norm = model.w_norm.unsqueeze(-1)
    if input in ("x", "z"):
        W = norm * (model.W_in_x if input == "x" else model.W_in_z)
    else:
        W = getattr(model, f"W_{input}").flatten(2)
        if model.mixer(0).selection_reads == "u":  # through x
            return FactoredMatrix(read_weights(model), W)
        W = norm * W
    return FactoredMatrix(W, torch.eye(W.shape[-1], dtype=W.dtype, device=W.device))


@torch.no_grad()
def mixer_composition_scores(
    model: Any, input: Input = "x", by: Literal["mixer", "head"] = "mixer"
) -> Float[Tensor, "..."]:
    """How strongly the inputs of later mixers read what a mixer writes.

    score(i -> j) = |OV_i R_j| / (|OV_i| |R_j|), Frobenius norms, as in TransformerLens' composition scores (Elhage et
    al. 2021); at most 1, and about 1/sqrt(d) for unrelated matrices.

    Parameters
    ----------
    input
        What mixer j reads through R_j: "x", "z", "B", "C" or "dt" (in Mamba-1 the last three through x).
    by
        "mixer", or "head" for senders that have heads, as in Mamba-2.

    Returns
    -------
    Tensor
        sender layer (head) receiver layer; 0 where the sender is not before the receiver.
    """
    if input not in ("x", "z", "B", "C", "dt"):
        raise ValueError(f"input must be 'x', 'z', 'B', 'C' or 'dt', got {input!r}")
    if by not in ("mixer", "head"):
        raise ValueError(f"by must be 'mixer' or 'head', got {by!r}")
    senders = mixer_OV(model) if by == "mixer" else head_OV(model)
    receivers = input_matrix(model, input)
    # Only the row space of R_j's own matrix matters for norms: R_j R_j^T once, d x d.
    gram = receivers.AB @ receivers.AB.transpose(-2, -1)
    n = model.cfg.n_layers
    shape = senders.shape[:-2]
    scores = senders.A.new_zeros(*shape, n)
    own = senders.norm()
    inner = senders.A.transpose(-2, -1) @ senders.A
    for j in range(1, n):
        B = senders.B[:j]
        product = (inner[:j] * (B @ gram[j] @ B.transpose(-2, -1))).sum((-2, -1)).clamp(min=0).sqrt()
        size = gram[j].diagonal().sum().sqrt()
        scores[:j, ..., j] = product / (own[:j] * size)
    return scores


@torch.no_grad()
def fold_norms(model: Any, center_unembed: bool = False) -> Any:
    """A copy of the model with every norm's weight 1, folded into the matrix that reads it; log-probs are equal.

    The unembedding becomes a matrix of its own where it was tied to the embedding.

    Parameters
    ----------
    center_unembed
        Also subtract the mean over the vocabulary from the unembedding's rows, which shifts all logits of a position by
        the same amount.

    Raises
    ------
    ValueError
        The model has LayerNorms, or norms that no matrix reads.
    """
    if getattr(model.ln_final, "bias", None) is not None:
        raise ValueError("fold_norms is for RMS norms; this model's norms are LayerNorms, whose biases have no matrix")
    if any(model.block(i).norm_after for i in range(model.cfg.n_layers)):
        raise ValueError("fold_norms: some norms of this model come after their branches, where no matrix reads them")
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for i in range(model.cfg.n_layers):
        block, at = model.block(i), f"blocks.{i}."
        for norm, stage in zip(block.norm_names, block.stages, strict=True):
            branches = {name: block.branches[name] for name in stage}
            readers = [f"{at}{name}.{weight}" for name, branch in branches.items() for weight in branch.norm_readers]
            _fold(weights, f"{at}{norm}.weight", *readers)
            for name, branch in branches.items():
                for inner, matrix in branch.inner_norms:
                    _fold(weights, f"{at}{name}.{inner}", f"{at}{name}.{matrix}")
    weights["unembed.weight"] = weights["unembed.weight"].clone()  # tied weights share a tensor
    _fold(weights, "ln_final.weight", "unembed.weight")
    if center_unembed:
        weights["unembed.weight"] -= weights["unembed.weight"].mean(0)
    folded = type(model)(dataclasses.replace(model.cfg, tie_embeddings=False), model.tokenizer, seed=0)
    folded.to(device=model.device, dtype=model.embed.weight.dtype)
    folded.load_state_dict(weights)
    folded.requires_grad_(any(p.requires_grad for p in model.parameters()))
    return folded.train(model.training)


def _fold(weights: dict[str, Tensor], norm: str, *matrices: str) -> None:
    """Columns of the matrices times the norm's weight."""
    for matrix in matrices:
        weights[matrix] *= weights[norm].to(weights[matrix].dtype)
    weights[norm].fill_(1)
