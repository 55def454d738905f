"""The published MambaCoder way of finding circuits, choice by choice, beside the exact one.

Ruggeri (2026, lorenzoruggerii.github.io/blog/2026/mambacoder; code: github.com/lorenzoruggerii/MambaCoder,
src/circuit_tracing.py) traces a feature at token t of layer l' to features of lower layers at t, to heads (layer,
source s < t) and to the embedding at t, and goes on from what it found. Each of its choices is an option here; the
default of each is exact. How they were read, where post and code leave something open or differ:

conv        "ratio": convolution and SiLU are one factor u_s / p_s, so that all of u_s counts as token s's own. Where
            p_s is 0 the published code divides by it; here such a channel passes nothing on.
ssm_input   "dest": a head adds alpha[t,s] u_t, as the code has it; the post's formula has u_s.
include_self, include_D
            False: sources stop before t, and D u_t is left out.
norm_at     "dest": what passes on from a head at s is scaled by the norm of t, r_t in place of r_s.
head        "argmax_sum": one node for each source; its number sums all channels, its label is the channel that adds
            most.
acts        "preact": features add pre-activations, all of them, negative ones too.
rank        "signed": the largest first, so that what takes away never comes up. The post prints embed0@3: 1.5, its
            notebook -1.5; signs are printed here.
input_norm  "layer_norm": the published coders were trained on layer_norm(n_t), but the code traces without one: coders
            are given n_t, no norm stands between a direction and an encoder (V_t = f_enc), and embeddings enter as
            what layer 0's norm makes of them. That is what is done here.
nodes       "beside": a coded layer's features and its mixer's heads are both counted; errors, biases and memory are
            not nodes.

What a trained coder predicts, layer_norm(x + block(x)) in the published training, belongs to the coder: no option.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.coded_layer import CodedLayer
from circuits.frozen_model import FrozenModel
from circuits.read_values import read_by
from circuits.rules import Rule
from hooked_mamba.frozen.chain import Chain, Pulled
from hooked_mamba.frozen.linear import Back, Gain, Mix, Rows
from hooked_mamba.frozen.places import Part
from hooked_mamba.frozen.run import Run
from hooked_mamba.renamed import renamed_in
from saes.files.checks import nearest
from saes.sparse import Codes


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """Choices of a method of tracing; see above. The defaults are exact."""

    conv: Literal["taps", "ratio"] = "taps"
    ssm_input: Literal["source", "dest"] = "source"
    include_self: bool = True
    include_D: bool = True
    norm_at: Literal["source", "dest"] = "source"
    head: Literal["each", "argmax_sum"] = "each"
    acts: Literal["active", "preact"] = "active"
    rank: Literal["absolute", "signed"] = "absolute"
    input_norm: Literal["model", "layer_norm"] = "model"
    nodes: Literal["once", "beside"] = "once"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            right = get_args(hints[field.name]) or (True, False)
            value = getattr(self, field.name)
            if value not in right:
                raise ValueError(f"{field.name} must be {' or '.join(map(repr, right))}, got {value!r}")

    @classmethod
    def of(cls, preset: str | PathOptions | None) -> PathOptions:
        """Options by the name of a preset; None: the exact method.

        Raises
        ------
        ValueError
            An unknown name; says the nearest.
        """
        if isinstance(preset, PathOptions):
            return preset
        if preset is None:
            return cls()
        if preset not in PRESETS:
            names = ", ".join(map(repr, PRESETS))
            raise ValueError(f"preset must be one of {names}, got {preset!r}{nearest(preset, PRESETS)}")
        return PRESETS[preset]

    def single(self) -> dict[str, PathOptions]:
        """The exact method with one of these choices each, by the name of the option."""
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: PathOptions(**{name: value}) for name, value in changed.items() if value != getattr(EXACT, name)}


EXACT = PathOptions()
PRESETS: dict[str, PathOptions] = {
    "exact": EXACT,
    "mambacoder": PathOptions(
        conv="ratio", ssm_input="dest", include_self=False, include_D=False, norm_at="dest", head="argmax_sum",
        acts="preact", rank="signed", input_norm="layer_norm", nodes="beside",
    ),
}  # fmt: skip
"""Name -> options."""


@dataclass(frozen=True)
class AllLatents(CodedLayer):
    """A coded layer that every latent adds to, by its pre-activation."""

    @classmethod
    def of(cls, frozen: FrozenModel, coded: CodedLayer) -> AllLatents:
        """From one that the active latents add to."""
        with torch.no_grad():
            preact = coded.coder.preact(read_by(coded.coder.cfg, frozen)).to(frozen.dtype)
        latents = torch.arange(preact.shape[-1], device=preact.device).expand(preact.shape)
        parts: dict[str, Any] = {field.name: getattr(coded, field.name) for field in dataclasses.fields(coded)}
        return cls(**{**parts, "codes": Codes(preact, latents)})

    def feature_effects(self, V: Float[Tensor, "n l d"], rows: Rows) -> Float[Tensor, "n l F"]:
        """What the latents add to covectors on the output."""
        return (V @ self.W_dec.to(V.dtype).t()) * self.codes.values[rows]


class Published(Rule):
    """The value path, taken back by the options.

    Parameters
    ----------
    options
        The choices.
    """

    def __init__(self, options: PathOptions) -> None:
        self.options = options
        self.reads_through_norms = options.input_norm == "model"
        self.sums = options == EXACT
        self._chains: dict[tuple[int, Part], Chain] = {}
        """Of the run, by how much of its beginning is looked at."""

    def chain(self, run: Run, part: Part, exact: Chain) -> Chain:
        """The exact chain, the convolution and the scan's own terms by the options."""
        key = (run.length, part)
        if key not in self._chains:
            chain = exact
            if self.options.conv == "ratio":
                ratio = torch.where(chain.p == 0, 0, chain.u / torch.where(chain.p == 0, 1, chain.p))
                chain = chain.replaced("p", "u", (Gain(ratio),))
            if chain.mix is not None:
                mix = PartialMix(chain.mix.scan, chain.mix.h0, None, self.options)
                chain = chain.replaced("u", "y", (mix,))
            self._chains[key] = chain
        return self._chains[key]

    def pull(
        self,
        run: Run,
        part: Part,
        V: Float[Tensor, "n l d"],
        rows: Rows,
        through: Float[Tensor, "*n l E"] | None = None,
    ) -> PublishedPulled:
        chain = run.chain(part)
        share: Tensor | int = 1 if through is None else through
        above = chain.pull(V, rows, until="u")
        ub, vy, u = above.at["u"], above.at["y"], chain.u[rows]
        heads = ub * u
        if self.options.ssm_input == "dest":
            heads = chain.pull(vy * u, rows, start="y", until="u").below
        pulled = chain.pull(ub * share, rows, start="u")
        if self.options.norm_at == "dest":  # of what passes a norm: biases and memory do not
            r = run.norm_factor(part)[rows]
            ub = chain.pull(vy * r, rows, start="y", until="u").below / r
            scaled = chain.pull(ub * share, rows, start="u")
            pulled = dataclasses.replace(scaled, bias=pulled.bias, initial=pulled.initial)
        bias, initial = pulled.bias + above.bias, pulled.initial + above.initial
        return PublishedPulled(pulled.below, {**pulled.at, "u": ub}, bias, initial, heads)


def optioned(frozen: FrozenModel, options: PathOptions) -> FrozenModel:
    """A run that another method reads: the run's own activations, taken back by the options.

    Raises
    ------
    ValueError
        The run follows a `selection`, or has a write dictionary, which have no such choices.
    """
    if frozen.rule.name != "none":
        raise ValueError(f"a run with selection {frozen.rule.name!r} has no preset: give one with selection 'none'")
    written = [coded.part for coded in frozen.coded.values() if coded.node == "u"]
    if written:
        raise ValueError(
            f"layer {written[0]} is read through a write dictionary, which the published method has not: trace without"
            " a preset"
        )
    coded = frozen.coded
    if options.acts == "preact":
        coded = {layer: AllLatents.of(frozen, coded) for layer, coded in frozen.coded.items()}
    return frozen.read_by(Published(options), coded)


@dataclass(frozen=True)
class PublishedPulled(Pulled):
    """`at["u"]` is what goes on from each channel."""

    heads: Float[Tensor, "n l E"]
    """What each channel at a source adds."""


@dataclass(frozen=True)
class PartialMix(Mix):
    """A scan whose adjoint lacks the terms that are left out."""

    options: PathOptions = EXACT

    def of(self, rows: Any) -> PartialMix:
        return dataclasses.replace(self, rows=rows)

    def pull(self, v: Float[Tensor, "n l E"]) -> Back:
        back = super().pull(v)
        covector = back.covector
        if not self.options.include_self:
            covector = covector - (self.own() if self.rows is None else self.own()[self.rows]) * v
        if not self.options.include_D:
            skip = self.skip()
            covector = covector - (skip if self.rows is None or skip.ndim == 1 else skip[self.rows]) * v
        return back._replace(covector=covector)

    def diagonal(self) -> Tensor:
        return self.own() * self.options.include_self + self.skip() * self.options.include_D


__getattr__ = renamed_in(__name__, {"OptionedModel": "circuits.published.optioned"})
