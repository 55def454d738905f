"""Where a number came from: embeddings, heads, features, biases, errors, which sum to it.

Every target is a covector on some stream (`circuits.targets`), and all go down together (`circuits.descent`), `batch`
of them at a time; memory is linear in the length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.coded_layer import LayerMode
from circuits.descent import Descent
from circuits.frozen_model import FrozenModel
from circuits.targets import Covector, Target
from hooked_mamba import HookedMamba, HookedMamba2
from saes.coder import SparseCoder
from saes.naming import Coders
from saes.sparse import Codes

Source = Literal["scan", "token"]


@dataclass(frozen=True)
class Attribution:
    """What each target is made of. n = targets x rows, all rows of a target together.

    Embeddings, features, biases, errors, initial state and offsets sum to the targets; `residual` is what rounding
    leaves. Heads are another cut through the same paths: what passes through a layer's channels.
    """

    labels: list[str]
    """One for each n."""
    rows: Int[Tensor, " n"]
    """Rows of the batch."""
    target: Float[Tensor, " n"]
    """The numbers as the run had them."""
    offset: Float[Tensor, " n"]
    """Biases between the target and the stream it reads, such as a coder's b_enc."""
    embeddings: Float[Tensor, "n l"]
    """What each token's embedding adds."""
    heads: dict[int, Float[Tensor, "n l E"]]
    """Layer -> what the scan's term of source s and channel e adds: ub_s u_s."""
    token_heads: dict[int, Float[Tensor, "n l E"]]
    """Layer -> what token s adds through all taps of channel e; with the convolution's bias they sum as heads do.
    In hybrid layers the local part, which the features stand for, is left out."""
    node_heads: dict[int, Float[Tensor, "n m"]]
    """Layer -> what the heads add that are nodes of their own, in the order of their (source, channel). In hybrid
    layers the source is the token."""
    features: dict[int, Float[Tensor, "n l k"]]
    """Layer -> what the active latents add."""
    codes: dict[int, Codes]
    """Layer -> which latents these are, b l k."""
    coder_biases: dict[int, Float[Tensor, " n"]]
    """Layer -> b_dec."""
    errors: dict[int, Float[Tensor, "n l"]]
    """Layer -> what the coder misses, at each position."""
    biases: dict[int, Float[Tensor, " n"]]
    """Layer -> biases of projections and convolution."""
    initial: dict[int, Float[Tensor, " n"]]
    """Layer -> memory before the first position."""

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
    def residual(self) -> Float[Tensor, " n"]:
        """target - total: rounding, unless hooks changed what lies between the cached sites."""
        return self.target - self.total

    def __repr__(self) -> str:
        worst = float(self.residual.abs().max()) if len(self.labels) else 0.0
        return f"Attribution({len(self.labels)} targets, layers {len(self.biases)}, largest residual {worst:.1e})"

    def top_heads(self, n: int = 10, of: int = 0, source: Source = "scan") -> list[tuple[int, int, int, float]]:
        """The largest heads of one target as (layer, channel, source position, effect), by absolute effect."""
        found = []
        for layer, heads in (self.heads if source == "scan" else self.token_heads).items():
            flat = heads[of].flatten()
            best = flat.abs().topk(min(n, flat.numel())).indices
            E = heads.shape[-1]
            found += [(layer, int(i) % E, int(i) // E, float(flat[i])) for i in best]
        return sorted(found, key=lambda head: -abs(head[3]))[:n]


def attribute(
    model: HookedMamba | HookedMamba2 | FrozenModel,
    coders: Coders | Iterable[SparseCoder] = (),
    prompt: str | Sequence[Any] | Tensor | None = None,
    targets: Target | Sequence[Any] = (),
    *,
    mode: LayerMode | dict[int, LayerMode] | None = None,
    keep_heads: bool = True,
    nodes: dict[int, Float[Tensor, "l E"]] | None = None,
    batch: int = 64,
    **run: Any,
) -> Attribution:
    """Take targets apart, exactly, with norms, gates and selection held at the prompt's run.

    Parameters
    ----------
    model
        A model, or a FrozenModel, which brings coders, prompt and mode with it.
    coders, prompt, mode, run
        As in :class:`FrozenModel` (run: attention_mask, initial_state).
    targets
        One or several; each is traced on every row of the batch.
    keep_heads
        Whether heads are kept: n l E numbers a layer.
    nodes
        Layer -> 1 at the heads (source, channel) that are nodes of their own: paths end there, so that `heads` holds
        direct effects and `node_heads` counts them into the total.
    batch
        Covectors that go down together.

    Raises
    ------
    ValueError
        No target or no prompt, or a FrozenModel together with what it brings.
    """
    frozen = _frozen(model, coders, prompt, mode, run)
    chosen = [targets] if isinstance(targets, Target) else list(targets)
    if not chosen:
        raise ValueError("no target: give a Logit, a Feature, a Direction, or several")
    for target in chosen:
        if not isinstance(target, Target):
            raise TypeError(f"expected a target (Logit, Feature, Direction), got {type(target).__name__}")
    with torch.no_grad():
        covectors = [target.covector(frozen, row) for target in chosen for row in range(frozen.batch)]
        rows = frozen.rows_of(len(chosen))
        read_out = {c.layer for c in covectors if c.stream == "out"}
        pieces = [
            Descent(frozen, covectors[i : i + batch], rows[i : i + batch], read_out, keep_heads, nodes or {}).run()
            for i in range(0, len(covectors), batch)
        ]
    labels = [target.label for target in chosen for _ in range(frozen.batch)]
    return _joined(labels, covectors, rows, pieces, frozen)


def _frozen(
    model: HookedMamba | HookedMamba2 | FrozenModel,
    coders: Coders | Iterable[SparseCoder],
    prompt: Any,
    mode: LayerMode | dict[int, LayerMode] | None,
    run: dict[str, Any],
) -> FrozenModel:
    if not isinstance(model, FrozenModel):
        if prompt is None:
            raise ValueError("no prompt: give text or token ids, or a FrozenModel in place of the model")
        return FrozenModel(model, prompt, coders, mode, **run)
    if prompt is not None or coders or mode is not None or run:
        raise ValueError("a FrozenModel brings its prompt, coders, mode and run with it: give targets alone")
    return model


def attribute_heads(
    model: HookedMamba | HookedMamba2 | FrozenModel,
    prompt: str | Sequence[Any] | Tensor | None = None,
    targets: Target | Sequence[Any] = (),
    *,
    batch: int = 64,
    **run: Any,
) -> Attribution:
    """Per-channel head attribution, with no dictionary: every layer is a mixer. See :func:`attribute`."""
    return attribute(model, (), prompt, targets, mode=None, batch=batch, **run)


def _joined(
    labels: list[str], covectors: list[Covector], rows: Tensor, pieces: list[dict[str, Any]], frozen: FrozenModel
) -> Attribution:
    by_layer: dict[str, dict[int, Tensor]] = {}
    for name in pieces[0]:
        if name != "embeddings":
            by_layer[name] = {i: torch.cat([piece[name][i] for piece in pieces]) for i in pieces[0][name]}
    return Attribution(
        labels=labels,
        rows=rows,
        target=torch.stack([c.value for c in covectors]),
        offset=torch.stack([c.offset for c in covectors]),
        embeddings=torch.cat([piece["embeddings"] for piece in pieces]),
        codes={i: coded.codes for i, coded in frozen.coded.items()},
        **by_layer,  # type: ignore[arg-type]
    )
