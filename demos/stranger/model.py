"""The bidirectional Mamba that the PyPI package typeseg ships (Apache-2.0), as a model of ours with its own weights.

    u = SiLU(conv(W_x n))          conv: K taps a channel, SAME padding: it reads 1 position back and 2 ahead
    dt = softplus(W_dt (W_R u)) + 1e-4
    y = scan(u) + reverse(scan(reverse(u)))        one set of weights for both, D counted twice
    out = W_o (y SiLU(z))          z = W_z n, n the LayerNorm of the stream

It reads bytes and gives each of them the logits of 35 kinds of content.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demos.stranger.both_ways import BothWays
from hooked_mamba import ops
from hooked_mamba.components import LayerNorm, Linear, at_least_fp32, silu, softplus
from hooked_mamba.config import MambaConfig
from hooked_mamba.frozen.selective import SelectiveScan
from hooked_mamba.hooks.site import Site
from hooked_mamba.mixers.base import Branch
from hooked_mamba.models import HookedModel
from hooked_mamba.state import zero_padding

PAD = 1, 2
"""Positions that SAME padding adds before and after the text, for 4 taps."""


@dataclass(frozen=True, kw_only=True)
class StrangerConfig(MambaConfig):
    n_classes: int = 35


class BidirectionalMixer(Branch):
    kind, title, place, config_class = "bidirectional_mamba", "Bidirectional Mamba", "mixer", StrangerConfig
    keep_float32 = ("A_log", "D")
    sites = (
        Site("hook_x_pre", "b l E", "convolution input"),
        Site("hook_z", "b l E", "gate branch, before SiLU"),
        Site("hook_x", "b l E", "scan input, after convolution and SiLU"),
        Site("hook_dt", "b l E", "step size dt", wide=True),
        Site("hook_B", "b l N", "input selection"),
        Site("hook_C", "b l N", "output selection"),
        Site("hook_y_ahead", "b l E", "what the scan from the front gives, D u included"),
        Site("hook_y_back", "b l E", "what the scan from the back gives, D u included"),
        Site("hook_y", "b l E", "both together"),
        Site("hook_gate", "b l E", "SiLU(z)"),
        Site("hook_out_proj", "b l d", "mixer output, into the residual stream"),
    )
    frozen_sites = tuple(f"hook_{name}" for name in ("x", "dt", "B", "C", "gate"))
    places: ClassVar = {"u": "hook_x", "y": "hook_y"}
    causal = False

    def __init__(self, cfg: StrangerConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.in_proj, self.out_proj = Linear(cfg.d_model, 2 * cfg.E), Linear(cfg.E, cfg.d_model)
        self.conv1d = nn.Conv1d(cfg.E, cfg.E, cfg.d_conv, groups=cfg.E)
        self.x_proj, self.dt_proj = Linear(cfg.E, cfg.R + 2 * cfg.d_state), Linear(cfg.R, cfg.E)
        self.A_log, self.D = nn.Parameter(torch.empty(cfg.E, cfg.d_state)), nn.Parameter(torch.empty(cfg.E))
        self.add_sites()

    def sizes(self) -> dict[str, int]:
        return {"d": self.cfg.d_model, "E": self.cfg.E, "N": self.cfg.d_state}

    def forward(self, x: Tensor, state: Any = None, call: Any = None) -> tuple[Tensor, tuple[()]]:
        real = zero_padding(None if call is None else call.padding)
        x_pre, z = self.in_proj(x).chunk(2, -1)
        x_pre, z = F.pad(self.hook_x_pre(real(x_pre)).transpose(1, 2), PAD), self.hook_z(z)
        u = self.hook_x(real(silu(self.conv1d(x_pre).transpose(1, 2))))
        dt, B, C = self.x_proj(u).split([self.cfg.R, self.cfg.d_state, self.cfg.d_state], -1)
        dt = self.hook_dt(real(softplus(self.dt_proj(dt)) + 1e-4))
        B, C, A = self.hook_B(B), self.hook_C(C), -torch.exp(at_least_fp32(self.A_log))
        ahead = ops.selective_scan(u, dt, A, B, C, self.D).y
        back = ops.selective_scan(u.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), self.D).y.flip(1)
        y = self.hook_y(self.hook_y_ahead(ahead) + self.hook_y_back(back))
        return self.hook_out_proj(self.out_proj(y * self.hook_gate(silu(z)))), ()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for name, weight in self.named_parameters():
            weight.fill_(1) if name == "D" else weight.normal_(std=0.05, generator=generator)

    def held_scan(self, read: Any) -> BothWays:
        u, dt, B, C = (read(f"hook_{name}") for name in ("x", "dt", "B", "C"))
        A, D = -torch.exp(at_least_fp32(self.A_log)), at_least_fp32(self.D)
        return BothWays(SelectiveScan(u.unsqueeze(-1), dt, A, B.unsqueeze(2), C.unsqueeze(2), D))

    def output_gain(self, read: Any) -> Tensor:
        return at_least_fp32(read("hook_gate"))


class HookedStranger(HookedModel):
    """Six such mixers, and a head of classes in place of the unembedding."""

    family, config_class, norm_class = "stranger", StrangerConfig, LayerNorm
    branch_classes: ClassVar = {"mixer": BidirectionalMixer}

    def _build(self, cfg: Any, tokenizer: Any) -> None:
        super()._build(cfg, tokenizer)
        self.unembed = nn.Linear(cfg.d_model, cfg.n_classes)  # type: ignore[assignment]

    def sizes(self) -> dict[str, int]:
        return {"d": self.cfg.d_model, "V": self.cfg.n_classes}


IN_BLOCK = {"LayerNorm_0": "norm", "Dense_0": "mixer.in_proj", "Conv_0": "mixer.conv1d", "Dense_1": "mixer.x_proj"}
IN_BLOCK |= {"Dense_2": "mixer.dt_proj", "Dense_3": "mixer.out_proj", "A_log": "mixer.A_log", "D": "mixer.D"}
OUTSIDE = {"Embed_0": "embed", "LayerNorm_0": "ln_final", "Dense_0": "unembed"}


def renamed(name: str, value: np.ndarray) -> tuple[str, Tensor]:
    """A weight under its name here, as torch lays it out."""
    first, *rest = name.split("__")
    in_block = first.startswith("CheckpointMambaBlock1D_")
    parts = [f"blocks.{first.rpartition('_')[2]}", IN_BLOCK[rest.pop(0)]] if in_block else [OUTSIDE[first]]
    parts += ["bias" if last == "bias" else "weight" for last in rest]
    tensor = torch.from_numpy(value)
    return ".".join(parts), tensor.permute(*reversed(range(value.ndim))) if name.endswith("kernel") else tensor


def load() -> tuple[HookedStranger, list[str]]:
    """The model with the installed package's weights, and the names of its classes."""
    folder = files("typeseg") / "data"
    about = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    with (folder / about["mamba"]["file"]).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        state = dict(renamed(name, arrays[name]) for name in arrays.files)
    (vocab, d), (E, N) = state["embed.weight"].shape, state["blocks.0.mixer.A_log"].shape
    R, K = state["blocks.0.mixer.dt_proj.weight"].shape[1], state["blocks.0.mixer.conv1d.weight"].shape[2]
    sizes = {"d_model": d, "d_inner": E, "d_state": N, "dt_rank": R, "d_conv": K, "d_vocab": vocab}
    sizes |= {"n_layers": about["mamba"]["n_layers"], "n_classes": len(about["labels"])}
    model = HookedStranger(StrangerConfig(**sizes, eps=1e-6, tie_embeddings=False, model_name="typeseg 0.2.7"))
    model.load_state_dict(state)
    return model.eval(), about["labels"]


def tokens_of(*texts: str) -> Tensor:
    """Texts of one length as the package's own tokens, one a byte: b l."""
    from typeseg._numpy_backend import _COMPACT_TABLE
    from typeseg._tokenize import text_to_bytes

    return torch.from_numpy(np.stack([_COMPACT_TABLE[text_to_bytes(text)] for text in texts]))
