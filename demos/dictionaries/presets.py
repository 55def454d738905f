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

WIDTH, ACTIVE = 672, 31
"""Latents of a write dictionary, and how many are active on average."""

CONTROL_WIDTH, CONTROL_ACTIVE = 2560, 32
"""Of the control's: a model of real text alone is surer of itself, and loses more by what a dictionary misses. With
these and two other models' in float8, those of all four models take 16 MB."""

SPARSE: dict[str, Any] = {"d_sae": WIDTH, "k": ACTIVE, "architecture": "batchtopk"}


def writes(attention: tuple[int, ...] = ()) -> tuple[dict[str, Any], ...]:
    """A write dictionary for each of four layers: of x in Mamba, of v in layers of attention, which is narrower."""
    return tuple(
        {"name": f"l{i}-write", "site": f"blocks.{i}.attn.hook_v", **SPARSE, "d_sae": 512}
        if i in attention
        else {"name": f"l{i}-write", "site": f"blocks.{i}.mixer.hook_x", **SPARSE}
        for i in range(4)
    )


def compared(attention: tuple[int, ...] = ()) -> tuple[dict[str, Any], ...]:
    """Write dictionaries, and what they are compared with: block coders and SAEs of the outputs, all of one width and
    number of active latents. In a layer of attention they predict what attention adds to the stream."""
    return (
        *writes(attention),
        *(
            {"name": f"l{i}-mambacoder", "site": f"blocks.{i}.attn.hook_out", "window": 1, **SPARSE}
            if i in attention
            else {"name": f"l{i}-mambacoder", "layer": i, **SPARSE}
            for i in range(4)
        ),
        *(
            {"name": f"l{i}-out", "site": f"blocks.{i}.{'attn.hook_out' if i in attention else 'mixer.hook_out_proj'}"}
            | SPARSE
            for i in range(4)
        ),
    )


KINDS = ("bundled", "writes", "compared")
"""Presets of a model."""

WRITES = {
    "tinystories-4l-real": tuple({**spec, "d_sae": CONTROL_WIDTH, "k": CONTROL_ACTIVE} for spec in writes()),
    **dict.fromkeys(("tinystories-told-4l", "tinystories-told-mamba2-4l"), writes()),
    "tinystories-told-hybrid-4l": writes(attention=(2,)),
}
"""Bundled model -> its write dictionaries."""

COMPARED = dict.fromkeys(WRITES, compared()) | {"tinystories-told-hybrid-4l": compared(attention=(2,))}
"""Bundled model -> dictionaries of all kinds."""


def preset(model: str, kind: str = "bundled") -> tuple[dict[str, Any], ...]:
    """A model's preset.

    Raises
    ------
    ValueError
        There is none.
    """
    found = {"bundled": PRESETS, "writes": WRITES, "compared": COMPARED}[kind]
    if model not in found:
        raise ValueError(f"{model} has no preset {kind!r} (those are {', '.join(found)}): give --layers and --d-sae")
    return found[model]


def specs(
    model: str,
    layers: list[int] | None = None,
    site: str | None = None,
    d_sae: int | None = None,
    architecture: str | None = None,
    k: int | None = None,
    skip: bool = False,
    kind: str = "bundled",
    window: int | str | None = None,
    target: str | None = None,
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
    kind
        Which preset, of :data:`KINDS`.
    window
        Positions that each reads of the normalised inputs, or "taps"; see :func:`saes.training.coder_config`.
    target
        What MambaCoders predict: "block" (as None), or "local", what a position's own input gives.

    Raises
    ------
    ValueError
        If there is neither a preset nor what a coder needs.
    """
    if layers is None:
        found = preset(model, kind)
        if (site, d_sae, architecture, k, window, target) != (None,) * 6 or skip:
            raise ValueError(
                "--site, --window, --target, --d-sae, --architecture, --k and --skip go with --layers; the preset has"
                " its own"
            )
        return found
    if d_sae is None:
        raise ValueError("--layers needs --d-sae, the number of latents")
    kind: dict[str, Any] = {} if site is None else {"site": site}
    kind |= (
        {"d_sae": d_sae}
        | ({"architecture": architecture} if architecture else {})
        | ({"k": k} if k else {})
        | ({"skip": True} if skip else {})
        | ({"window": window} if window is not None else {})
        | ({"target": target} if target is not None else {})
    )
    suffix = "mambacoder" if site is None else {"out_proj": "out", "x": "write"}.get(site, site.replace("_", "-"))
    suffix += ("" if window is None else "-window") + ("-local" if target == "local" else "")
    return tuple({"name": f"l{layer}-{suffix}", "layer": layer, **kind} for layer in layers)
