"""The oracle with all but the value path held at a run's numbers: a replay that imports nothing of the linear forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.hooked_mamba.recurrent.models import equations
from tests.hooked_mamba.reference import Edits

RWKV7 = ("hook_r", "hook_w", "hook_k", "hook_kappa", "hook_a", "hook_nu", "hook_gate")
DELTANET = ("hook_q", "hook_k", "hook_A_bar", "hook_beta", "hook_gate")
MAMBA3 = ("hook_B", "hook_C", "hook_A_bar", "hook_beta", "hook_gamma", "hook_gate")
VALUES = {"hook_v", "hook_x"}
"""The site of what the held scan is linear in."""


def value_site(model, layer: int) -> str:
    """The full name of the site of the values."""
    (name,) = VALUES & {point.rpartition(".")[2] for point in model.hook_dict if f"blocks.{layer}.mixer." in point}
    return f"blocks.{layer}.mixer.{name}"


def held_edits(model, tokens) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Edits that hold what selects, gates and divides; one factor of SiLU and of relu^2 is held too."""
    run = equations(model, tokens).sites
    mamba3 = "blocks.0.mixer.hook_x" in run
    names = RWKV7 if model.family == "rwkv7" else MAMBA3 if mamba3 else DELTANET
    edits: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    now: dict[str, np.ndarray] = {}

    def keep(name: str):
        def edit(value: np.ndarray) -> np.ndarray:
            now[name] = value
            return value

        return edit

    def constant(value: np.ndarray):
        return lambda _: value.copy()

    def of_factor(source: str, factor: np.ndarray):
        return lambda value: (now[source][..., -factor.shape[-1] :] * factor).reshape(value.shape)

    for name, value in run.items():
        local = name.rpartition(".")[2]
        if name.endswith("hook_scale") or ("mixer" in name and local in names):
            edits[name] = constant(value)
        elif name.endswith("mlp.hook_post") and model.family == "rwkv7":
            pre = name.replace("hook_post", "hook_pre")
            edits[pre], edits[name] = keep(pre), of_factor(pre, np.maximum(run[pre], 0))
        elif name.endswith("mixer.hook_v") and model.family != "rwkv7":
            conv = name.replace("hook_v", "hook_conv")
            conv = conv if conv in run else name.replace("hook_v", "hook_x_pre")
            E = value[0, 0].size
            edits[conv] = keep(conv)
            edits[name] = of_factor(conv, 1 / (1 + np.exp(-run[conv][..., -E:])))
    return edits


def joined(held: Edits, more: Edits) -> Edits:
    """Held values with further edits on top."""
    edits = dict(held)
    for name, edit in more.items():
        below = held.get(name)
        edits[name] = edit if below is None else (lambda value, a=below, b=edit: b(a(value)))
    return edits
