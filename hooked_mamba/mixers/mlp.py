"""The MLP of a block, gated (Shazeer 2020, arXiv:2002.05202) or not.

gated      out = W_down (act(m W_gate x) * W_up x)         pre = m W_gate x    pre_linear = W_up x
ungated    out = W_down act(W_up x)                        pre = W_up x
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.components import Linear, LowRank, at_least_fp32, silu
from hooked_mamba.frozen.linear import Project
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.site import Site
from hooked_mamba.hybrid_config import Activation, MLPConfig
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.linear_form import Read, low_rank, projection
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.mixers.weight_views import MLPViews
from hooked_mamba.state import BranchState, Call, columns_read

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activation_path(
    act: Callable[[Tensor], Tensor], pre: Float[Tensor, "b l E"], linear: Float[Tensor, "b l E"] | None
) -> TokenPath:
    """Neurons with a frozen activation: the factor of the other half if gated, act(pre) / pre if not."""
    factor = act(pre)
    if linear is not None:
        return TokenPath.scaled(linear, factor)
    return TokenPath.scaled(pre, torch.where(pre == 0, 0, factor / torch.where(pre == 0, 1, pre)))


class MLP(MLPViews, Branch):
    """x -> neurons -> output, with a hook point at every site."""

    kind = "mlp"
    packs = True
    title = "MLP"
    place = "mlp"
    config_class = MLPConfig
    vectors_site = "hook_post"
    sites = (
        Site("hook_pre", "b l F", "neurons before the activation; where the MLP is gated, those of the gate"),
        Site("hook_pre_linear", "b l F", "the other factor of a gated MLP"),
        Site("hook_post", "b l F", "neurons after the activation, times the other factor where there is one"),
        Site("hook_gate", "b l 1", "factor of the whole output, after its sigmoid, where there is one"),
        Site("hook_out", "b l d", "output of the layer"),
    )

    def __init__(self, cfg: MLPConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.gated:
            self.gate_proj = Linear(cfg.width_in, cfg.d_mlp, bias=cfg.bias)
        self.up_proj = Linear(cfg.width_in, cfg.d_mlp, bias=cfg.bias)
        self.down_proj = Linear(cfg.d_mlp, cfg.d_model, bias=cfg.bias)
        if cfg.output_gate:
            self.output_gate = Linear(cfg.width_in, 1, bias=False)
        if cfg.adapter_rank is not None:
            self.adapter = LowRank(cfg.width_in, cfg.adapter_rank, (1 + cfg.gated) * cfg.d_mlp)
        self.add_sites()

    def site_rows(self) -> tuple[Site, ...]:
        absent = set() if self.cfg.gated else {"hook_pre_linear"}
        absent |= set() if self.cfg.output_gate else {"hook_gate"}
        return tuple(row for row in type(self).sites if row.name not in absent)

    def sizes(self) -> dict[str, int]:
        return {"F": self.cfg.d_mlp, "d": self.cfg.d_model}

    def facts(self) -> tuple[tuple[str, object], ...]:
        return (("neurons F", self.cfg.d_mlp),)

    def forward(
        self, resid: Float[Tensor, "b l i"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], BranchState]:
        resid = columns_read(resid, call)
        act = ACTIVATIONS[self.cfg.activation]
        up = self.up_proj(resid)
        if self.cfg.gated:
            pre = self.gate_proj(resid)
            if self.cfg.adapter_rank is not None:
                more_pre, more_up = self.adapter(resid).chunk(2, -1)
                pre, up = pre + more_pre, up + more_up
            pre = self.hook_pre(pre if self.cfg.gate_multiplier == 1 else pre * self.cfg.gate_multiplier)
            post = act(pre) * self.hook_pre_linear(up)
        else:
            post = act(self.hook_pre(up if self.cfg.adapter_rank is None else up + self.adapter(resid)))
        out = self.down_proj(self.hook_post(post))
        if self.cfg.output_gate:
            out = out * self.hook_gate(torch.sigmoid(self.output_gate(resid)))
        return self.hook_out(out), ()

    # The linear form: the activation is held as a factor ---------------------------------------------------------

    @property
    def frozen_sites(self) -> tuple[str, ...]:  # type: ignore[override]
        linear = ("hook_pre_linear",) * self.cfg.gated + ("hook_gate",) * self.cfg.output_gate
        return ("hook_pre", *linear, "hook_post")

    @property
    def places(self) -> dict[str, str]:  # type: ignore[override]
        return {"p": "hook_pre_linear" if self.cfg.gated else "hook_pre", "u": "hook_post"}

    def token_path(self, read: Read) -> TokenPath:
        """act(pre) is the factor where the MLP is gated, act(pre) / pre where it is not."""
        linear = at_least_fp32(read("hook_pre_linear")) if self.cfg.gated else None
        return activation_path(ACTIVATIONS[self.cfg.activation], at_least_fp32(read("hook_pre")), linear)

    def output_gain(self, read: Read) -> Float[Tensor, "b l E"] | None:
        if not self.cfg.output_gate:
            return None
        return at_least_fp32(read("hook_gate")).expand(-1, -1, self.cfg.d_mlp)

    def value_input(self) -> Project:
        own = projection(self.up_proj, where="up_proj")
        if self.cfg.adapter_rank is None:
            return own
        return Project(own.W + low_rank(self.adapter, "adapter")[-self.cfg.d_mlp :], own.b)

    def value_output(self) -> Project:
        return projection(self.down_proj, where="down_proj")

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: Kaiming-uniform, the output scaled down by the root of the number of blocks."""
        for linear in (m for m in self.modules() if isinstance(m, Linear)):
            uniform_fan_in(linear.weight, linear.in_features, generator)
            if linear.bias is not None:
                linear.bias.zero_()
        self.down_proj.weight /= self.cfg.n_layers**0.5
