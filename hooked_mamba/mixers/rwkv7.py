"""The time mix of RWKV-7 (Peng et al. 2025, arXiv:2503.14456, section 4).

Glossary
    b, l  batch, positions     d  d_model     H  heads     K, V  keys, values of a head (V = K, d = H V)     R  ranks
    x_j = x + mu_j (x_{t-1} - x)               j in r, w, k, v, a, g
    w = exp(-e^{-1/2} sigmoid(w0 + tanh(x_w w1) w2))      a = sigmoid(a0 + x_a a1 a2)      g = sigmoid(x_g g1) g2
    v = v' + nu (v_first - v')                v_first is layer 0's v'; nu = sigmoid(v0 + x_v v1 v2)
    kappa = k' k_k / |k' k_k|                 k = k' (1 + (a - 1) k_a)
    S_t = S_{t-1} (diag w_t - kappa_t^T (a_t kappa_t)) + v_t^T k_t        the removal reads the undecayed state
    out = W_o (g (norm_H(S_t r_t) + (sum_K r k r_k) v))
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_mamba.components import HeadNorm, Linear, at_least_fp32
from hooked_mamba.frozen.chain import Bypass, Chain
from hooked_mamba.frozen.delta import DeltaScan
from hooked_mamba.frozen.linear import Centred, Gain, Mix, Plus, Project
from hooked_mamba.frozen.tokens import ShiftedPath
from hooked_mamba.hooks.site import Child, Site
from hooked_mamba.layers import weights_of
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.delta_states import (
    DeltaInputs,
    closed_loop_recall,
    delta_scan_through_hooks,
    given_recall_through_hooks,
)
from hooked_mamba.mixers.linear_form import Read, ReadOut, projection
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.mixers.token_shift import held_shift, shifted
from hooked_mamba.ops import products
from hooked_mamba.recurrent_config import RWKV7Config
from hooked_mamba.state import BranchState, Call, columns_read, loadable, zero_padding

DECAY = math.exp(-0.5)
"""e^{-1/2}: decays lie between exp(-e^{-1/2}) = 0.545 and 1."""

MIXES = ("r", "w", "k", "v", "a", "g")
"""What the token shift makes an input of its own for."""


@loadable
class RWKVState(NamedTuple):
    """Memory of a time mix."""

    shift: Tensor
    """The normalised input of the last position, b d."""
    ssm: Tensor
    """S, b H V K, float32, or float64 in a float64 model."""


class RWKV7Mixer(Branch):
    """token shift -> r, w, k, v, a, g -> delta rule -> norm of heads -> bonus -> gate -> output."""

    kind = "rwkv7"
    packs = True
    title = "RWKV-7"
    place = "mixer"
    config_class = RWKV7Config
    keep_float32 = ("w0",)
    sites = (
        Site("hook_shift", "b l d", "the input one position earlier"),
        *(Site(f"hook_x_{j}", "b l d", f"input mixed with the one before it, for {j}") for j in MIXES),
        Site("hook_r", "b l H K", "receptance: what the state is read with", also=("hook_C",)),
        Site("hook_k_pre", "b l H K", "key k', before the learning rate changes it"),
        Site("hook_v_pre", "b l H V", "value v', before the first layer's is mixed in"),
        Site("hook_w_low", "b l R", "low-rank input of the decay, after tanh"),
        Site("hook_w_pre", "b l H K", "decay before its sigmoid, bias included", wide=True),
        Site("hook_w", "b l H K", "decay w of each key", wide=True, also=("hook_A_bar",)),
        Site("hook_a_low", "b l S", "low-rank input of the learning rate"),
        Site("hook_a", "b l H K", "in-context learning rate a of each key", wide=True),
        Site("hook_nu", "b l H V", "share of the first layer's value (not in layer 0)"),
        Site("hook_v_first", "b l H V", "the value that all later layers mix in (layer 0)"),
        Site("hook_v", "b l H V", "value v, as the state takes it", also=("hook_x",)),
        Site("hook_kappa", "b l H K", "key of the removal, of length 1"),
        Site("hook_k", "b l H K", "key k of the write", also=("hook_B",)),
        Site("hook_recall", "b l H V", "S_{t-1} kappa: what lay under the removal's key", kind="lazy", default=True),
        Site("hook_Bx", "b l H V K", "what is written into the state, v k^T", kind="lazy", wide=True),
        Site(
            "hook_h",
            "b l H V K",
            "states as read: an edit changes what position t reads out, not later states",
            kind="state",
            wide=True,
            single="the state right after position t: an edit is carried forward, and later removals read it",
        ),
        Site("hook_y_scan", "b l H V", "S r"),
        Child("norm", HeadNorm),
        Site("hook_bonus", "b l H V", "(sum_K r k r_k) v: the position's own value, beside the state"),
        Site("hook_y", "b l H V", "norm's output with the bonus"),
        Site("hook_g_low", "b l T", "low-rank input of the gate, after its sigmoid"),
        Site("hook_gate", "b l d", "gate g"),
        Site("hook_y_gated", "b l d", "y * gate"),
        Site("hook_out_proj", "b l d", "mixer output, into the residual stream"),
    )

    def __init__(self, cfg: RWKV7Config, layer: int = 0) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        d, H, K = cfg.d_model, cfg.H, cfg.K
        for j in MIXES:
            setattr(self, f"x_{j}", nn.Parameter(torch.empty(d)))
        self.receptance, self.key, self.value, self.output = (Linear(d, d, bias=False) for _ in range(4))
        self._low_rank("w", cfg.decay_rank)
        self._low_rank("a", cfg.rate_rank)
        if layer > 0:
            self._low_rank("v", cfg.value_rank)
        self._low_rank("g", cfg.gate_rank, bias=False)
        self.k_k = nn.Parameter(torch.empty(d))
        self.k_a = nn.Parameter(torch.empty(d))
        self.r_k = nn.Parameter(torch.empty(H, K))
        self.norm = HeadNorm(H, K, cfg.norm_eps_of_heads)
        self.head_width = K
        if not layer:
            self.hands_on = {"v_first": "hook_v_first"}
        if layer:
            self.frozen_sites = (*type(self).frozen_sites, "hook_nu")
        self.add_sites()

    def _low_rank(self, name: str, rank: int, bias: bool = True) -> None:
        d = self.cfg.d_model
        setattr(self, f"{name}1", nn.Parameter(torch.empty(d, rank)))
        setattr(self, f"{name}2", nn.Parameter(torch.empty(rank, d)))
        if bias:
            setattr(self, f"{name}0", nn.Parameter(torch.empty(d)))

    def site_rows(self) -> tuple[Site | Child, ...]:
        absent = "hook_v_first" if self.layer else "hook_nu"
        return tuple(row for row in type(self).sites if row.name != absent)

    def sizes(self) -> dict[str, int]:
        cfg = self.cfg
        ranks = {"R": cfg.decay_rank, "S": cfg.rate_rank, "T": cfg.gate_rank}
        return {"d": cfg.d_model, "H": cfg.H, "K": cfg.K, "V": cfg.K, **ranks}

    def facts(self) -> tuple[tuple[str, object], ...]:
        return (("heads H × keys K", f"{self.cfg.H} × {self.cfg.K}"),)

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], RWKVState]:
        call = Call() if call is None else call
        real = zero_padding(call.padding)
        last, S = (None, None) if state is None else state

        before, last = shifted(resid, last, call.padding, call.documents)
        step = self.hook_shift(before) - resid
        x = {j: getattr(self, f"hook_x_{j}")(torch.addcmul(resid, getattr(self, f"x_{j}"), step)) for j in MIXES}

        r = self.hook_r(self.heads(self.receptance(x["r"])))
        k_pre = self.hook_k_pre(self.heads(self.key(x["k"])))
        v = self.mixed_value(self.hook_v_pre(self.heads(self.value(x["v"]))), x["v"], call)

        w_low = self.hook_w_low(torch.tanh(product(x["w"], self.w1)))
        w_pre = self.hook_w_pre(self.heads(at_least_fp32(product(w_low, self.w2)) + self.w0))
        w = self.hook_w(torch.exp(real(-DECAY * torch.sigmoid(w_pre))))
        a_pre = product(self.hook_a_low(product(x["a"], self.a1)), self.a2) + self.a0
        a = self.hook_a(torch.sigmoid(self.heads(at_least_fp32(a_pre))))

        kappa = self.hook_kappa(real(F.normalize(k_pre * self.heads(self.k_k), dim=-1, eps=1e-12)))
        k = self.hook_k(real(k_pre * (1 + (a.to(k_pre.dtype) - 1) * self.heads(self.k_a))))

        y_scan, S = self.delta_rule(DeltaInputs(r, w, k, v, kappa, (-a * kappa).to(kappa.dtype)), S)
        y_scan = self.norm(self.hook_y_scan(y_scan))
        bonus = self.hook_bonus((r * k * self.r_k).sum(-1, keepdim=True) * v)
        y = self.hook_y(y_scan + bonus)

        gate = self.hook_gate(product(self.hook_g_low(torch.sigmoid(product(x["g"], self.g1))), self.g2))
        y_gated = self.hook_y_gated(rearrange(y, "b l h v -> b l (h v)") * gate)
        return self.hook_out_proj(self.output(columns_read(y_gated, call))), RWKVState(last, S)

    def heads(self, x: Tensor) -> Tensor:
        """... d as ... H K."""
        return x.unflatten(-1, (self.cfg.H, self.cfg.K))

    def mixed_value(
        self, v: Float[Tensor, "b l H V"], x_v: Float[Tensor, "b l d"], call: Call
    ) -> Float[Tensor, "b l H V"]:
        """The value with the first layer's mixed in; layer 0 passes its own to the others.

        Raises
        ------
        ValueError
            A pass that starts above layer 0 without the first layer's value.
        """
        if self.layer == 0:
            call.carry["v_first"] = self.hook_v_first(v)
            return self.hook_v(v)
        if "v_first" not in call.carry:
            raise ValueError(
                f"layer {self.layer} mixes in the value of layer 0, which did not run: pass"
                " carry={'v_first': cache['v_first', 0]} of the same tokens"
            )
        nu = self.hook_nu(torch.sigmoid(self.heads(product(product(x_v, self.v1), self.v2) + self.v0)))
        return self.hook_v(v + nu * (call.carry["v_first"] - v))

    def delta_rule(
        self, x: DeltaInputs, S: Float[Tensor, "b H V K"] | None
    ) -> tuple[Float[Tensor, "b l H V"], Float[Tensor, "b H V K"]]:
        """S r for every position, and the last state."""
        if not self.hook_recall.edited:
            y, S, recall = delta_scan_through_hooks(x, S, self.hook_h, self.hook_Bx)
            self.hook_recall.read(recall.shape[1], lambda t: recall[:, t])
            return y, S
        recall = self.hook_recall(closed_loop_recall(x, S, self.hook_h.documents))
        return given_recall_through_hooks(x, recall, S, self.hook_h, self.hook_Bx)

    # The linear form: r, w, k, kappa, a, nu, the gate and the norm's divisor are held --------------------------------

    frozen_sites = (
        *(f"hook_{name}" for name in ("shift", "r", "w", "k", "v", "v_pre", "kappa", "a", "gate")),
        "norm.hook_scale",
    )
    reach = 2
    places: ClassVar = {
        "p": "hook_v_pre",
        "u": "hook_v",
        "y": "hook_y_scan",
        "write": "hook_Bx",
        "state": "hook_h",
    }
    vectors_site = "hook_y_gated"

    def frozen(self, read: Read, before: BranchState | None, mask: Bool[Tensor, "b l"] | None, norm: Gain) -> Chain:
        """v' through two taps, (1 - nu) and the first layer's value; the scan, the heads' norm, the bonus, the gate."""
        path, scan = self.token_path(read), self.held_scan(read)
        pieces = held_shift(norm, self.x_v, self.value_input(), before[0] if before else None, mask, path.p)
        nodes = {"p": len(pieces)}
        takes = {}
        if self.layer:
            pieces += [Gain(path.sigma), Plus(path.first)]
            takes = {"v_first": Gain(1 - path.sigma)}
        nodes["u"] = len(pieces)
        pieces += [Mix(scan, self.memory(before))]
        nodes["y"] = len(pieces)
        weight, bias = (at_least_fp32(p.detach()) for p in (self.norm.weight, self.norm.bias))
        per_channel = (weight.unflatten(0, (self.cfg.H, -1)) / read("norm.hook_scale")).flatten(2)
        pieces += [Centred(per_channel, bias, self.cfg.H)]
        nodes["normed"] = len(pieces)
        pieces += [Gain(at_least_fp32(read("hook_gate"))), self.value_output()]
        gives = {} if self.layer else {"v_first": "u"}
        values = {"p": path.p, "u": scan.values}
        bypass = Bypass("u", "normed", Gain(self.bonus(read)))
        return Chain(tuple(pieces), nodes, path, values, bypass, takes, gives)

    def bonus(self, read: Read) -> Float[Tensor, "b l E"]:
        """sum_K r k r_k, once for each channel of its head."""
        factor = (read("hook_r") * read("hook_k") * self.r_k).sum(-1)
        return at_least_fp32(factor).repeat_interleave(self.cfg.K, 2)

    def held_scan(self, read: Read) -> DeltaScan:
        r, w, k, v, kappa, a = (read(f"hook_{name}") for name in ("r", "w", "k", "v", "kappa", "a"))
        return DeltaScan(v, r, w, k, kappa, -a * kappa, torch.ones_like(w[..., 0]))

    def token_path(self, read: Read) -> ShiftedPath:
        """1 - nu of what two tokens make; the rest of v is the first layer's value."""
        p, v = at_least_fp32(read("hook_v_pre").flatten(2)), at_least_fp32(read("hook_v").flatten(2))
        earlier = at_least_fp32(self.value(self.x_v * read("hook_shift")))
        share = torch.ones_like(p)
        if self.layer:
            share = 1 - at_least_fp32(read("hook_nu")).flatten(2)
        straight = p.new_ones(p.shape[-1], 1), p.new_zeros(p.shape[-1])
        return ShiftedPath(p, share, *straight, earlier, v - share * p)

    def read_out(self, read: Read) -> ReadOut:
        gate, scale = at_least_fp32(read("hook_gate")), read("norm.hook_scale")
        per_channel = (self.norm.weight.unflatten(0, (self.cfg.H, -1)) / scale).flatten(2)
        return ReadOut(gate * per_channel, gate * self.norm.bias, gate * self.bonus(read), centred=True)

    def own_input(self, read: Read) -> Float[Tensor, "b l E"]:
        path = self.token_path(read)
        return path.p - path.earlier

    def value_input(self) -> Project:
        return projection(self.value, where="value")

    def value_output(self) -> Project:
        return projection(self.output, where="output")

    def write_weight(self) -> Float[Tensor, "d E"]:
        return weights_of(self.output, "output")[0]

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> RWKVState:
        """Zeros, where the weights are; on "meta" their shapes alone."""
        cfg = self.cfg
        shift = self.receptance.weight.new_zeros(batch, cfg.d_model, device=device)
        return RWKVState(shift, self.w0.new_zeros(batch, cfg.H, cfg.K, cfg.K, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: decays spread over each layer's channels, mixes over 0 to 1, projections Kaiming-uniform."""
        cfg = self.cfg
        share = torch.arange(cfg.d_model).to(self.x_r) / max(1, cfg.d_model - 1)
        for j in MIXES:
            getattr(self, f"x_{j}").copy_(1 - share ** (0.9 if j in "wkvg" else 0.2))
        for linear in (self.receptance, self.key, self.value, self.output):
            uniform_fan_in(linear.weight, cfg.d_model, generator)
        self.output.weight /= cfg.n_layers**0.5
        for name in ("w", "a", "v", "g"):
            if hasattr(self, f"{name}1"):
                getattr(self, f"{name}1").zero_()
                uniform_fan_in(getattr(self, f"{name}2"), cfg.d_model, generator)
        uniform_fan_in(self.g1, cfg.d_model, generator)
        self.w0.copy_(-6.5 + 5 * share)
        self.a0.zero_()
        if self.layer:
            self.v0.fill_(1)
        self.k_k.fill_(0.85)
        self.k_a.fill_(1)
        self.r_k.zero_()
        self.norm.weight.fill_(1)
        self.norm.bias.zero_()


def product(x: Float[Tensor, "b l i"], W: Float[Tensor, "i o"]) -> Float[Tensor, "b l o"]:
    """x W, of a factor of a low-rank map."""
    return products.linear(x, W.t())
