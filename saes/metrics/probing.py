"""Sparse probing and absorption: whether concepts have their own latents, on data whose concepts are known.

Sparse probing (Gurnee et al. 2023, arXiv:2305.01610): a logistic regression on the k latents whose means differ most
between examples with and without a concept. A good dictionary needs one.

Absorption (Chanin et al. 2024, arXiv:2409.14507): where a child implies its parent, a dictionary saves a latent by
letting the child's say both; the parent's latent is then silent on its own examples. Here parents and children are
planted (`saes.synthetic`, "families"): the parent's direction is known, where the paper fits a probe for it, and a
latent is a concept's own if there is no concept that it detects better, where the paper takes the best probe's latents,
among which children's would be as soon as they are frequent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saes.coder import SparseCoder
from saes.synthetic import CHILDREN, PlantedDictionary

RIDGE = 1e-3
"""Penalty on the squared weights of a probe, per example; inputs have variance 1."""

LEAST_F1 = 0.1
"""F1 from which a latent is a concept's own, if it is no better at another."""

LEAST_COSINE = 0.025
LEAST_SHARE = 0.4
"""A latent absorbs the parent where its decoder row has this cosine with it or more, and says at least this share of
what the example holds along the parent's direction."""


def fit_probe(x: Float[Tensor, "n k"], labels: Bool[Tensor, " n"], steps: int = 25) -> Float[Tensor, " k_and_1"]:
    """Weights and bias of a ridge logistic regression, by Newton's method; x has variance 1 or so."""
    ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    y = labels.double()
    penalty = torch.full((ones.shape[1],), RIDGE * len(x), dtype=torch.float64)
    penalty[-1] = 1e-9 * len(x)
    w = torch.zeros(ones.shape[1], dtype=torch.float64)

    def loss(w: Tensor) -> float:
        s = ones @ w
        return float(torch.nn.functional.softplus(s).sum() - s @ y + (penalty * w.square()).sum() / 2)

    best = loss(w)
    for _ in range(steps):
        p = torch.sigmoid(ones @ w)
        gradient = ones.t() @ (p - y) + penalty * w
        hessian = (ones * (p * (1 - p)).unsqueeze(1)).t() @ ones + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-4 and loss(w - size * step) > best:
            size /= 2
        w = w - size * step
        now = loss(w)
        if best - now < 1e-9 * len(x):
            break
        best = now
    return w


def f1_score(said: Bool[Tensor, " n"], there: Bool[Tensor, " n"]) -> float:
    """2 hits / (said + there); 0 where nothing is there and nothing said."""
    either = int(said.sum() + there.sum())
    return 2 * int((said & there).sum()) / either if either else 0.0


@dataclass(frozen=True)
class Probes:
    """How well concepts can be read off k latents; means over concepts, on examples that the probes have not seen."""

    ks: tuple[int, ...]
    f1: tuple[float, ...]
    """For each k."""
    accuracy: tuple[float, ...]
    """Mean of the shares of positive and of negative examples that are judged rightly, for each k."""
    dense_f1: float | None
    """Of a probe on the activations themselves; None if they were not given."""
    latents: Int[Tensor, "concepts k"]
    """The latents chosen for each concept, the most telling first."""
    concept_f1: Float[Tensor, "ks concepts"]

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping."""
        values = asdict(self)
        return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in values.items()}


@torch.no_grad()
def sparse_probing(
    z: Float[Tensor, "n F"],
    labels: Bool[Tensor, "n concepts"],
    ks: Sequence[int] = (1, 2, 5),
    *,
    x: Float[Tensor, "n d"] | None = None,
    seed: int = 0,
) -> Probes:
    """Probe latents for concepts.

    Parameters
    ----------
    z
        Latents of n examples.
    labels
        Which concepts are in them.
    ks
        Latents a probe may use.
    x
        The activations, for a dense probe to compare with.
    seed
        Of the split into halves: one to choose latents and fit, one to judge.

    Raises
    ------
    ValueError
        If a concept is in all or none of a half's examples.
    """
    z, labels, x = z.detach().cpu(), labels.cpu(), None if x is None else x.detach().cpu()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(z) // 2], order[len(z) // 2 :]
    for half in (train, test):
        found = labels[half].sum(0)
        for concept in ((found == 0) | (found == len(half))).nonzero().flatten().tolist():
            raise ValueError(f"concept {concept} is in {int(found[concept])} of {len(half)} examples: nothing to tell")
    most = max(ks)
    chosen = torch.stack([_telling(z[train], labels[train, c], most) for c in range(labels.shape[1])])
    f1 = torch.zeros(len(ks), labels.shape[1], dtype=torch.float64)
    accuracy = torch.zeros_like(f1)
    dense = []
    for c in range(labels.shape[1]):
        for i, k in enumerate(ks):
            f1[i, c], accuracy[i, c] = _probe(z[:, chosen[c, :k]], labels[:, c], train, test)
        if x is not None:
            dense.append(_probe(x, labels[:, c], train, test)[0])
    return Probes(
        tuple(ks),
        tuple(f1.mean(1).tolist()),
        tuple(accuracy.mean(1).tolist()),
        sum(dense) / len(dense) if dense else None,
        chosen,
        f1,
    )


def _telling(z: Tensor, labels: Tensor, k: int) -> Tensor:
    """The k latents whose means differ most, in units of their spread."""
    z = z.double()
    difference = z[labels].mean(0) - z[~labels].mean(0)
    spread = z.std(0)
    return torch.where(spread > 0, difference.abs() / spread.clamp(min=1e-300), 0.0).topk(k).indices


def _probe(x: Tensor, labels: Tensor, train: Tensor, test: Tensor) -> tuple[float, float]:
    """F1 and balanced accuracy on the second half."""
    x = x.double()
    mean, spread = x[train].mean(0), x[train].std(0)
    x = (x - mean) / torch.where(spread > 0, spread, 1.0)
    w = fit_probe(x[train], labels[train])
    said, there = x[test] @ w[:-1] + w[-1] > 0, labels[test]
    rates = (said[there].double().mean(), (~said[~there]).double().mean())
    return f1_score(said, there), float(sum(rates) / 2)


@dataclass(frozen=True)
class Absorption:
    """Means over parents, over examples that hold the parent."""

    absorbed: float
    """Share on which the parent's own latents are silent and another latent says the parent."""
    silent: float
    """Share on which the parent's own latents are silent."""
    silent_with_child: float
    """The same among examples with a child."""
    silent_alone: float
    """The same among examples without."""
    latents: float
    """Latents a parent has of its own: more than 1 where it is split, less where some have none."""
    f1: float
    """Of those latents, any of them, as a detector of the parent."""

    def to_dict(self) -> dict[str, float]:
        """A plain mapping."""
        return asdict(self)


@torch.no_grad()
def absorption(planted: PlantedDictionary, coder: SparseCoder, *, n: int = 20_000, seed: int = 0) -> Absorption:
    """How often children's latents represent what their parents' latents should.

    Parameters
    ----------
    planted
        Of the scenario "families".
    coder
        Trained on its examples.
    n, seed
        Fresh examples to judge on.

    Raises
    ------
    ValueError
        If there are no families.
    """
    if planted.scenario != "families":
        raise ValueError(f"absorption needs the scenario 'families', this is {planted.scenario!r}")
    x, amounts = planted.sample(n, torch.Generator().manual_seed(seed))
    z = coder.encode(x.to(coder.W_dec)).cpu()
    W_dec = coder.W_dec.detach().cpu()
    x, atoms = x.to(W_dec), planted.atoms.to(W_dec)
    best = _f1_scores(z != 0, amounts != 0).max(1)
    rows = W_dec / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
    group = 1 + CHILDREN
    figures = []
    for p in range(0, len(atoms), group):
        here = amounts[:, p] != 0
        own = (best.indices == p) & (best.values >= LEAST_F1)
        child = (amounts[here, p + 1 : p + group] != 0).any(1)
        speaks = (z[:, own] != 0).any(1)
        silent = ~speaks[here]
        said = z[here] * (W_dec @ atoms[p])
        said[:, own] = -torch.inf
        loudest, which = said.max(1)
        absorbs = (rows[which] @ atoms[p] >= LEAST_COSINE) & (loudest >= LEAST_SHARE * (x[here] @ atoms[p]))
        figures.append(
            (
                _share(silent & absorbs & (loudest > 0)),
                _share(silent),
                _share(silent[child]),
                _share(silent[~child]),
                float(own.sum()),
                f1_score(speaks, here),
            )
        )
    return Absorption(*(sum(column) / len(figures) for column in zip(*figures, strict=True)))


def _f1_scores(said: Bool[Tensor, "n F"], there: Bool[Tensor, "n A"]) -> Float[Tensor, "F A"]:
    """Of every latent as a detector of every concept."""
    hits = said.t().float() @ there.float()
    return 2 * hits / (said.sum(0).unsqueeze(1) + there.sum(0)).clamp(min=1)


def _share(mask: Bool[Tensor, " n"]) -> float:
    return float(mask.double().mean()) if len(mask) else 0.0
