"""Blocks taken back by other rules than the value path: what selection, gates and norms do is followed too.

none      the value path alone (`circuits.frozen_mixer`): dt, B, C, gates and norms are held
half      the gate's product is shared evenly by its two factors, y and z, with sigma(z) held; dt, B, C are held
          (MambaLRP: Jafari et al. 2024, arXiv:2406.07592)
shares    the scan's product C B u is shared by its factors in given parts that sum to 1; dt and the gate are held
gradient  nothing is held: the first-order effect of everything, final norm included

The first three sum to the target. A gradient does not: what a straight line misses is left over. All but the first are
gradients of the model's own block, run once more on the stream that entered it, in which hooks replace what is held by
its value; hooks that the run had must still be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.frozen_mixer import Pulled
from hooked_mamba.analysis.captured import captured
from hooked_mamba.components import at_least_fp32
from hooked_mamba.config import MambaConfig
from hooked_mamba.scan_view import run_scan
from hooked_mamba.state import LayerState, Padding
from saes.files.checks import nearest

if TYPE_CHECKING:
    from circuits.frozen_model import FrozenModel

RULES = ("none", "half", "shares", "gradient")
_VALID = f"selection must be one of {', '.join(RULES)}, or three shares"

Selection = str | Sequence[float | int]
"""A rule; three numbers are "shares" of C, B and u other than a third each."""


class Rule(NamedTuple):
    """One of the rules above."""

    name: str
    shares: tuple[float, float, float]
    """Of C, B and u."""

    @classmethod
    def of(cls, selection: Selection) -> Rule:
        """Check what a user wrote.

        Raises
        ------
        ValueError
            No such rule, or shares that are not three numbers with the sum 1.
        """
        if isinstance(selection, str):
            if selection not in RULES:
                raise ValueError(f"{_VALID}; got {selection!r}{nearest(selection, RULES)}")
            third = 1 / 3
            return cls(selection, (third, third, third) if selection == "shares" else (0.0, 0.0, 1.0))
        if not isinstance(selection, Sequence):
            raise ValueError(f"{_VALID}; got {selection!r}")
        given = [float(share) for share in selection]
        if len(given) != 3 or not abs(sum(given) - 1) <= 1e-6:
            raise ValueError(f"shares must be three, of C, B and u, that sum to 1, got {given}")
        return cls("shares", (given[0], given[1], given[2]))


SITES = ("in_proj", "x_pre", "conv", "x", "dt", "B", "C", "z", "gate", "y", "out_proj")


def pull(
    frozen: FrozenModel,
    layer: int,
    V: Float[Tensor, "n l d"],
    rows: Int[Tensor, " n"],
    through: Float[Tensor, "l E"] | None = None,
    ub: Float[Tensor, "n l E"] | None = None,
) -> Pulled:
    """Take covectors on a mixer's output back to the stream below, as :meth:`FrozenMixer.pull`, by the run's rule.

    Parameters
    ----------
    frozen, layer
        The run, with its rule, and which block.
    V, rows, through
        As there.
    ub
        Covectors on u that go down as well.
    """
    model: Any = frozen.model
    block, mixer, cfg = model.blocks[layer], model.blocks[layer].mixer, model.cfg
    prefix = f"blocks.{layer}.mixer.hook_"
    names = [prefix + site for site in SITES] + [f"{prefix}x_proj"] * isinstance(cfg, MambaConfig)
    mask = None if frozen.mask is None else frozen.mask[rows]
    padding = None if mask is None else Padding.from_mask(mask.long(), mask.shape)
    with torch.enable_grad(), captured(model, names) as cache:
        leaf = frozen.resid(layer)[rows].detach().requires_grad_()
        conv, ssm = (state[rows].detach().requires_grad_() for state in frozen.before[layer])
        held = _Held(cache, cfg, frozen.rule, mask, ssm)
        stops = [] if through is None else [(f"{prefix}x", stopping(through))]
        with model.hooks([*held.hooks(layer), *stops]):
            block(leaf, LayerState(conv, ssm), padding)
        out, u, p = cache[f"{prefix}out_proj"], cache[f"{prefix}x"], cache[f"{prefix}x_pre"]
        value = (at_least_fp32(out) * V).sum()
        if ub is not None:
            value = value + (at_least_fp32(u.flatten(2)) * ub).sum()
        places = [(cache[f"{prefix}in_proj"], mixer.in_proj.bias), (cache[f"{prefix}conv"], mixer.conv1d.bias)]
        places += [(out, mixer.out_proj.bias)]
        places = [(site, bias.detach()) for site, bias in places if bias is not None]
        inputs = [leaf, u, p, conv, ssm, *(site for site, _ in places)]
        found = torch.autograd.grad(value, inputs, allow_unused=True)
    found = tuple(torch.zeros_like(at) if g is None else g for g, at in zip(found, inputs, strict=True))
    at_leaf, at_u, at_p, at_conv, at_ssm, *at_places = (at_least_fp32(g) for g in found)
    zero = V.new_zeros(len(rows))
    biases = [(g @ at_least_fp32(bias)).sum(1) for g, (_, bias) in zip(at_places, places, strict=True)]
    initial = (at_conv * conv).flatten(1).sum(1) + (at_ssm * ssm).flatten(1).sum(1)
    bias = torch.stack([zero, *biases]).sum(0)
    return Pulled(at_leaf, at_u.flatten(2), at_p[..., : cfg.E], bias, initial.detach().to(zero.dtype))


class _Held:
    """What a rule holds in a block, as hooks that read the pass they sit in."""

    def __init__(self, cache: Any, cfg: Any, rule: Rule, mask: Tensor | None, h0: Tensor) -> None:
        self.cache, self.cfg, self.rule, self.mask, self.h0 = cache, cfg, rule, mask, h0
        self.mamba1 = isinstance(cfg, MambaConfig)

    def hooks(self, layer: int) -> list[tuple[str, Any]]:
        """Those of one block; none where nothing is held."""
        if self.rule.name == "gradient":
            return []
        c, b, _ = self.rule.shares
        mixer = f"blocks.{layer}.mixer."
        hooks: list[tuple[str, Any]] = [(f"blocks.{layer}.norm.hook_scale", hold)]
        hooks += [(mixer + "hook_dt", hold), (mixer + "hook_x", self.x)]
        hooks += [(mixer + "hook_B", self.selected(0) if b else hold)]
        hooks += [(mixer + "hook_C", self.selected(1) if c else hold)]
        if self.rule.name == "half":
            hooks += [(mixer + "hook_gate", self.gate), (mixer + "hook_y_gated", self.halves)]
        else:
            hooks += [(mixer + "hook_gate", hold), (mixer + "hook_y", self.y)]
        return hooks if self.mamba1 else [*hooks, (mixer + "norm.hook_scale", hold)]

    def at(self, hook: Any, site: str) -> Tensor:
        return self.cache[f"blocks.{hook.layer()}.mixer.hook_{site}"]

    def x(self, x: Tensor, hook: Any) -> Tensor:
        """SiLU with its factor held; nothing at padding."""
        u = linear_silu(self.at(hook, "conv")[..., : self.cfg.E])
        return (u if self.mask is None else u * self.mask.unsqueeze(-1)).reshape(x.shape)

    def selected(self, which: int) -> Any:
        """B or C, linear in what the block computes them from."""
        cfg = self.cfg

        def keep(x: Tensor, hook: Any) -> Tensor:
            width = x.shape[2:].numel()
            if not self.mamba1:
                first = cfg.E + which * width
                return linear_silu(self.at(hook, "conv")[..., first : first + width]).reshape(x.shape)
            first = cfg.R + which * width
            raw = self.at(hook, "x_proj")[..., first : first + width]
            scale = torch.ones_like(raw[..., :1])
            if cfg.mixer_norms:
                scale = torch.rsqrt(raw.square().mean(-1, keepdim=True) + cfg.mixer_norm_eps).detach()
            return raw * scale

        return keep

    def gate(self, g: Tensor, hook: Any) -> Tensor:
        return linear_silu(self.at(hook, "z"))

    def halves(self, product: Tensor, hook: Any) -> Tensor:
        y, g = self.at(hook, "y").flatten(2), self.at(hook, "gate")
        return (y * g.detach() + y.detach() * g) / 2

    def y(self, y: Tensor, hook: Any) -> Tensor:
        """D u, and C B u as three scans in each of which one factor varies; the memory shares C with the first."""
        c, b, v = self.rule.shares
        view = self.cache.scan_view(hook.layer())
        u, B, C, none = view.u.detach(), view.B.detach(), view.C.detach(), torch.zeros_like(view.D)
        terms = (
            view.D.detach().unsqueeze(-1) * view.u
            + c * run_scan(replace(view, u=u, B=B, D=none), self.h0.detach())
            + b * run_scan(replace(view, u=u, C=C, D=none))
            + v * run_scan(replace(view, B=B, C=C, D=none))
            + (1 - c) * run_scan(replace(view, u=0 * u, B=B, C=C, D=none), self.h0)
        )
        return terms.reshape(y.shape).to(y.dtype)


class _Stop(torch.autograd.Function):
    """The identity, whose gradient passes only where `stay` is 1."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, stay: Tensor) -> Tensor:
        ctx.save_for_backward(stay)
        return u.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None


def stopping(through: Float[Tensor, "l E"]) -> Any:
    """A hook on u by which heads that are nodes of their own get what they get, and pass nothing on."""

    def stop(u: Tensor, hook: Any) -> Tensor:
        # A head's own covector is read at what this hook returns: it must not be a view of what passes.
        return _Stop.apply(u, through.reshape(u.shape[1:]).to(u.dtype))  # type: ignore[no-untyped-call]

    return stop


def hold(x: Tensor, hook: Any) -> Tensor:
    """Its value, through which nothing flows back."""
    return x.detach()


def linear_silu(x: Tensor) -> Tensor:
    """SiLU as a product with its factor held."""
    return x * torch.sigmoid(x).detach()
