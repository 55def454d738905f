"""Small tools under TransformerLens' names: `from hooked_mamba import utils`."""

# test_prompt is no test, though its name says so to a linter.
# ruff: noqa: PT028

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import hooked_mamba.models  # noqa: F401  # short names are known once every kind of branch is defined
from hooked_mamba.display import Shown, table
from hooked_mamba.factored_matrix import FactoredMatrix
from hooked_mamba.hooks.names import get_act_name as get_act_name
from hooked_mamba.model.generation import sample_logits as sample_logits
from hooked_mamba.model.text import lm_cross_entropy_loss as lm_cross_entropy_loss
from hooked_mamba.names_elsewhere import import_advice
from hooked_mamba.transformerlens_names import UTILS

__getattr__ = import_advice(__name__, UTILS)


def to_numpy(value: Any) -> np.ndarray:
    """A tensor, number or list as an array."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    return np.asarray(value)


def get_corner(tensor: Any, n: int = 3) -> Tensor:
    """The first n entries along every axis of a tensor (of a FactoredMatrix, of the product)."""
    corner = tensor[(slice(n),) * tensor.ndim]
    return corner.AB if isinstance(corner, FactoredMatrix) else corner


def transpose(tensor: Float[Tensor, "... a b"]) -> Float[Tensor, "... b a"]:
    """The last two axes exchanged."""
    return tensor.transpose(-1, -2)


def remove_batch_dim(tensor: Tensor) -> Tensor:
    """Without the first axis if it has length 1, else unchanged."""
    return tensor[0] if len(tensor) == 1 else tensor


def is_square(x: Tensor) -> bool:
    """Whether it is a square matrix."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Whether it is a square matrix with nothing above its diagonal."""
    return is_square(x) and bool((x == x.tril()).all())


def get_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def composition_scores(
    left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True
) -> Float[Tensor, "*leading"]:
    """|L R| / (|L| |R|), Frobenius norms: how strongly R reads what L writes.

    With `broadcast_dims` every left matrix is paired with every right one: axes of the left in front.
    """
    if broadcast_dims:
        before, behind = left.ndim - 2, right.ndim - 2
        for _ in range(before):
            right = right.unsqueeze(0)
        for _ in range(behind):
            left = left.unsqueeze(before)
    product = left @ right
    assert isinstance(product, FactoredMatrix)
    return product.norm() / left.norm() / right.norm()


def lm_accuracy(
    logits: Float[Tensor, "b l v"],
    tokens: Int[Tensor, "b l"],
    per_token: bool = False,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """How often the likeliest token is the next one: the share, or with `per_token` yes or no for all l - 1.

    With a mask, pairs that touch padding do not count (and are False).
    """
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    if attention_mask is None:
        return right if per_token else right.float().mean()
    real = (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()
    return right & real if per_token else (right & real).sum() / real.sum()


@dataclass(frozen=True)
class AnswerToken(Shown):
    """How one token of an answer did."""

    token: str
    rank: int
    """0: the likeliest."""
    logit: float
    prob: float
    top: list[tuple[str, float, float]]
    """The likeliest tokens there: text, logit, probability."""


def test_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Does the model give this answer? Prints rank, logit and probability of each of its tokens.

    The numbers themselves are :func:`answer_tokens`'. Nothing is returned, so that a notebook shows the table once.

    Parameters
    ----------
    prompt, answer
        Text; each of several answers is tested. An answer of several tokens is read token by token.
    prepend_space_to_answer
        Put a space in front of answers that have none.
    print_details
        Also print the tokens and the likeliest ones at each place.
    top_k
        How many of the likeliest.
    """
    before = model.to_tokens(prompt, prepend_bos=prepend_bos)
    for found in answer_tokens(prompt, answer, model, prepend_space_to_answer, prepend_bos, top_k):
        if print_details:
            print("Tokenized prompt:", model.to_str_tokens(before))
            print("Tokenized answer:", [token.token for token in found])
        for token in found:
            print(f"Rank: {token.rank:<8} Logit: {token.logit:5.2f} Prob: {token.prob:6.2%} Token: |{token.token}|")
            if print_details:
                for place, (word, logit, prob) in enumerate(token.top):
                    print(f"  top {place}: Logit: {logit:5.2f} Prob: {prob:6.2%} Token: |{word}|")


test_prompt.__test__ = False  # type: ignore[attr-defined]  # not a test, though pytest would think so


@torch.no_grad()
def answer_tokens(
    prompt: str,
    answer: str | Sequence[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> list[list[AnswerToken]]:
    """Rank, logit and probability of each token of one or several answers: what :func:`test_prompt` prints.

    Returns
    -------
    list
        For each answer, one entry a token.
    """
    results = []
    for text in [answer] if isinstance(answer, str) else list(answer):
        if prepend_space_to_answer and not text.startswith(" "):
            text = " " + text
        results.append(_answer(prompt, text, model, prepend_bos, top_k))
    return results


def _answer(prompt: str, answer: str, model: Any, prepend_bos: bool | None, top_k: int) -> list[AnswerToken]:
    before = model.to_tokens(prompt, prepend_bos=prepend_bos)
    after = model.to_tokens(answer, prepend_bos=False)
    logits = model(torch.cat([before, after], 1))[0, before.shape[1] - 1 : -1]
    probs = logits.softmax(-1)
    found = []
    for i, token in enumerate(after[0].tolist()):
        best = logits[i].topk(min(top_k, logits.shape[-1])).indices.tolist()
        top = [(model.to_single_str_token(t), float(logits[i, t]), float(probs[i, t])) for t in best]
        rank = int((logits[i] > logits[i, token]).sum())
        name = model.to_single_str_token(token)
        found.append(AnswerToken(name, rank, float(logits[i, token]), float(probs[i, token]), top))
    return found


@dataclass(frozen=True)
class ModelComparison:
    """How far apart two models are on the same tokens."""

    max_logit_difference: float
    """After each position's mean logit is taken off, since softmax does not see it."""
    kl: float
    """Mean KL(first || second) in nats."""
    same_top: float
    """Share of positions where both put the same token first."""
    losses: tuple[float, float]
    """Mean nats per next token."""

    def _repr_html_(self) -> str:
        cells = (
            ("largest logit difference", f"{self.max_logit_difference:.3g}"),
            ("KL, nats", f"{self.kl:.3g}"),
            ("same top token", f"{self.same_top:.1%}"),
            ("losses, nats", f"{self.losses[0]:.4f}, {self.losses[1]:.4f}"),
        )
        return table(cells)


@torch.no_grad()
def compare_models(first: Any, second: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> ModelComparison:
    """Run two models on the same tokens: two checkpoints, or one before and after an edit."""
    if tokens.ndim == 1:
        tokens = tokens[None]
    logits = [model(tokens, attention_mask=attention_mask).double() for model in (first, second)]
    if logits[0].shape != logits[1].shape:
        raise ValueError(f"the models' vocabularies differ: {logits[0].shape[-1]} and {logits[1].shape[-1]} rows")
    real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    losses = [float(lm_cross_entropy_loss(x, tokens, attention_mask)) for x in logits]
    p, q = (x[real].log_softmax(-1) for x in logits)
    a, b = (x[real] - x[real].mean(-1, keepdim=True) for x in logits)
    return ModelComparison(
        float((a - b).abs().max()),
        float((p.exp() * (p - q)).sum(-1).mean()),
        float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        (losses[0], losses[1]),
    )
