"""The channel mix of RWKV-7: an MLP that reads its input mixed with the one before it.

out = W_v relu(W_k (x + mu (x_{t-1} - x)))^2
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_mamba.components import Linear, at_least_fp32
from hooked_mamba.frozen.chain import Chain
from hooked_mamba.frozen.linear import Gain, Project
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.site import Site
from hooked_mamba.layers import weights_of
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.linear_form import Read, projection
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.mixers.token_shift import held_shift, shifted
from hooked_mamba.recurrent_config import RWKV7Config
from hooked_mamba.state import BranchState, Call, columns_read, loadable


@loadable
class ShiftState(NamedTuple):
    """Memory of a channel mix."""

    shift: Tensor
    """The normalised input of the last position, b d."""


class ChannelMix(Branch):
    """token shift -> neurons -> output."""

    kind = "rwkv7_channel_mix"
    packs = True
    title = "Channel mix (RWKV-7)"
    place = "mlp"
    sites = (
        Site("hook_shift", "b l d", "the input one position earlier"),
        Site("hook_x_k", "b l d", "input mixed with the one before it"),
        Site("hook_pre", "b l F", "neurons before relu^2"),
        Site("hook_post", "b l F", "neurons after relu^2"),
        Site("hook_out", "b l d", "output of the layer", also=("hook_mlp_out",)),
    )

    def __init__(self, cfg: RWKV7Config, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.x_k = nn.Parameter(torch.empty(cfg.d_model))
        self.key = Linear(cfg.d_model, cfg.F, bias=False)
        self.value = Linear(cfg.F, cfg.d_model, bias=False)
        self.add_sites()

    def sizes(self) -> dict[str, int]:
        return {"d": self.cfg.d_model, "F": self.cfg.F}

    def facts(self) -> tuple[tuple[str, object], ...]:
        return (("neurons F", self.cfg.F),)

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], ShiftState]:
        call = Call() if call is None else call
        before, last = shifted(resid, None if state is None else state[0], call.padding, call.documents)
        x = torch.addcmul(resid, self.x_k, self.hook_shift(before) - resid)
        x = self.hook_x_k(columns_read(x, call))
        post = self.hook_post(F.relu(self.hook_pre(self.key(x))).square())
        return self.hook_out(self.value(post)), ShiftState(last)

    # The linear form: one of the factors of relu(k)^2 = k relu(k) is held ---------------------------------------------

    frozen_sites = ("hook_pre", "hook_post")
    reach = 2
    places: ClassVar = {"p": "hook_pre", "u": "hook_post"}

    def frozen(self, read: Read, before: BranchState | None, mask: Bool[Tensor, "b l"] | None, norm: Gain) -> Chain:
        path = self.token_path(read)
        pieces = held_shift(norm, self.x_k, self.value_input(), before[0] if before else None, mask, path.p)
        nodes = {"p": len(pieces), "u": len(pieces) + 1, "y": len(pieces) + 1}
        values = {"p": path.p, "u": path.p * path.sigma}
        return Chain((*pieces, Gain(path.sigma), self.value_output()), nodes, path, values)

    def token_path(self, read: Read) -> TokenPath:
        pre = at_least_fp32(read("hook_pre"))
        return TokenPath(pre, F.relu(pre), pre.new_ones(pre.shape[-1], 1), pre.new_zeros(pre.shape[-1]))

    def value_input(self) -> Project:
        return projection(self.key, where="key")

    def value_output(self) -> Project:
        return projection(self.value, where="value")

    def write_weight(self) -> Float[Tensor, "d E"]:
        return weights_of(self.value, "value")[0]

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> ShiftState:
        """Zeros, where the weights are; on "meta" their shapes alone."""
        return ShiftState(self.key.weight.new_zeros(batch, self.cfg.d_model, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: mixes over 0 to 1, projections Kaiming-uniform."""
        cfg = self.cfg
        self.x_k.copy_(1 - (torch.arange(cfg.d_model).to(self.x_k) / max(1, cfg.d_model - 1)) ** 4)
        uniform_fan_in(self.key.weight, cfg.d_model, generator)
        uniform_fan_in(self.value.weight, cfg.F, generator)
        self.value.weight /= cfg.n_layers**0.5
