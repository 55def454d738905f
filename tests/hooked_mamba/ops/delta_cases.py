"""Inputs of `delta_scan`, and an independent loop over batch, heads and positions with whole transition matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from hooked_mamba.ops import StateEdits

OUTPUTS = ("y", "h_last", "states", "recall")


def delta_inputs(
    batch: int, l: int, H: int, K: int, V: int, per: str = "key", least: float = 0.55, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments in float64 that float32 holds exactly; decays in (least, 1) per "key" or per "head";
    "multiple" is per head, with b given as a multiple of k.

    The transition removes up to all of what lies under a unit key, as in RWKV-7, so that states stay small.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    key = torch.nn.functional.normalize(normal(batch, l, H, K), dim=-1)
    rate = torch.rand(batch, l, H, K if per == "key" else 1, generator=random)
    multiple = per == "multiple"
    made = {
        "r": normal(batch, l, H, K),
        "w": least + (1 - least) * torch.rand(batch, l, H, K if per == "key" else 1, generator=random),
        "k": key if multiple else normal(batch, l, H, K),
        "v": normal(batch, l, H, V),
        "a": key,
        "b": -rate if multiple else -rate * key,
        "h0": normal(batch, H, V, K),
    }
    return {name: value.double() for name, value in made.items()}


def transition(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """diag(w) + a b^T for one position of one head."""
    return torch.diag(w.expand_as(a)) + torch.outer(a, b)


def whole(b: Tensor, k: Tensor) -> Tensor:
    """b, where it is given as a multiple of k."""
    return b if b.shape[-1] == k.shape[-1] else b * k


def plain_loop(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, h0: Tensor | None, edits: StateEdits | None = None
) -> dict[str, Tensor]:
    """y, recall and all states, from S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T."""
    batch, l, H, V = v.shape
    b = whole(b, k)
    S = [[torch.zeros(V, k.shape[3]).to(v) if h0 is None else h0[i, j] for j in range(H)] for i in range(batch)]
    ys, recalls, states = [], [], []
    for t in range(l):
        for i in range(batch):
            for j in range(H):
                recalls.append(S[i][j] @ a[i, t, j])
                S[i][j] = S[i][j] @ transition(w[i, t, j], a[i, t, j], b[i, t, j]) + torch.outer(v[i, t, j], k[i, t, j])
                if edits is not None and t in edits.at:
                    at = list(edits.at).index(t)
                    S[i][j] = S[i][j] * edits.scale[i, at, j] + edits.add[i, at, j]
                ys.append(S[i][j] @ r[i, t, j])
                states.append(S[i][j])
    y, recall = (torch.stack(each).view(l, batch, H, V).transpose(0, 1) for each in (ys, recalls))
    states = torch.stack(states).view(l, batch, H, V, -1).transpose(0, 1)
    return {"y": y, "h_last": states[:, -1], "states": states, "recall": recall}


def dense_rows(r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """alpha[t, s] = k_s^T M_{s+1} ... M_t r_t for all pairs, b l H l, by multiplying the matrices out."""
    batch, l, H, K = r.shape
    b, alpha = whole(b, k), torch.zeros(batch, l, H, l).to(r)
    for i in range(batch):
        for j in range(H):
            for t in range(l):
                product = torch.eye(K).to(r)
                for s in range(t, -1, -1):
                    alpha[i, t, j, s] = k[i, s, j] @ product @ r[i, t, j]
                    product = transition(w[i, s, j], a[i, s, j], b[i, s, j]) @ product
    return alpha
