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
        """The weights of some of in_proj's outputs."""
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


class AttentionViews:
    """Attention: one matrix per query head; key and value matrices are repeated for the heads that share them."""

    cfg: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any

    @property
    def W_Q(self) -> Float[Tensor, "Q i c"]:
        return self._of_heads("q_proj")

    @property
    def W_K(self) -> Float[Tensor, "Q i c"]:
        return self._of_heads("k_proj")

    @property
    def W_V(self) -> Float[Tensor, "Q i c"]:
        return self._of_heads("v_proj")

    @property
    def W_O(self) -> Float[Tensor, "Q c d"]:
        return rearrange(weights_of(self.o_proj, "o_proj")[0], "d (h c) -> h c d", c=self.cfg.d_head)

    @property
    def b_Q(self) -> Float[Tensor, "Q c"]:
        return self._bias_of_heads(self.q_proj)

    @property
    def b_K(self) -> Float[Tensor, "Q c"]:
        return self._bias_of_heads(self.k_proj)

    @property
    def b_V(self) -> Float[Tensor, "Q c"]:
        return self._bias_of_heads(self.v_proj)

    @property
    def b_O(self) -> Float[Tensor, " d"]:
        return bias_of(self.o_proj)

    def _of_heads(self, name: str) -> Float[Tensor, "Q i c"]:
        heads = rearrange(weights_of(getattr(self, name), name)[0], "(h c) i -> h i c", c=self.cfg.d_head)
        return heads.repeat_interleave(self.cfg.n_heads // len(heads), 0)

    def _bias_of_heads(self, linear: nn.Linear) -> Float[Tensor, "Q c"]:
        heads = rearrange(bias_of(linear), "(h c) -> h c", c=self.cfg.d_head)
        return heads.repeat_interleave(self.cfg.n_heads // len(heads), 0)


class MLPViews:
    """An MLP; `W_gate` only of a gated one."""

    cfg: Any
    gate_proj: Any
    up_proj: Any
    down_proj: Any

    @property
    def W_gate(self) -> Float[Tensor, "i F"]:
        return weights_of(self.gate_proj, "gate_proj")[0].t()

    @property
    def W_in(self) -> Float[Tensor, "i F"]:
        return weights_of(self.up_proj, "up_proj")[0].t()

    @property
    def b_in(self) -> Float[Tensor, " F"]:
        return bias_of(self.up_proj)

    @property
    def W_out(self) -> Float[Tensor, "F d"]:
        return weights_of(self.down_proj, "down_proj")[0].t()

    @property
    def b_out(self) -> Float[Tensor, " d"]:
        return bias_of(self.down_proj)


def bias_of(linear: nn.Linear) -> Tensor:
    """A layer's bias; zeros where it has none."""
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
