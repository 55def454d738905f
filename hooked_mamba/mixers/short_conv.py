"""The gated short convolution of LFM2 (arXiv:2511.23404): each token reads only the few before it.

B, C, x = W_in stream      y = C * conv(B * x)      out = W_out y
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.components import Linear, at_least_fp32, convolved
from hooked_mamba.frozen.conv_scan import ConvScan
from hooked_mamba.hooks.site import Site
from hooked_mamba.hybrid_config import ShortConvConfig
from hooked_mamba.layers import weights_of
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.linear_form import Read
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.state import BranchState, Call, columns_read, loadable, with_history, zero_padding


@loadable
class ConvState(NamedTuple):
    """Memory of a convolution alone."""

    conv: Tensor
    """Its last K - 1 inputs, b K-1 d."""


class ShortConv(Branch):
    """in_proj -> B x -> convolution -> C -> out_proj, with a hook point at every site."""

    kind = "short_conv"
    packs = True
    title = "Short convolution"
    place = "mixer"
    config_class = ShortConvConfig
    sites = (
        Site("hook_in_proj", "b l 3d", "whole projection, before the split: B, C, x"),
        Site("hook_B", "b l d", "gate of the convolution's input"),
        Site("hook_C", "b l d", "gate of its output"),
        Site("hook_x", "b l d", "values, before their gate"),
        Site("hook_x_pre", "b l d", "convolution input B x"),
        Site("hook_conv", "b l d", "convolution output"),
        Site("hook_y_gated", "b l d", "C times the convolution's output"),
        Site("hook_out_proj", "b l d", "mixer output, into the residual stream"),
    )
    frozen_sites = ("hook_B", "hook_x_pre", "hook_C")
    places: ClassVar = {"u": "hook_x_pre", "y": "hook_conv"}
    vectors_site = "hook_y_gated"

    def __init__(self, cfg: ShortConvConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        d = cfg.d_model
        self.in_proj = Linear(d, 3 * d, bias=cfg.bias)
        self.conv1d = nn.Conv1d(d, d, cfg.d_conv, groups=d, bias=cfg.bias)
        self.out_proj = Linear(d, d, bias=cfg.bias)
        self.value_rows = slice(2 * d, 3 * d)
        self.add_sites()

    def sizes(self) -> dict[str, int]:
        return {"d": self.cfg.d_model}

    def facts(self) -> tuple[tuple[str, object], ...]:
        return (("convolution taps K", self.cfg.d_conv),)

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], ConvState]:
        padding, documents = (None, None) if call is None else (call.padding, call.documents)
        (past,) = self.initial_state(len(resid)) if state is None else state
        B, C, x = self.hook_in_proj(self.in_proj(resid)).chunk(3, -1)
        B, C, x = self.hook_B(B), self.hook_C(C), self.hook_x(x)
        x = self.hook_x_pre(zero_padding(padding)(B * x))
        x, before, history = with_history(x, past, padding, documents)
        y = self.hook_conv(convolved(x, self.conv1d, before, documents)[:, -len(C[0]) :])
        return self.hook_out_proj(self.out_proj(columns_read(self.hook_y_gated(C * y), call))), ConvState(history)

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> ConvState:
        """Zeros in front of the first position, where the weights are; on "meta" their shape alone."""
        cfg = self.cfg
        return ConvState(self.in_proj.weight.new_zeros(batch, cfg.d_conv - 1, cfg.d_model, device=device))

    # The linear form: both gates are held, and the taps move values ----------------------------------------------

    def held_scan(self, read: Read) -> ConvScan:
        u = at_least_fp32(read("hook_x_pre"))
        taps = at_least_fp32(weights_of(self.conv1d, "conv1d")[0][:, 0])
        return ConvScan(u.unsqueeze(-1), taps, (u != 0).any(-1))  # at padding u is 0

    def input_gain(self, read: Read) -> Float[Tensor, "b l d"]:
        return at_least_fp32(read("hook_B"))

    def output_gain(self, read: Read) -> Float[Tensor, "b l d"]:
        return at_least_fp32(read("hook_C"))

    def scan_bias(self) -> Float[Tensor, " d"] | None:
        bias = weights_of(self.conv1d, "conv1d")[1]
        return None if bias is None else at_least_fp32(bias)

    def bias_sites(self) -> list[tuple[str, Tensor | None]]:
        biases = (self.in_proj.bias, self.conv1d.bias, self.out_proj.bias)
        return list(zip(("hook_in_proj", "hook_conv", "hook_out_proj"), biases, strict=True))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: Kaiming-uniform, the output scaled down by the root of the number of blocks."""
        for linear in (self.in_proj, self.out_proj):
            uniform_fan_in(linear.weight, linear.in_features, generator)
            if linear.bias is not None:
                linear.bias.zero_()
        for parameter in self.conv1d.parameters():
            uniform_fan_in(parameter, self.cfg.d_conv, generator)
        self.out_proj.weight /= self.cfg.n_layers**0.5
