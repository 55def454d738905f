"""The dictionaries that come with the package, by model: coders in short form (see `saes.training.coder_config`)."""

from __future__ import annotations

from typing import Any

D_SAE = 1536
"""Eight times d_model."""

MAMBA1: tuple[dict[str, Any], ...] = (
    *({"name": f"l{i}-out", "site": "out_proj", "layer": i, "d_sae": D_SAE, "k": 32} for i in range(4)),
    # dt, B and C of one layer before they part: what the block lets in and reads out.
    {"name": "l2-selection", "site": "x_proj", "layer": 2, "d_sae": 768, "k": 16},
    *({"name": f"l{i}-mambacoder", "layer": i, "d_sae": D_SAE, "k": 32} for i in range(4)),
)

MAMBA2: tuple[dict[str, Any], ...] = (
    {"name": "l2-out", "site": "out_proj", "layer": 2, "d_sae": D_SAE, "k": 32},
    {"name": "l2-mambacoder", "layer": 2, "d_sae": D_SAE, "k": 32},
)

CONTROL = tuple(spec for spec in MAMBA1 if spec["name"] != "l2-selection")
"""For the model of real text alone, on which the case study repeats its claims."""

PRESETS = {"tinystories-4l": MAMBA1, "tinystories-4l-real": CONTROL, "tinystories-mamba2-4l": MAMBA2}
"""Bundled model -> its dictionaries."""


def specs(
    model: str,
    layers: list[int] | None = None,
    site: str | None = None,
    d_sae: int | None = None,
    architecture: str | None = None,
    k: int | None = None,
    skip: bool = False,
) -> tuple[dict[str, Any], ...]:
    """The coders that a command line asks for: a preset, or one coder a layer.

    Parameters
    ----------
    model
        Name; presets are found by it.
    layers
        Blocks to train a coder on; None takes the model's preset.
    site
        Short name of a site for SAEs; None trains MambaCoders.
    d_sae, architecture, k, skip
        Latents, architecture, active latents of each, and whether it has a linear path as well.

    Raises
    ------
    ValueError
        If there is neither a preset nor what a coder needs.
    """
    if layers is None:
        if model not in PRESETS:
            raise ValueError(f"{model} has no preset (those are {', '.join(PRESETS)}): give --layers and --d-sae")
        if (site, d_sae, architecture, k) != (None,) * 4 or skip:
            raise ValueError("--site, --d-sae, --architecture, --k and --skip go with --layers; the preset has its own")
        return PRESETS[model]
    if d_sae is None:
        raise ValueError("--layers needs --d-sae, the number of latents")
    kind: dict[str, Any] = {} if site is None else {"site": site}
    kind |= (
        {"d_sae": d_sae}
        | ({"architecture": architecture} if architecture else {})
        | ({"k": k} if k else {})
        | ({"skip": True} if skip else {})
    )
    suffix = "mambacoder" if site is None else {"out_proj": "out"}.get(site, site.replace("_", "-"))
    return tuple({"name": f"l{layer}-{suffix}", "layer": layer, **kind} for layer in layers)
