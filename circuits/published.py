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
from jaxtyping import Float, Int
from torch import Tensor

from circuits.coded_layer import CodedLayer
from circuits.frozen_mixer import FrozenMixer, Pulled
from circuits.frozen_model import FrozenModel
from circuits.targets import Stream
from hooked_mamba.components import at_least_fp32
from hooked_mamba.hooks.names import unalias
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
            preact = coded.coder.preact(frozen.value_at(coded.coder.cfg.in_site)).to(frozen.dtype)
        latents = torch.arange(preact.shape[-1], device=preact.device).expand(preact.shape)
        parts: dict[str, Any] = {field.name: getattr(coded, field.name) for field in dataclasses.fields(coded)}
        return cls(**{**parts, "codes": Codes(preact, latents)})

    def feature_effects(self, V: Float[Tensor, "n l d"], rows: Tensor) -> Float[Tensor, "n l F"]:
        """What the latents add to covectors on the output."""
        return (V @ self.W_dec.to(V.dtype).t()) * self.codes.values[rows]


class OptionedModel(FrozenModel):
    """A run that another method reads: the frozen model's own activations, taken back by the options.

    Parameters
    ----------
    frozen
        The run; it is shared, and stays as it is.
    options
        The choices.

    Raises
    ------
    ValueError
        The run follows a `selection`, which has no such choices.
    """

    def __init__(self, frozen: FrozenModel, options: PathOptions) -> None:
        if frozen.rule.name != "none":
            raise ValueError(f"a run with selection {frozen.rule.name!r} has no preset: give one with selection 'none'")
        self.__dict__.update(vars(frozen))
        self.options = options
        self._exact, self._mixers = frozen, {}
        if options.acts == "preact":
            self.coded = {layer: AllLatents.of(self, coded) for layer, coded in frozen.coded.items()}

    def mixer(self, layer: int) -> FrozenMixer:
        """The constants of one layer, with the options."""
        if layer not in self._mixers:
            mixer = self._exact.mixer(layer)
            parts: dict[str, Any] = {field.name: getattr(mixer, field.name) for field in dataclasses.fields(mixer)}
            r = 1 / at_least_fp32(self.cache[f"blocks.{layer}.norm.hook_scale"])
            self._mixers[layer] = OptionedMixer(**parts, options=self.options, r=r)
        return self._mixers[layer]

    def reading(
        self, site: str, row: int, position: int, covector: Float[Tensor, " d"]
    ) -> tuple[Stream, int, Float[Tensor, " d"]]:
        """As in the exact model, but for a norm that is left out."""
        if self.options.input_norm == "model":
            return super().reading(site, row, position, covector)
        return *self._stream_of(unalias(site)), covector

    @property
    def embeddings(self) -> Float[Tensor, "b l d"]:
        """What a covector at the bottom meets."""
        embed = self.resid(0)
        return embed if self.options.input_norm == "model" else embed * self.mixer(0).norm


@dataclass(frozen=True)
class OptionedPulled(Pulled):
    """`ub` is what goes on from each head."""

    heads: Float[Tensor, "n l E"]
    """What each head (source, channel) adds."""


@dataclass(frozen=True)
class OptionedMixer(FrozenMixer):
    """One mixer, taken back by the options."""

    options: PathOptions
    r: Float[Tensor, "b l 1"]
    """The norm's factor r_t."""

    def pull(
        self, V: Float[Tensor, "n l d"], rows: Int[Tensor, " n"], through: Float[Tensor, "l E"] | None = None
    ) -> OptionedPulled:
        """As :meth:`FrozenMixer.pull`."""
        vy = (V @ self.W_o) * self.gain[rows]
        ub, h0b = self._back(vy, rows)
        heads = ub * self.u[rows] if self.options.ssm_input == "source" else self._back(vy * self.u[rows], rows)[0]
        share = 1 if through is None else through
        pulled = self.pull_u(ub * share, rows)
        if self.options.norm_at == "dest":  # of what passes a norm: biases and memory do not
            ub = self._back(vy * self.r[rows], rows)[0] / self.r[rows]
            scaled = self.pull_u(ub * share, rows)
            pulled = dataclasses.replace(scaled, bias=pulled.bias, initial=pulled.initial)
        initial = pulled.initial + (h0b * self.before.ssm[rows]).flatten(1).sum(1).to(pulled.initial.dtype)
        bias = pulled.bias + (V @ self.b_o).sum(1)
        return OptionedPulled(pulled.below, ub, pulled.pb, bias, initial, heads)

    def pull_u(self, ub: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Pulled:
        """As :meth:`FrozenMixer.pull_u`."""
        if self.options.conv == "taps":
            return super().pull_u(ub, rows)
        pb = ub * self.ratio[rows]
        below, bias = self.pull_p(pb, rows)
        return Pulled(below, ub, pb, bias, torch.zeros_like(bias))

    def local_gain(self) -> Float[Tensor, "b l E"]:
        """What channel e passes on of its own position's p."""
        taps = self.path.sigma * self.path.taps[:, -1] if self.options.conv == "taps" else self.ratio
        return self.gain * (self.own() * self.options.include_self + self.skip() * self.options.include_D) * taps

    @property
    def ratio(self) -> Float[Tensor, "b l E"]:
        """u / p, 0 where p is 0."""
        return torch.where(self.p == 0, 0, self.u / torch.where(self.p == 0, 1, self.p))

    def _back(self, vy: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """The scan's adjoint without the terms that are left out."""
        ub, h0b = self._adjoint(vy, rows)
        if not self.options.include_self:
            ub = ub - self.own()[rows] * vy
        if not self.options.include_D:
            ub = ub - self.skip() * vy
        return ub, h0b
