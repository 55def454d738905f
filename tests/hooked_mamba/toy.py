"""A mixer in one file, as a newcomer would write it: a gated linear recurrence. Nothing else knows of it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hooked_mamba import ops
from hooked_mamba.components import Linear, at_least_fp32
from hooked_mamba.config import SSMConfig
from hooked_mamba.frozen.scan import DecayScan
from hooked_mamba.hooks.site import Site
from hooked_mamba.mixers.base import Branch
from hooked_mamba.models import HookedModel
from hooked_mamba.state import zero_padding


class ToyState(NamedTuple):
    """Memory of one mixer."""

    h: Tensor
    """b E."""


class ToyMixer(Branch):
    """v = W_v x, g = sigmoid(W_g x), h_t = a h_{t-1} + v_t, out = W_o (g h)."""

    kind = "toy"
    title = "Toy"
    place = "mixer"
    sites = (
        Site("hook_v", "b l E", "what is written into memory"),
        Site("hook_g", "b l E", "gate"),
        Site("hook_a", "b l E", "decay; 1 at padding", wide=True),
        Site("hook_h", "b l E", "memory as read"),
        Site("hook_out", "b l d", "mixer output"),
    )
    frozen_sites = ("hook_v", "hook_g", "hook_a")
    places: ClassVar = {"u": "hook_v", "y": "hook_h"}
    norm_readers = ("in_proj.weight", "gate_proj.weight")

    def __init__(self, cfg: SSMConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.in_proj, self.gate_proj = Linear(cfg.d_model, cfg.E), Linear(cfg.d_model, cfg.E)
        self.out_proj = Linear(cfg.E, cfg.d_model)
        self.a = nn.Parameter(torch.empty(cfg.E))
        self.add_sites()

    def sizes(self):
        return {"d": self.cfg.d_model, "E": self.cfg.E}

    def forward(self, x, state=None, call=None):
        padding = None if call is None else call.padding
        v = self.hook_v(zero_padding(padding)(self.in_proj(x)))
        g = self.hook_g(torch.sigmoid(self.gate_proj(x)))
        real = x.new_ones(x.shape[:2]) if padding is None else padding.mask
        a = self.hook_a(torch.where(real.unsqueeze(-1) != 0, at_least_fp32(self.a), 1.0))
        h = ops.linear_scan(a, at_least_fp32(v), h0=None if state is None else state.h)
        return self.hook_out(self.out_proj(g * self.hook_h(h.to(v.dtype)))), ToyState(h[:, -1])

    def initial_state(self, batch, device=None):
        return ToyState(self.a.new_zeros(batch, self.cfg.E, device=device))

    def reset_parameters(self, generator=None):
        for linear in (self.in_proj, self.gate_proj, self.out_proj):
            linear.weight.normal_(std=0.3, generator=generator)
            linear.bias.normal_(std=0.1, generator=generator)
        self.a.uniform_(0.5, 0.95, generator=generator)

    def held_scan(self, read):
        return DecayScan(read("hook_v").unsqueeze(-1), read("hook_a"))

    def output_gain(self, read):
        return at_least_fp32(read("hook_g"))


class HookedToy(HookedModel):
    """A language model of toy mixers."""

    family = "toy"
    config_class = SSMConfig
    branch_classes: ClassVar = {"mixer": ToyMixer}
