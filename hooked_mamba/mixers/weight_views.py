"""Mixers' weights under the names of the field, multiplying from the right; see `hooked_mamba.weights`."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.layers import weights_of


class ProjectionViews:
    """Views of in_proj, convolution and out_proj."""

    in_proj: Any
    conv1d: Any
    out_proj: Any

    @property
    def W_in(self) -> Float[Tensor, "d inner"]:
        return weights_of(self.in_proj, "in_proj")[0].t()

    @property
    def b_in(self) -> Float[Tensor, " inner"]:
        return bias_of(self.in_proj)

    @property
    def W_conv(self) -> Float[Tensor, "C K"]:
        return weights_of(self.conv1d, "conv1d")[0][:, 0]

    @property
    def b_conv(self) -> Float[Tensor, " C"]:
        weight, bias = weights_of(self.conv1d, "conv1d")
        return weight[:, 0, 0] * 0 if bias is None else bias

    @property
    def W_out(self) -> Float[Tensor, "E d"]:
        return weights_of(self.out_proj, "out_proj")[0].t()

    @property
    def b_out(self) -> Float[Tensor, " d"]:
        return bias_of(self.out_proj)

    def in_columns(self, first: int, width: int) -> Float[Tensor, "d w"]:
        """What makes some of in_proj's outputs."""
        return weights_of(self.in_proj, "in_proj")[0][first : first + width].t()


class Mamba1Views(ProjectionViews):
    """Mamba-1: dt, B and C come from the SSM input x."""

    cfg: Any
    x_proj: Any
    dt_proj: Any

    @property
    def W_in_x(self) -> Float[Tensor, "d E"]:
        return self.in_columns(0, self.cfg.E)

    @property
    def W_in_z(self) -> Float[Tensor, "d E"]:
        return self.in_columns(self.cfg.E, self.cfg.E)

    @property
    def W_dt_low(self) -> Float[Tensor, "E R"]:
        return self._x_columns(0, self.cfg.R)

    @property
    def W_dt_proj(self) -> Float[Tensor, "R E"]:
        return weights_of(self.dt_proj, "dt_proj")[0].t()

    @property
    def W_dt(self) -> Float[Tensor, "E E_out"]:
        return self.W_dt_low @ self.W_dt_proj

    @property
    def b_dt(self) -> Float[Tensor, " E"]:
        return self.dt_proj.bias

    @property
    def W_B(self) -> Float[Tensor, "E N"]:
        return self._x_columns(self.cfg.R, self.cfg.d_state)

    @property
    def W_C(self) -> Float[Tensor, "E N"]:
        return self._x_columns(self.cfg.R + self.cfg.d_state, self.cfg.d_state)

    def _x_columns(self, first: int, width: int) -> Tensor:
        return weights_of(self.x_proj, "x_proj")[0][first : first + width].t()


class Mamba2Views(ProjectionViews):
    """Mamba-2: x, B, C and dt all come from the residual stream."""

    cfg: Any
    dt_bias: Any
    norm: Any

    @property
    def W_in_z(self) -> Float[Tensor, "d E"]:
        return self.in_columns(0, self.cfg.E)

    @property
    def W_in_x(self) -> Float[Tensor, "d E"]:
        return self.in_columns(self.cfg.E, self.cfg.E)

    @property
    def W_B(self) -> Float[Tensor, "d G N"]:
        return self._groups(2 * self.cfg.E)

    @property
    def W_C(self) -> Float[Tensor, "d G N"]:
        return self._groups(2 * self.cfg.E + self.cfg.G * self.cfg.d_state)

    @property
    def W_dt(self) -> Float[Tensor, "d H"]:
        return self.in_columns(self.cfg.E + self.cfg.conv_dim, self.cfg.H)

    @property
    def b_dt(self) -> Float[Tensor, " H"]:
        return self.dt_bias

    @property
    def w_gated_norm(self) -> Float[Tensor, " E"]:
        return self.norm.weight

    def _groups(self, first: int) -> Tensor:
        columns = self.in_columns(first, self.cfg.G * self.cfg.d_state)
        return rearrange(columns, "d (g n) -> d g n", g=self.cfg.G)


def bias_of(linear: nn.Linear) -> Tensor:
    """A layer's bias; zeros where it has none."""
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
