"""Mamba's scan under rules that divide a product among its factors, as hooks on its sites.

half    the gate's product is shared evenly by its two factors, with sigma(z) held; dt, B, C are held
shares  the scan's product C B u is shared by its factors; dt and the gate are held
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.frozen.selective import SelectiveScan
from hooked_mamba.mixers.linear_form import Hooks, Read, hold, linear_silu

RULE_SITES = tuple(
    f"hook_{site}" for site in ("in_proj", "x_pre", "conv", "x", "dt", "B", "C", "z", "gate", "y", "out_proj")
)
"""What these hooks read, and where a rule's gradients are taken."""


def selective_rule_hooks(
    rule: str,
    shares: tuple[float, float, float],
    read: Read,
    mask: Tensor | None,
    h0: Tensor | None,
    *,
    scan: Callable[[Read], SelectiveScan],
    linear_B: Callable[[Tensor], Tensor],
    linear_C: Callable[[Tensor], Tensor],
) -> Hooks:
    """Hooks for a mixer with the sites dt, B, C, conv, x, z, gate, y and y_gated.

    Parameters
    ----------
    rule, shares, read, mask, h0
        As in :meth:`LinearForm.rule_hooks`.
    scan
        The scan of the pass under way.
    linear_B, linear_C
        B and C, linear in what the mixer computes them from; given the value, for its shape.
    """
    c, b, v = shares

    def x(value: Tensor, hook: Any) -> Tensor:
        """SiLU with its factor held; nothing at padding."""
        u = linear_silu(read("hook_conv")[..., : value.shape[2:].numel()])
        return (u if mask is None else u * mask.unsqueeze(-1)).reshape(value.shape)

    def gate(value: Tensor, hook: Any) -> Tensor:
        return linear_silu(read("hook_z"))

    def halves(value: Tensor, hook: Any) -> Tensor:
        y, g = read("hook_y").flatten(2), read("hook_gate")
        return (y * g.detach() + y.detach() * g) / 2

    def y(value: Tensor, hook: Any) -> Tensor:
        """D u, and C B u as three scans in each of which one factor varies; the memory shares C with the first."""
        view = scan(read)
        u, B, C, none = view.u.detach(), view.B.detach(), view.C.detach(), torch.zeros_like(view.D)
        before = None if h0 is None else h0.detach()
        terms = (
            view.D.detach().unsqueeze(-1) * view.u
            + c * replace(view, u=u, B=B, D=none).out(before).y
            + b * replace(view, u=u, C=C, D=none).out().y
            + v * replace(view, B=B, C=C, D=none).out().y
            + (1 - c) * replace(view, u=0 * u, B=B, C=C, D=none).out(h0).y
        )
        return terms.reshape(value.shape).to(value.dtype)

    hooks: Hooks = [("hook_dt", hold), ("hook_x", x)]
    hooks.append(("hook_B", (lambda value, hook: linear_B(value)) if b else hold))
    hooks.append(("hook_C", (lambda value, hook: linear_C(value)) if c else hold))
    if rule == "half":
        return [*hooks, ("hook_gate", gate), ("hook_y_gated", halves)]
    return [*hooks, ("hook_gate", hold), ("hook_y", y)]
