"""Contributions to a number: of embeddings, heads, features, biases and errors, which sum to it.

Every target is a covector on some stream (`circuits.targets`), and all go down together (`circuits.descent`), `batch`
of them at a time; memory is linear in the length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.coded_layer import LayerMode
from circuits.descent import Descent, alike, until
from circuits.frozen_model import FrozenModel, frozen_of
from circuits.parts import Deferred, Parts
from circuits.points import PointDescent, by_depth, stays
from circuits.targets import Covector, Target, chosen_targets
from hooked_mamba.frozen.places import Part
from hooked_mamba.frozen.tokens import Source
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.naming import Coders
from saes.sparse import Codes


@dataclass(kw_only=True)
class Attribution(Parts):
    """Contributions to each target. n = targets x rows, all rows of a target together.

    Embeddings, features, biases, errors, initial state and offsets sum to the targets; `residual` is what rounding
    leaves. Heads divide the same paths another way: by the channels of a layer that they pass through.
    """

    labels: list[str]
    """One for each n."""
    rows: Int[Tensor, " n"]
    """Rows of the batch."""
    target: Float[Tensor, " n"]
    """The numbers as the run had them."""
    offset: Float[Tensor, " n"]
    """Biases between the target and the stream it reads, such as a coder's b_enc."""
    codes: dict[Part, Codes]
    """Part -> which latents `features` speaks of, b l k."""

    @property
    def total(self) -> Float[Tensor, " n"]:
        """The sum of all parts."""
        parts = [self.embeddings.sum(1), self.offset]
        parts += [value.flatten(1).sum(1) for value in self._summed()]
        parts += [*self.coder_biases.values(), *self.biases.values(), *self.initial.values()]
        return torch.stack(parts).sum(0)

    def _summed(self) -> list[Tensor]:
        return [*self.features.values(), *self.errors.values(), *self.node_heads.values()]

    @property
    def size(self) -> Float[Tensor, " n"]:
        """The sum of absolute contributions: the scale against which rounding is measured."""
        parts = [self.target.abs(), self.embeddings.abs().sum(1), self.offset.abs()]
        parts += [value.abs().flatten(1).sum(1) for value in self._summed()]
        ends = (*self.coder_biases.values(), *self.biases.values(), *self.initial.values())
        return torch.stack([*parts, *(value.abs() for value in ends)]).sum(0)

    @property
    def residual(self) -> Float[Tensor, " n"]:
        """target - total: rounding, unless hooks changed what lies between the cached sites (see `unexplained`)."""
        return self.target - self.total

    def __repr__(self) -> str:
        worst = float(self.residual.abs().max()) if len(self.labels) else 0.0
        return f"Attribution({len(self.labels)} targets, layers {len(self.biases)}, largest residual {worst:.1e})"

    def top_heads(self, n: int = 10, of: int = 0, source: Source = "scan") -> list[tuple[Part, int, int, float]]:
        """The largest channels of one target as (layer, channel, source position, effect), by absolute effect."""
        found = []
        for layer, heads in (self.heads if source == "scan" else self.token_heads).items():
            flat = heads[of].flatten()
            best = flat.abs().topk(min(n, flat.numel())).indices
            E = heads.shape[-1]
            found += [(layer, int(i) % E, int(i) // E, float(flat[i])) for i in best]
        return sorted(found, key=lambda head: -abs(head[3]))[:n]


def attribute(
    model: HookedModel | FrozenModel,
    coders: Coders | Iterable[SparseCoder] = (),
    prompt: str | Sequence[Any] | Tensor | None = None,
    targets: Target | Sequence[Any] = (),
    *,
    mode: LayerMode | Mapping[Part, LayerMode] | None = None,
    keep_heads: bool | None = None,
    nodes: Mapping[Part, Float[Tensor, "l U"]] | None = None,
    batch: int = 64,
    unexplained: Literal["refuse", "keep"] = "refuse",
    **run: Any,
) -> Attribution:
    """Decompose targets exactly, with norms, gates and selection frozen at their values in the run.

    Parameters
    ----------
    model
        A model, or a FrozenModel, which brings coders, prompt and mode with it.
    coders, prompt, mode, run
        As in :class:`FrozenModel` (run: attention_mask, initial_state).
    targets
        One or several; each is traced on every row of the batch.
    keep_heads
        Whether heads are kept: twice n l E numbers per layer. None: yes; of a run that recomputes (long prompts) they
        are formed, by one more way down, when they are first read.
    nodes
        Part -> 1 at the units (source; channel, attention head, neuron or expert) that are nodes of their own: paths
        end there, so that `heads` holds direct effects and `node_heads` counts them into the total.
    batch
        Covectors that go down together.
    unexplained
        What to do where the parts do not sum to a target, since functions on hook points changed values that the
        frozen model takes for computed: "refuse", or "keep" the sum as it is and see `residual`.

    Raises
    ------
    ValueError
        No target or no prompt, a FrozenModel together with what it brings, or parts that do not sum.
    """
    if unexplained not in ("refuse", "keep"):
        raise ValueError(f"unexplained must be 'refuse' or 'keep', got {unexplained!r}")
    frozen, chosen = frozen_of(model, prompt, coders, mode, **run), chosen_targets(targets)
    deferred = keep_heads is None and frozen.recomputes
    keep_heads = not deferred if keep_heads is None else keep_heads
    with torch.no_grad():
        covectors = [target.covector(frozen, row) for target in chosen for row in range(frozen.batch)]
        rows = frozen.rows_of(len(chosen))
        read_out = {c.layer for c in covectors if c.stream == "out"}
        points = not nodes and stays(frozen, covectors)
        order = by_depth(covectors, batch) if points else alike(covectors, frozen, batch)
        pieces, beginnings = [], {frozen.length: frozen}
        for places in order:
            mine = [covectors[i] for i in places]
            if points:
                pieces.append(PointDescent(frozen, mine, rows[places], keep_heads).run())
                continue
            stop = until(mine, frozen.length)
            if stop not in beginnings:
                beginnings[stop] = frozen.upto(stop)
            seen = beginnings[stop]
            ends = {layer: mask[: seen.length] for layer, mask in (nodes or {}).items()}
            pieces.append(Descent(seen, mine, rows[places], read_out, keep_heads, ends).run())
    labels = [target.label for target in chosen for _ in range(frozen.batch)]
    found = Attribution(
        labels=labels,
        rows=rows,
        target=torch.stack([c.value for c in covectors]),
        offset=torch.stack([c.offset for c in covectors]),
        codes={i: coded.codes for i, coded in frozen.coded.items()},
        **vars(Parts.joined(pieces, order, frozen.length, nodes or {})),
    )
    if deferred:
        again = cache(
            partial(attribute, frozen, targets=chosen, keep_heads=True, nodes=nodes, batch=batch, unexplained="keep")
        )
        found.heads, found.token_heads = Deferred(lambda: again().heads), Deferred(lambda: again().token_heads)
    if unexplained == "refuse" and frozen.rule.sums:
        _check_sum(frozen, found, covectors)
    return found


def require_sums(frozen: FrozenModel, targets: Sequence[Target]) -> None:
    """Refuse a run under functions on hook points that the frozen model does not reproduce; see :func:`attribute`."""
    if frozen.edited and frozen.rule.name == "none":
        attribute(frozen, targets=targets, keep_heads=False)


def _check_sum(frozen: FrozenModel, found: Attribution, covectors: list[Covector]) -> None:
    eps = torch.finfo(frozen.model.embed.weight.dtype).eps
    # What cancels within a product is in no part: a target far below its factors is rounding itself.
    rows = found.rows.tolist()
    factors = [
        float(frozen.value_of(c.stream, c.layer)[row, c.columns].norm() * c.vector.norm())
        for c, row in zip(covectors, rows, strict=True)
    ]
    measured = zip(found.residual.abs().tolist(), found.size.tolist(), factors, strict=True)
    bounds = ((residual, eps**0.5 * size + 1000 * eps * factor) for residual, size, factor in measured)
    wrong = [i for i, (residual, bound) in enumerate(bounds) if not residual <= bound]  # NaN is wrong as well
    if not wrong:
        return
    i = wrong[0]
    where = ", ".join(frozen.edited[:5]) + (", ..." if len(frozen.edited) > 5 else "")
    cause = f"functions sat on {where} during the run" if where else "the cached sites do not reproduce the run"
    raise ValueError(
        f"the parts of {found.labels[i]} sum to {float(found.total[i]):.4g} and the run had"
        f" {float(found.target[i]):.4g}: {cause}. An edit of a value on the way (a stream, a branch's output) is no"
        " part of the sum: explain the run without hooks, edit the weights or the input instead, or look at the parts"
        " as they are with unexplained='keep'"
    )


def attribute_heads(
    model: HookedModel | FrozenModel,
    prompt: str | Sequence[Any] | Tensor | None = None,
    targets: Target | Sequence[Any] = (),
    *,
    batch: int = 64,
    **run: Any,
) -> Attribution:
    """Attribution to channels, with no dictionary: every layer is a mixer. See :func:`attribute`."""
    return attribute(model, (), prompt, targets, mode=None, batch=batch, **run)
