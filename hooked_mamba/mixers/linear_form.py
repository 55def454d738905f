"""A branch's linear form: the affine map that remains once everything but its value path is frozen.

    value path   stream -> norm -> W_x -> p -> u -> y -> gain -> W_o -> what is added to the stream

Decompositions, direct logit attribution, knockout, coders for the local part and circuits read these methods and
nothing else. A branch with `in_proj` and `out_proj` that moves values by a scan gives `frozen_sites`, `places` and
:meth:`LinearForm.held_scan`; the rest has defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mamba.components import at_least_fp32
from hooked_mamba.frozen.chain import Chain
from hooked_mamba.frozen.linear import Conv, Gain, Mix, Offset, Piece, Project
from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.site import Site
from hooked_mamba.hooks.sited import SitedModule
from hooked_mamba.layers import weights_of
from hooked_mamba.state import BranchState

Read = Callable[[str], Tensor]
"""A site's own name in the branch ("hook_dt", "norm.hook_scale") -> what the run had there, batch in front."""

Hooks = list[tuple[str, Callable[..., Tensor]]]
"""Pairs (a site's own name in the branch, hook)."""


@dataclass(frozen=True)
class ReadOut:
    """From a scan's y (and the value u around it) to what the output weights read, within each position.

    gain * (y, or y without its head's mean) + bias + beside * u
    """

    gain: Float[Tensor, "b l E"]
    bias: Float[Tensor, "b l E"] | None = None
    beside: Float[Tensor, "b l E"] | None = None
    """What each position's own value passes on beside the norm."""
    centred: bool = False
    """Whether a norm takes each head's mean away."""


class LinearForm(SitedModule):
    """The part of a branch about its linear form."""

    title: ClassVar[str] = ""
    """Its name in tables ("Mamba-1")."""
    frozen_sites: tuple[str, ...] = ()
    """Sites that a run must cache for :meth:`frozen`, by their own names."""
    places: ClassVar[Mapping[str, str]] = {}
    """The sites at places of the value path: "u", and where they differ from it "p", "y"; "write" and "state" where
    values are written into a state that has a site."""
    value_rows: slice = slice(None)
    """Which rows of in_proj make p."""
    head_width: int | None = None
    """Channels P of a head; None where each channel stands alone."""
    unit: int = 1
    """Channels side by side that act as one where they are nodes of a graph: those of an attention head."""
    reach: int = 1
    """Positions of its input, the last its own, that one value u is made of: the taps of a convolution."""
    vectors_site: str | None = None
    """The site that the output's weights read; None: it is formed from y and the gain."""
    selection_reads: ClassVar[Literal["stream", "u"]] = "stream"
    """What B, C and dt are computed from, where there are any."""
    norm_readers: tuple[str, ...] = ("in_proj.weight",)
    """Weights whose columns read the block's norm."""
    inner_norms: tuple[tuple[str, str], ...] = ()
    """Pairs (a norm's weight within the branch, the weight whose columns read it)."""
    rule_sites: tuple[str, ...] = ()
    """Sites that :meth:`rule_hooks` reads."""
    causal: ClassVar[bool] = True
    """Whether no position reads a later one."""

    @property
    def moves_values(self) -> bool:
        """Whether it defines how values move between positions, see :meth:`held_scan`."""
        return type(self).held_scan is not LinearForm.held_scan

    # The whole -------------------------------------------------------------------------------------------------

    def frozen(self, read: Read, before: BranchState | None, mask: Bool[Tensor, "b l"] | None, norm: Gain) -> Chain:
        """The branch as an affine map of the stream that its norm reads.

        Parameters
        ----------
        read
            The run's `frozen_sites`.
        before
            Memory before the first position; None: empty.
        mask
            Real positions; None: all are.
        norm
            The norm, its divisor held.
        """
        path, scan, gain = self.token_path(read), self.held_scan(read), self.output_gain(read)
        pieces: list[Piece] = [norm, self.value_input()]
        own_gain, bias = self.input_gain(read), self.scan_bias()
        pieces += [] if own_gain is None else [Gain(own_gain)]
        if mask is not None:
            pieces.append(Gain(mask.unsqueeze(-1).to(path.p.dtype)))
        nodes = {"p": len(pieces)}
        pieces += [Conv(path.taps, path.bias, self.history(before, path)), Gain(path.sigma)]
        nodes["u"] = len(pieces)
        pieces += [] if scan is None else [Mix(scan, self.entering(before))]
        pieces += [] if bias is None else [Offset(bias)]
        nodes["y"] = len(pieces)
        pieces += [] if gain is None else [Gain(gain)]
        u = at_least_fp32(read(self.site_at("u")).flatten(2)) if scan is None else scan.values
        return Chain((*pieces, self.value_output()), nodes, path, {"p": path.p, "u": u}, unit=self.unit)

    @property
    def width(self) -> int:
        """Channels E of the value path."""
        return self.value_output().W.shape[1]

    def own_part(self, read: Read) -> Float[Tensor, "b l d"]:
        """What every position's own input adds to the output, without biases and without other positions."""
        none = torch.ones((), device=read(self.site_at("u")).device)
        chain = self.frozen(read, None, None, Gain(none))  # p is known, so that no norm is asked for
        rows = torch.arange(chain.p.shape[0], device=chain.p.device)
        return chain.push_own(self.own_input(read), rows).to(read(self.site_at("p")).dtype)

    def own_input(self, read: Read) -> Float[Tensor, "b l E"]:
        """p without its bias, and without what other positions give it."""
        b, gain = self.value_input().b, self.input_gain(read)
        p = self.token_path(read).p
        return p if b is None else p - (b if gain is None else b * gain)

    # Its parts -------------------------------------------------------------------------------------------------

    def held_scan(self, read: Read) -> HeldScan | None:
        """How values move between positions; None if the branch moves none."""
        return None

    def token_path(self, read: Read) -> TokenPath:
        """How a channel's own input p becomes the value u; default: it is u."""
        return TokenPath.straight(read(self.site_at("u")))

    def input_gain(self, read: Read) -> Float[Tensor, "b l E"] | None:
        """The factor between the value projection's output and p; None: no factor."""
        return None

    def scan_bias(self) -> Float[Tensor, " E"] | None:
        """What is added to the scan's output to give y; None: nothing."""
        return None

    def output_gain(self, read: Read) -> Float[Tensor, "b l E"] | None:
        """The factor of y before the output weights; None: no factor."""
        return None

    def read_out(self, read: Read) -> ReadOut:
        """Everything between the scan and the output weights; default: only the gain."""
        gain = self.output_gain(read)
        return ReadOut(torch.ones_like(at_least_fp32(read(self.site_at("u")).flatten(2))) if gain is None else gain)

    def value_input(self) -> Project:
        """The weights that compute p, float32 at least."""
        return projection(self.in_proj, self.value_rows, "in_proj")

    def value_output(self) -> Project:
        """The weights that write into the stream, float32 at least."""
        return projection(self.out_proj, where="out_proj")

    def write_weight(self) -> Float[Tensor, "d E"]:
        """The output's weights, those of a norm right before it included."""
        return weights_of(self.out_proj, "out_proj")[0]

    def memory(self, before: BranchState | None) -> Tensor | None:
        """The scan's own part of the memory; default: the last part."""
        return before[-1] if before else None

    def entering(self, before: BranchState | None) -> Tensor | None:
        """What the held scan continues from; default: its state."""
        return self.memory(before)

    def history(self, before: BranchState | None, path: TokenPath) -> Float[Tensor, "b k E"]:
        """The K - 1 values of p before the first position; default: zeros."""
        return path.p.new_zeros(path.p.shape[0], path.taps.shape[1] - 1, path.p.shape[2])

    def vectors(self, read: Read) -> Float[Tensor, "b l E"]:
        """What the output's weights read."""
        if self.vectors_site is not None:
            return read(self.vectors_site).flatten(2)
        y, gain = read(self.site_at("y")).flatten(2), self.output_gain(read)
        return y if gain is None else y * gain

    def site_at(self, name: str) -> str:
        """The own name of the site at a place; without one of its own, p and y stand where u does.

        Raises
        ------
        ValueError
            It has no such site.
        """
        if name in ("p", "y") and name not in self.places:
            name = "u"
        if name not in self.places:
            raise ValueError(f"{self.title or type(self).__name__} has no site for {name!r} in its linear form")
        return self.places[name]

    @property
    def out_site(self) -> str:
        """The own name of the site of what is added to the stream: the last one."""
        return [row.name for row in self.site_rows() if isinstance(row, Site)][-1]

    # Other rules than holding ----------------------------------------------------------------------------------

    def bias_sites(self) -> list[tuple[str, Tensor | None]]:
        """Sites whose value has a bias in it, and the bias."""
        return [(self.site_at("p"), self.value_input().b), (self.out_site, self.value_output().b)]

    def rule_hooks(
        self, rule: str, shares: tuple[float, float, float], read: Read, mask: Tensor | None, h0: Tensor | None
    ) -> Hooks:
        """Hooks by which this branch's gradient follows a rule of attribution (see `circuits.rules`).

        Parameters
        ----------
        rule, shares
            "half" or "shares", and the shares of C, B and u.
        read
            Sites of the pass under way.
        mask
            Real positions.
        h0
            The scan's state before the first position.

        Raises
        ------
        ValueError
            The rule means nothing for this kind.
        """
        raise ValueError(
            f"selection {rule!r} is not defined for {self.title or type(self).__name__}: use 'none' or 'gradient'"
        )


def projection(linear: Any, rows: slice = slice(None), where: str = "a linear layer") -> Project:
    """A linear layer (or some of its rows) as a piece; `where` is its name, for the error if an adapter is on it."""
    weight, bias = weights_of(linear, where)
    return Project(at_least_fp32(weight)[rows], None if bias is None else at_least_fp32(bias[rows]))


def low_rank(adapter: Any, where: str) -> Float[Tensor, "o i"]:
    """What a model's own adapter adds to a weight, W_b W_a; `where` as in :func:`projection`."""
    return projection(adapter.b, where=f"{where}.b").W @ projection(adapter.a, where=f"{where}.a").W


def hold(x: Tensor, hook: Any) -> Tensor:
    """A hook that returns the value detached, so that no gradient flows through it."""
    return x.detach()


def linear_silu(x: Tensor) -> Tensor:
    """SiLU as a product with its factor frozen."""
    return x * torch.sigmoid(x).detach()
