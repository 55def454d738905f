"""The table of hook sites: what exists, its shape and what it means. The docs' table is printed from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hooked_mamba.config import Mamba2Config, MambaConfig, SSMConfig

Place = Literal["top", "block", "mixer", "mixer.norm", "norm", "ln_final"]


@dataclass(frozen=True)
class Site:
    """One row of the table."""

    place: Place
    """Which module holds the hook point."""
    name: str
    """Name of the hook point in that module."""
    mamba: str | None
    """Shape in Mamba-1 by symbols, None where the site is absent."""
    mamba2: str | None
    """Shape in Mamba-2."""
    text: str
    """What stands there."""
    lazy: tuple[str, ...] = ()
    """Families in which the site is computed only while something sits on it."""
    wide: bool = False
    """Whether it is float32 (or float64) also in a half-precision model."""


SITES: tuple[Site, ...] = (
    Site("top", "hook_tokens", "b l", "b l", "token ids, if the input is tokens"),
    Site("top", "hook_embed", "b l d", "b l d", "token embedding"),
    Site("block", "hook_resid_pre", "b l d", "b l d", "residual stream entering the block", wide=True),
    Site("norm", "hook_scale", "b l 1", "b l 1", "the divisor sqrt(mean x^2 + eps)", wide=True),
    Site("norm", "hook_normalized", "b l d", "b l d", "x / scale, before the weight", wide=True),
    Site("norm", "hook_out", "b l d", "b l d", "after the weight: what in_proj reads"),
    Site("mixer", "hook_in_proj", "b l 2E", "b l E+C+H", "whole projection, before the split"),
    Site("mixer", "hook_x_pre", "b l E", "b l C", "convolution input"),
    Site("mixer", "hook_z", "b l E", "b l E", "gate branch, before SiLU"),
    Site("mixer", "hook_conv", "b l E", "b l C", "convolution output, before SiLU"),
    Site("mixer", "hook_x", "b l E", "b l H P", "SSM input, after SiLU"),
    Site("mixer", "hook_x_proj", "b l R+2N", None, "whole x_proj output: low-rank dt, B, C"),
    Site("mixer", "hook_dt_low", "b l R", None, "low-rank step size: what dt_proj reads"),
    Site("mixer", "hook_dt_pre", "b l E", "b l H", "step size before softplus, bias included", wide=True),
    Site("mixer", "hook_dt", "b l E", "b l H", "step size dt, after softplus and clamp", wide=True),
    Site("mixer", "hook_B", "b l N", "b l G N", "input selection B, as the scan sees it"),
    Site("mixer", "hook_C", "b l N", "b l G N", "output selection C, as the scan sees it"),
    Site("mixer", "hook_A_bar", "b l E N", "b l H", "decay exp(dt A)", lazy=("mamba",), wide=True),
    Site("mixer", "hook_B_bar", "b l E N", "b l H N", "dt B (Euler)", lazy=("mamba",), wide=True),
    Site(
        "mixer",
        "hook_Bx",
        "b l E N",
        "b l H P N",
        "what is written into the state",
        lazy=("mamba", "mamba2"),
        wide=True,
    ),
    Site(
        "mixer",
        "hook_h",
        "b l E N",
        "b l H P N",
        "states as read: an edit changes what position t reads out, not later states",
        lazy=("mamba", "mamba2"),
        wide=True,
    ),
    Site(
        "mixer",
        "hook_h.{t}",
        "b E N",
        "b H P N",
        "the state right after position t: an edit travels on to all later positions",
        lazy=("mamba", "mamba2"),
        wide=True,
    ),
    Site("mixer", "hook_y_scan", "b l E", "b l H P", "C h, before the D skip"),
    Site("mixer", "hook_skip", "b l E", "b l H P", "D x"),
    Site("mixer", "hook_y", "b l E", "b l H P", "scan output with the skip"),
    Site("mixer", "hook_gate", "b l E", "b l E", "SiLU(z)"),
    Site("mixer", "hook_y_gated", "b l E", "b l E", "y * gate"),
    Site("mixer.norm", "hook_scale", None, "b l Gn 1", "the gated norm's divisor, per group", wide=True),
    Site("mixer.norm", "hook_normalized", None, "b l E", "y_gated / scale, before the weight", wide=True),
    Site("mixer.norm", "hook_out", None, "b l E", "after the weight: what out_proj reads"),
    Site("mixer", "hook_out_proj", "b l d", "b l d", "mixer output, into the residual stream"),
    Site("block", "hook_resid_post", "b l d", "b l d", "residual stream leaving the block", wide=True),
    Site("ln_final", "hook_scale", "b l 1", "b l 1", "the final norm's divisor", wide=True),
    Site("ln_final", "hook_normalized", "b l d", "b l d", "x / scale, before the weight", wide=True),
    Site("ln_final", "hook_out", "b l d", "b l d", "what the unembedding reads"),
    Site("top", "hook_logits", "b l V", "b l V", "logits", wide=True),
)

_BLOCK_PLACES: dict[Place, str] = {
    "block": "",
    "norm": "norm.",
    "mixer": "mixer.",
    "mixer.norm": "mixer.norm.",
}

ALIASES: dict[str, str] = {
    "hook_ssm_out": "hook_out_proj",  # TransformerLens
    "hook_ssm_dt": "hook_dt_pre",  # TransformerLens: dt_proj's output, before softplus
    "hook_ssm_input": "hook_x",  # MambaLens, this and the following
    "hook_normalized_input": "norm.hook_out",  # its norm includes the weight
    "hook_delta": "hook_dt",
    "hook_delta_1": "hook_dt_low",
    "hook_delta_2": "hook_dt_pre",
    "hook_ssm_output": "hook_y",
    "hook_after_skip": "hook_y_gated",
}
"""Names used elsewhere for our sites. MambaLens' hook_skip is our hook_z; our hook_skip is D x."""


def family_of(cfg: SSMConfig) -> str:
    """ "mamba" or "mamba2"."""
    return "mamba2" if isinstance(cfg, Mamba2Config) else "mamba"


def site_of(name: str) -> Site:
    """The row of a full hook name such as `blocks.3.mixer.hook_dt` or `blocks.0.mixer.hook_h.17`."""
    parts = name.split(".")
    if parts[-1].lstrip("-").isdigit():
        parts[-1] = "{t}"
    if parts[0] == "blocks":
        parts = parts[2:]
        place, site = (".".join(parts[:-1]) or "block", parts[-1])
        if site == "{t}":
            place, site = ".".join(parts[:-2]), ".".join(parts[-2:])
    else:
        place, site = ("top" if len(parts) == 1 else parts[0]), parts[-1]
    for row in SITES:
        if row.place == place and row.name == site:
            return row
    raise KeyError(name)


def site_shape(name: str, cfg: SSMConfig, batch: int, length: int) -> tuple[int, ...]:
    """The shape of a site's value in a model of this config."""
    row = site_of(name)
    symbols = row.mamba2 if isinstance(cfg, Mamba2Config) else row.mamba
    if symbols is None:
        raise KeyError(f"{name} does not exist in {family_of(cfg)}")
    sizes = {
        "b": batch,
        "l": length,
        "1": 1,
        "d": cfg.d_model,
        "E": cfg.E,
        "N": cfg.d_state,
        "V": cfg.d_vocab,
    }
    sizes |= {"2E": 2 * cfg.E, "C": cfg.conv_dim}
    if isinstance(cfg, MambaConfig):
        sizes |= {"R": cfg.R, "R+2N": cfg.R + 2 * cfg.d_state}
    elif isinstance(cfg, Mamba2Config):
        sizes |= {
            "H": cfg.H,
            "P": cfg.P,
            "G": cfg.G,
            "Gn": cfg.gated_norm_groups,
            "E+C+H": cfg.E + cfg.conv_dim + cfg.H,
        }
    return tuple(sizes[symbol] for symbol in symbols.split())


def site_bytes(name: str, cfg: SSMConfig, batch: int, length: int, itemsize: int) -> int:
    """Bytes of a site's value; `itemsize` is that of the model's dtype."""
    row = site_of(name)
    size = max(itemsize, 4) if row.wide else itemsize
    return math.prod(site_shape(name, cfg, batch, length)) * (8 if row.name == "hook_tokens" else size)


def is_default(name: str, family: str) -> bool:
    """Whether a cache without a filter holds this site."""
    return family not in site_of(name).lazy


def markdown_table() -> str:
    """The table of sites for the docs."""
    lines = ["| site | Mamba-1 | Mamba-2 | what it is |", "|---|---|---|---|"]
    for row in SITES:
        prefix = "" if row.place == "top" else "ln_final." if row.place == "ln_final" else _prefix(row.place)
        families = "in Mamba-1 " if row.lazy == ("mamba",) else ""
        lazy = f" *({families}only while something sits on it)*" if row.lazy else ""
        shapes = [shape.replace("Gn", "G") if shape else "–" for shape in (row.mamba, row.mamba2)]
        lines.append(f"| `{prefix}{row.name}` | {shapes[0]} | {shapes[1]} | {row.text}{lazy} |")
    return "\n".join(lines)


def _prefix(place: Place) -> str:
    return f"blocks.{{i}}.{_BLOCK_PLACES[place]}"
