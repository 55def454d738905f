"""One mixer as the affine map that it is once its norm, gates and selection are held at a run's values.

Glossary
    n_t = r_t w x_t            normalised residual (r_t one number, w the norm's weight)
    p_t = W_x n_t + b_x        convolution's input
    u_t = sigma_t (sum_k kappa[K-1-k] p_{t-k} + b_c)
    y_t = sum_{s<=t} alpha[t,s] u_s + C_t (prod_{j<=t} A_bar_j) h_0
    o_t = W_o (G_t y_t) + b_o
held: r, sigma, A_bar, B_bar, C, G. In Mamba-2 G holds the gated norm's weight and divisor too.

A covector V on o (one number a direction, for each position) is pulled back to the residual stream below by

    vy_t  = G_t (W_o^T V_t)
    lam_t = C_t vy_t + A_bar_{t+1} lam_{t+1}        the scan's frozen adjoint
    ub_s  = sum_n B_bar_s lam_s + D vy_s
    pb_s  = sum_k kappa[K-1-k] sigma_{s+k} ub_{s+k}
    V'_s  = r_s w (W_x^T pb_s)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mamba import ActivationCache
from hooked_mamba.components import at_least_fp32
from hooked_mamba.config import Mamba2Config
from hooked_mamba.scan_view import ScanView, diagonal, run_scan
from hooked_mamba.state import LayerState
from hooked_mamba.token_sources import TokenPath

SITES = ("hook_x_pre", "hook_conv", "hook_x", "hook_dt", "hook_B", "hook_C", "hook_gate")
"""What a run must cache of each mixer; in Mamba-2 norm.hook_scale as well, and of each block norm.hook_scale."""


@dataclass(frozen=True)
class Pulled:
    """What a covector on a mixer's output becomes: n targets, each on one row of the batch."""

    below: Float[Tensor, "n l d"]
    """V' on the residual stream entering the block, without V itself."""
    ub: Float[Tensor, "n l E"]
    """Covector on u: a unit of u at (source s, channel e) adds so much to the target."""
    pb: Float[Tensor, "n l E"]
    """Covector on the convolution's input: what token s sends through all taps, a unit of it."""
    bias: Float[Tensor, " n"]
    """What the biases of convolution, in_proj and out_proj add."""
    initial: Float[Tensor, " n"]
    """What the memory before the first position adds."""


@dataclass(frozen=True)
class FrozenMixer:
    """The constants of one mixer, for the b rows of a run."""

    path: TokenPath
    """Convolution: p, sigma, taps kappa, bias b_c."""
    scan: ScanView
    """u, dt, A, B, C, D."""
    gain: Float[Tensor, "b l E"]
    """G."""
    norm: Float[Tensor, "b l d"]
    """r_t w."""
    mask: Bool[Tensor, "b l"] | None
    """Real positions; None where all are."""
    W_x: Float[Tensor, "E d"]
    b_x: Float[Tensor, " E"]
    W_o: Float[Tensor, "d E"]
    b_o: Float[Tensor, " d"]
    before: LayerState
    """Memory before the first position."""

    @classmethod
    def of(cls, cache: ActivationCache, layer: int, before: LayerState, mask: Tensor | None) -> FrozenMixer:
        """From a run's cache."""
        model: Any = cache.model
        block = model.blocks[layer]
        mixer, E = block.mixer, model.cfg.E
        rows = (
            slice(E, 2 * E) if isinstance(model.cfg, Mamba2Config) else slice(0, E)
        )  # in_proj's: z, x, ... in Mamba-2, x, z in Mamba-1
        weight, bias = at_least_fp32(mixer.in_proj.weight), mixer.in_proj.bias
        W_o = at_least_fp32(mixer.out_proj.weight)
        scale = cache[f"blocks.{layer}.norm.hook_scale"]
        return cls(
            path=cache.token_path(layer),
            scan=cache.scan_view(layer),
            gain=cache.output_gain(layer),
            norm=at_least_fp32(block.norm.weight) / scale,
            mask=mask,
            W_x=weight[rows],
            b_x=weight.new_zeros(E) if bias is None else at_least_fp32(bias[rows]),
            W_o=W_o,
            b_o=W_o.new_zeros(W_o.shape[0]) if mixer.out_proj.bias is None else at_least_fp32(mixer.out_proj.bias),
            before=LayerState(at_least_fp32(before.conv[..., :E]), before.ssm),
        )

    @property
    def u(self) -> Float[Tensor, "b l E"]:
        """The scan's input."""
        return at_least_fp32(self.scan.u.flatten(2))

    @property
    def p(self) -> Float[Tensor, "b l E"]:
        """The convolution's input."""
        return self.path.p

    def pull(
        self, V: Float[Tensor, "n l d"], rows: Int[Tensor, " n"], through: Float[Tensor, "l E"] | None = None
    ) -> Pulled:
        """Take covectors on the output back to the residual stream entering the block.

        Parameters
        ----------
        V
            One for each target.
        rows
            The row of the batch that each target belongs to.
        through
            What share of u goes on at each source and channel (1: all). Heads that are nodes of their own stop here,
            with 0: `ub` still holds what they get, `below`, `pb` and the biases what passes.
        """
        vy = (V @ self.W_o) * self.gain[rows]
        ub, h0b = self._adjoint(vy, rows)
        passing = ub if through is None else ub * through
        xcb = passing * self.path.sigma[rows]
        pb, historyb = self._taps_back(xcb)
        below, bias = self.pull_p(pb, rows)
        bias = bias + (V @ self.b_o).sum(1) + (xcb @ self.path.bias).sum(1)
        initial = (h0b * self.before.ssm[rows]).flatten(1).sum(1)
        initial = initial + (historyb * self.before.conv[rows]).flatten(1).sum(1)
        return Pulled(below, ub, pb, bias, initial.to(bias.dtype))

    def pull_p(
        self, pb: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n l d"], Float[Tensor, " n"]]:
        """V' and the bias's part of covectors on p."""
        if self.mask is not None:
            pb = pb * self.mask[rows].unsqueeze(-1)
        return (pb @ self.W_x) * self.norm[rows], (pb @ self.b_x).sum(1)

    def pull_u(self, ub: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Pulled:
        """The same for covectors on u, as those that ask where a head's own input comes from."""
        xcb = ub * self.path.sigma[rows]
        pb, historyb = self._taps_back(xcb)
        below, bias = self.pull_p(pb, rows)
        initial = (historyb * self.before.conv[rows]).flatten(1).sum(1)
        return Pulled(below, ub, pb, bias + (xcb @ self.path.bias).sum(1), initial)

    def push(
        self,
        delta: Float[Tensor, "n l d"],
        rows: Int[Tensor, " n"],
        through: Float[Tensor, "l E"] | None = None,
        u: Float[Tensor, "n l E"] | None = None,
    ) -> tuple[Float[Tensor, "n l d"], Float[Tensor, "n l E"]]:
        """Forwards what :meth:`pull` takes back: a change of the stream entering the block to one of the output.

        Parameters
        ----------
        delta
            The change.
        through
            As in :meth:`pull`: heads with 0 hold their u.
        u
            A change of u itself, on top; it passes whatever `through` says.

        Returns
        -------
        Tensor, Tensor
            The change of the output, and of u before `through` and `u`.
        """
        change = self.path.mix(self.change_of_p(delta, rows)) * self.path.sigma[rows]
        passing = change if through is None else change * through
        passing = passing if u is None else passing + u
        return self.out_of(self._scan_of(passing, rows), rows), change

    def local_gain(self) -> Float[Tensor, "b l E"]:
        """G (C . B_bar + D) sigma kappa[K-1]: what channel e passes on of its own position's p."""
        return self.gain * (self.own() + self.skip()) * self.path.sigma * self.path.taps[:, -1]

    def own(self) -> Float[Tensor, "b l E"]:
        """C_t . B_bar_t: what channel e reads of what it has just written."""
        at = torch.arange(self.scan.length, device=self.scan.dt.device)
        own = diagonal(self.scan, at, include_dt=True, include_skip=False)
        return own.repeat_interleave(self.scan.u.shape[-1], 2).to(self.u.dtype)

    def skip(self) -> Float[Tensor, " E"]:
        """D of each channel."""
        return self.scan.D.repeat_interleave(self.scan.u.shape[-1]).to(self.u.dtype)

    def pull_local(self, V: Float[Tensor, "n l d"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l E"]:
        """The covector on p of the local part alone: what a position's own input gives."""
        return (V @ self.W_o) * self.local_gain()[rows]

    def push_cross(
        self,
        delta: Float[Tensor, "n l d"],
        rows: Int[Tensor, " n"],
        through: Float[Tensor, "l E"] | None = None,
        p: Float[Tensor, "n l E"] | None = None,
    ) -> tuple[Float[Tensor, "n l d"], Float[Tensor, "n l E"]]:
        """As :meth:`push`, for what moves between positions alone: `through` and `p` speak of p, not of u."""
        change = self.change_of_p(delta, rows)
        passing = change if through is None else change * through
        passing = passing if p is None else passing + p
        return self.moved(passing, rows), change

    def moved(self, p: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l d"]:
        """What inputs p of the convolution add to the output at other positions than their own (no bias in it)."""
        y = self._scan_of(self.path.sigma[rows] * self.path.mix(p), rows)
        return (y * self.gain[rows] - p * self.local_gain()[rows]) @ self.W_o.t()

    def local(self, p: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l d"]:
        """What inputs p of the convolution add to the output at their own position (no bias in it)."""
        return (p * self.local_gain()[rows]) @ self.W_o.t()

    def out_of(self, y: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l d"]:
        """What the scan's output adds to the block's (no bias in it)."""
        return (y * self.gain[rows]) @ self.W_o.t()

    def change_of_p(self, delta: Float[Tensor, "n l d"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l E"]:
        """What a change of the stream entering the block makes of the convolution's input."""
        p = (delta * self.norm[rows]) @ self.W_x.t()
        return p if self.mask is None else p * self.mask[rows].unsqueeze(-1)

    def _scan_of(self, u: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l E"]:
        """The scan, from an empty state, over another input."""
        return run_scan(self.view_of(u, rows)).flatten(2)

    def view_of(self, u: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> ScanView:
        """The scan of some rows over another input."""
        view = self.scan
        B, C = view.B[rows].to(u.dtype), view.C[rows].to(u.dtype)
        return ScanView(u.reshape(*u.shape[:2], view.n_lanes, -1), view.dt[rows], view.A, B, C, view.D)

    def _adjoint(self, vy: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """ub and the covector on h_0, by the gradient of the scan with dt, A, B and C held."""
        with torch.enable_grad():
            u = self.u[rows].detach().requires_grad_()
            h0 = self.before.ssm[rows].detach().requires_grad_()
            y = run_scan(self.view_of(u, rows), h0, frozen=True).flatten(2)
            ub, h0b = torch.autograd.grad(y, (u, h0), vy.to(y.dtype))
        return ub, h0b

    def _taps_back(self, xcb: Float[Tensor, "n l E"]) -> tuple[Float[Tensor, "n l E"], Float[Tensor, "n k E"]]:
        """Covectors on p, and on the K - 1 inputs before the first position."""
        K, l = self.path.taps.shape[1], xcb.shape[1]
        pb = xcb.new_zeros(xcb.shape[0], K - 1 + l, xcb.shape[2])
        for k in range(K):  # position t reads the input k positions before it
            first = K - 1 - k
            pb[:, first : first + l] += self.path.taps[:, K - 1 - k] * xcb
        return pb[:, K - 1 :], pb[:, : K - 1]
