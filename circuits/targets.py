"""What is traced: a number that the run computed, and the covector that reads it off a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.read_values import columns_read, read_at
from hooked_mamba.frozen.places import Part, branch_of
from hooked_mamba.frozen.places import Stream as Stream
from hooked_mamba.frozen.run import Run
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.renamed import renamed_in
from saes.coder import SparseCoder

Metric = Callable[[Tensor], Tensor]
"""What a circuit should produce: from logits b l V to one number per row."""


class Covector(NamedTuple):
    """A number as vector . stream + offset, with norms held: one target on one row of the batch."""

    stream: Stream
    layer: Part
    """Of "resid" the number of the layer (n_layers: above all), of all others the part."""
    position: int
    vector: Float[Tensor, " d_or_E"] | Float[Tensor, "w d_or_E"]
    """At this position; of a number that reads w positions, at this one and those before it, the last row its own."""
    offset: Float[Tensor, ""]
    """Biases on the way from the stream to the number."""
    value: Float[Tensor, ""]
    """The number as the run had it."""

    @property
    def width(self) -> int:
        """Positions w at which there is a vector."""
        return len(self.vector) if self.vector.ndim > 1 else 1

    @property
    def columns(self) -> slice:
        """These positions."""
        return slice(self.position + 1 - self.width, self.position + 1)

    def of(self, values: Float[Tensor, "*n l e"]) -> Float[Tensor, "*n"]:
        """vector . values of the stream."""
        return (values[..., self.columns, :] * self.vector).sum((-2, -1))


@runtime_checkable
class Target(Protocol):
    """Anything with a label that finds its covector on a row of a run."""

    @property
    def label(self) -> str: ...

    def covector(self, run: Run, row: int) -> Covector: ...


@dataclass(frozen=True)
class Logit:
    """The logit of one token, or with `minus` its lead over another's, or over the mean of several.

    Parameters
    ----------
    token, minus
        Ids, or texts of one token each; a tuple has one for each row of the batch. A list of several for `minus`
        stands for their mean.
    position
        Where it is read; negative ones count from each row's last real token.
    """

    token: int | str | tuple[int | str, ...]
    position: int = -1
    minus: int | str | tuple[int | str, ...] | list[int | str] | None = None

    @property
    def label(self) -> str:
        less = "" if self.minus is None else f" - {self.minus!r}"
        return f"logit {self.token!r}{less}@{self.position}"

    def covector(self, run: Run, row: int) -> Covector:
        position, n = run.column(self.position, row), run.n_layers
        direction = self.of(run.unembedding, run, row)
        vector = run.behind_norm(n, direction, (row, position))
        value = self.of(run.logits_at(row, position).to(run.dtype), run, row)
        return Covector("resid", n, position, vector, run.norm_offset(n, direction), value)

    def of(self, logits: Float[Tensor, "... V"], run: Run, row: int = 0) -> Float[Tensor, "..."]:
        """This logit, or lead, of any logits of a row."""
        value = logits[..., run.token_id(self.token, row)]
        if self.minus is None:
            return value
        several = self.minus if isinstance(self.minus, list) else [self.minus]
        return value - logits[..., [run.token_id(other, row) for other in several]].mean(-1)


def chosen_targets(targets: Target | Sequence[Any]) -> list[Target]:
    """One target or several, as a list.

    Raises
    ------
    ValueError
        There is none.
    TypeError
        One of them is not a target.
    """
    found = [targets] if isinstance(targets, Target) else list(targets)
    if not found:
        raise ValueError("no target: give a Logit, a Feature, a Channel, a Direction, or several")
    for target in found:
        if not isinstance(target, Target):
            raise TypeError(
                f"expected a target (Logit, Feature, Channel, Direction), got {type(target).__name__}: {target!r}"
            )
    return found


def top_logits(run: Run, p: float | int = 0.95, most: int = 10, position: int = -1, row: int = 0) -> list[Logit]:
    """The logits of the most likely next tokens: as many as have a share p of the probability, but no more than `most`.

    Raises
    ------
    ValueError
        p is not above 0 and at most 1, or `most` is below 1.
    """
    if not 0 < p <= 1 or most < 1:
        raise ValueError(f"p must be above 0 and at most 1, and most at least 1; got p={p}, most={most}")
    probabilities = run.logits_at(row, run.column(position, row)).softmax(-1)
    best = probabilities.topk(min(most, len(probabilities)))
    count = int((best.values.cumsum(0) < p).sum()) + 1
    return [Logit(_named(run, int(token)), position) for token in best.indices[:count]]


def _named(run: Run, token: int) -> int | str:
    """A token's text, where it stands for this token alone."""
    if run.model.tokenizer is None:
        return token
    text = run.model.to_single_str_token(token)
    try:
        return text if run.token_id(text) == token else token
    except ValueError:  # text that the tokenizer reads as other tokens, such as half a character
        return token


@dataclass(frozen=True)
class Feature:
    """The pre-activation of one latent of a coder (of a gated coder, its gate)."""

    coder: SparseCoder = field(repr=False)
    index: int
    position: int = -1

    @property
    def label(self) -> str:
        cfg = self.coder.cfg
        kind, layer = "sae" if cfg.is_sae else "block", "" if cfg.layer is None else cfg.layer
        kind = kind if cfg.window == 1 else "window"
        branch = SiteName.parse(cfg.out_site).place.partition(".")[0]
        name = f"{branch}{layer}.{kind}" if branch in ("attn", "mlp", "moe") else f"{kind}{layer}"
        return f"{name}[{self.index}]@{self.position}"

    def covector(self, run: Run, row: int) -> Covector:
        coder, position = self.coder, run.column(self.position, row)
        if not 0 <= self.index < coder.cfg.d_sae:
            raise IndexError(f"feature {self.index} is out of range: this coder has {coder.cfg.d_sae}")
        columns = columns_read(coder.cfg, run, row, position)
        enc = coder.W_enc[:, self.index].detach().to(run.dtype)
        offset = coder.encoder_bias[self.index].detach().to(enc.dtype)
        if coder.cfg.apply_b_dec_to_input:
            offset = offset - enc @ coder.b_dec.detach().to(enc.dtype)
        f = enc.unflatten(0, (coder.cfg.window, -1))[columns.start - columns.stop :]
        stream, layer, vector = run.reading(coder.cfg.in_site, row, columns, f)
        offset = offset + run.norm_offset(run.place_of(coder.cfg.in_site), f.sum(0))
        x = read_at(coder.cfg, run, row, position).to(coder.W_enc.dtype)
        value = coder.preact_of(x, self.index).detach().to(enc.dtype)
        return Covector(stream, layer, position, vector, offset, value)


@dataclass(frozen=True)
class Channel:
    """What a channel of a layer's mixer passes on from a source position: the scan's input u; in a split layer, whose
    sources are tokens, the convolution's input p."""

    layer: Part
    """Of another branch than a mixer the part, as in "3.mlp", whose channels are neurons."""
    channel: int
    position: int

    @property
    def label(self) -> str:
        layer, branch = branch_of(self.layer)
        return f"{branch}{layer}[{self.channel}]@{self.position}"

    def covector(self, run: Run, row: int) -> Covector:
        position = run.column(self.position, row)
        check_part(run, self.layer)
        stream, chain = run.channels_at(self.layer), run.chain(self.layer)
        if not 0 <= self.channel < chain.width:
            raise IndexError(f"channel {self.channel} is out of range: there are {chain.width}")
        values = chain.values[stream][row, position]
        vector = torch.zeros_like(values)
        vector[self.channel] = 1
        return Covector(stream, self.layer, position, vector, values.new_zeros(()), values[self.channel])


@dataclass(frozen=True)
class Unit:
    """How long the vector is that an attention head passes on from a source position, or an expert's neurons at one:
    along itself, so that what made it so long sums to it. For units of one channel (neurons) it is the channel."""

    part: Part
    index: int
    position: int

    @property
    def label(self) -> str:
        layer, branch = branch_of(self.part)
        return f"{branch}{layer}[{self.index}]@{self.position}"

    def covector(self, run: Run, row: int) -> Covector:
        check_part(run, self.part)
        position, chain = run.column(self.position, row), run.chain(self.part)
        if chain.unit == 1:
            return Channel(self.part, self.index, self.position).covector(run, row)
        if not 0 <= self.index < chain.n_units:
            raise IndexError(f"unit {self.index} of {self.part} is out of range: there are {chain.n_units}")
        at = chain.channels_of(self.index, row, position)
        values = chain.u[row, position]
        vector = torch.zeros_like(values)
        size = values[at].norm()
        vector[at] = values[at] / torch.where(size == 0, 1, size)
        return Covector("u", self.part, position, vector, values.new_zeros(()), size)


def check_part(run: Run, part: Part) -> None:
    """Raise IndexError or KeyError for a branch that the model has not."""
    layer, branch = branch_of(part)
    if not 0 <= layer < run.n_layers:
        raise IndexError(f"layer {layer} is out of range: there are {run.n_layers}")
    if branch not in run.model.block(layer).branches:
        run.giving(layer, branch)


@dataclass(frozen=True)
class Direction:
    """A direction in the residual stream entering `layer` (n_layers: after the last block), or in a mixer's output."""

    vector: Float[Tensor, " d"] = field(repr=False)
    layer: int
    position: int = -1
    stream: Stream = "resid"
    name: str = "direction"

    @property
    def label(self) -> str:
        return f"{self.name}{self.layer}@{self.position}"

    def covector(self, run: Run, row: int) -> Covector:
        n, position = run.n_layers, run.column(self.position, row)
        layer = self.layer + (n + (self.stream == "resid")) * (self.layer < 0)
        if not 0 <= layer < n + (self.stream == "resid"):
            raise IndexError(f"layer {self.layer} is out of range for a model of {n} layers")
        vector = torch.as_tensor(self.vector).detach().to(run.dtype)
        if vector.shape != (run.model.cfg.d_model,):
            raise ValueError(f"a direction must be [{run.model.cfg.d_model}], got {list(vector.shape)}")
        x = run.resid(layer) if self.stream == "resid" else run.out(layer)
        return Covector(self.stream, layer, position, vector, vector.new_zeros(()), vector @ x[row, position])


__getattr__ = renamed_in(__name__, {"Head": "circuits.targets.Channel"})
