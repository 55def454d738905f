"""A rank-one edit of a fact at out_proj (ROME; Meng et al. 2022, arXiv:2202.05262; on Mamba: arXiv:2404.03646).

out_proj is read as a memory, W k = v: k is what it reads at the subject's last token, v what it writes there.

1. k is averaged over prompts that end in the same subject, so that it represents the subject and not one prompt.
2. v* is found by gradient descent: what should be written there for the model to give the new answer.
3. W + (v* - W k) (C^-1 k)^T / (k^T C^-1 k) maps k to v* exactly and changes other keys least, weighted by their second
moment C = mean k k^T over ordinary text (the least-squares solution under that constraint).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.display import Shown
from hooked_mamba.layers import weights_of
from hooked_mamba.renamed import renamed_in


@dataclass(frozen=True)
class RankOneEdit(Shown):
    """An edit of weights, ready to be applied."""

    layer: int
    key: Float[Tensor, " E"]
    """k."""
    value: Float[Tensor, " d"]
    """v*, the bias of out_proj not included."""
    delta: Float[Tensor, "d E"]
    """What is added to out_proj's weight; of rank one."""
    losses: list[float]
    """Nats of the new answer at each gradient step."""
    branch: str = "mixer"
    """Whose output weights are edited: "mixer" (out_proj) or "mlp" (down_proj)."""

    def apply(self, model: Any) -> Any:
        """A copy of the model with the edit applied."""
        edited = copy.deepcopy(model)
        weight, _ = weights_of(output_layer(edited, self.layer, self.branch), "the output layer")
        with torch.no_grad():
            weight += self.delta.to(weight)
        return edited


@torch.no_grad()
def key_moment(
    model: Any, layer: int, batches: Iterable[Int[Tensor, "..."]], branch: str = "mixer"
) -> Float[Tensor, "E E"]:
    """C: the mean of k k^T over all positions of ordinary text."""
    name = key_site(model, layer, branch)
    total, count = None, 0
    for tokens in batches:
        _, cache = model.run_with_cache(tokens, names_filter=name, stop_at_layer=layer + 1)
        keys = cache[name].flatten(0, 1).double()
        total = keys.t() @ keys if total is None else total + keys.t() @ keys
        count += len(keys)
    if total is None:
        raise ValueError("key_moment needs at least one batch of text")
    return total / count


def key_site(model: Any, layer: int, branch: str = "mixer") -> str:
    """The site that a branch's output weights read.

    Raises
    ------
    ValueError
        The block has no such branch, or the branch no such site.
    """
    found = model.block(layer).branches
    if branch not in found:
        raise ValueError(f"block {layer} has no branch {branch!r}; it has {', '.join(found)}")
    site = found[branch].vectors_site
    if site is None:
        title = found[branch].title
        raise ValueError(f"{title} has no site for what its output's weights read: nothing can be edited there")
    return f"blocks.{layer}.{branch}.{site}"


def output_layer(model: Any, layer: int, branch: str) -> Any:
    """The linear layer by which a branch writes."""
    module = model.block(layer).branches[branch]
    return getattr(module, "out_proj", None) or module.down_proj


def rank_one_edit(
    model: Any,
    prompts: Sequence[Tensor],
    subject: Sequence[int],
    answer: int,
    layer: int,
    moment: Float[Tensor, "E E"],
    steps: int = 25,
    lr: float = 0.5,
    decay: float = 0.0,
    ridge: float = 1e-4,
    branch: str = "mixer",
) -> RankOneEdit:
    """Find the edit that makes the model continue the prompts with `answer`.

    Parameters
    ----------
    prompts
        Rows of tokens, each 1 l or l; they may differ in length.
    subject
        For each, the position of the subject's last token.
    answer
        The new next token.
    layer
        Where to edit; causal tracing of "out_proj" suggests candidates.
    moment
        C, from :func:`key_moment`.
    steps, lr, decay
        Of Adam, on v*; decay pulls it back to what is written now.
    ridge
        Added to C's diagonal, as a fraction of its mean, so that C can be inverted.
    branch
        "mixer", or "mlp" for the down projection of an MLP.
    """
    if len(prompts) != len(subject) or not prompts:
        raise ValueError(f"{len(prompts)} prompts, but {len(subject)} subject positions")
    rows = [p if p.ndim == 2 else p[None] for p in prompts]
    key_name = key_site(model, layer, branch)
    out_site = f"blocks.{layer}.{branch}.{model.block(layer).branches[branch].out_site}"
    keys, written = [], []
    with torch.no_grad():
        for row, t in zip(rows, subject, strict=True):
            _, cache = model.run_with_cache(row, names_filter=[key_name, out_site], stop_at_layer=layer + 1)
            keys.append(cache[key_name][0, t])
            written.append(cache[out_site][0, t])
    key = torch.stack(keys).mean(0)
    now = torch.stack(written).mean(0)
    shift = torch.zeros_like(now, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=lr * float(now.norm()) / now.numel() ** 0.5)
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            loss = torch.stack(
                [_loss(model, row, out_site, t, shift, answer) for row, t in zip(rows, subject, strict=True)]
            )
            total = loss.mean() + decay * shift.norm() / now.norm()
            losses.append(float(loss.detach().mean()))
            (shift.grad,) = torch.autograd.grad(total, [shift])
            if not shift.grad.any():
                raise ValueError(
                    f"what layer {layer} writes at positions {list(subject)} cannot reach the answer: choose an earlier"
                    " layer, or the prompt's last position"
                )
            optimizer.step()

    linear = output_layer(model, layer, branch)
    bias = 0 if linear.bias is None else linear.bias.detach()
    value = (now - bias + shift.detach()).double()
    W, k = linear.weight.detach().double(), key.double()
    eye = torch.eye(len(k), dtype=k.dtype, device=k.device)
    direction = torch.linalg.solve(moment.to(k) + ridge * moment.diagonal().mean().to(k) * eye, k)
    delta = torch.outer(value - W @ k, direction) / (k @ direction)
    return RankOneEdit(layer, key, value.to(key.dtype), delta.to(key.dtype), losses, branch)


def _loss(model: Any, row: Tensor, site: str, t: int, shift: Tensor, answer: int) -> Tensor:
    def write(value: Tensor, hook: Any) -> Tensor:
        added = torch.zeros_like(value)
        added[:, t] = 1
        return value + added * shift.to(value.dtype)

    logits = model.run_with_hooks(row, fwd_hooks=[(site, write)])
    return -logits[0, -1].log_softmax(-1)[answer]


__getattr__ = renamed_in(__name__, {"Edit": "hooked_mamba.analysis.rank_one_edit.RankOneEdit"})
