"""Import of sparsify's directories: `cfg.json` and `sae.safetensors`, one directory a hook point, named after it.

A TopK: encoder.weight [F, d], encoder.bias, W_dec [F, d], b_dec, W_skip [d, d] with a skip connection, from input to
output. An SAE's input is centred by b_dec, a transcoder's is not. SAEs read a module's output, transcoders its input.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saes.config import CoderConfig
from saes.files.checks import CoderFileError, Hints, check_tensors, field
from saes.files.sites import coder_config

_LAYER = re.compile(r"(?:backbone\.|model\.)?layers[._]([0-9]{1,4})((?:\.\w+)*)")

OUTPUTS = {
    "": "hook_resid_post",
    ".mixer": "mixer.hook_out_proj",
    ".mixer.out_proj": "mixer.hook_out_proj",
    ".mixer.in_proj": "mixer.hook_in_proj",
    ".norm": "norm.hook_out",
}
"""Our site of the output of a module within a block."""

TOP = {"embed_tokens": "hook_embed", "embeddings": "hook_embed", "norm_f": "ln_final.hook_out"}


def _sites(folder: str, transcode: bool) -> tuple[str | None, str | None]:
    """Our names of what a hook point's module reads and gives, as far as a coder can be on it."""
    found = _LAYER.fullmatch(folder)
    if found is None:
        return (None, None) if transcode else (TOP.get(folder.removeprefix("backbone.")),) * 2
    block, module = f"blocks.{int(found[1])}.", found[2]
    if transcode:
        return (f"{block}norm.hook_out", f"{block}mixer.hook_out_proj") if module == ".mixer" else (None, None)
    site = OUTPUTS.get(module)
    return (None, None) if site is None else (block + site, block + site)


def read_sparsify(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], hints: Hints, where: Path
) -> tuple[CoderConfig, Callable[[], dict[str, Tensor]]]:
    """The config, and what reads the weights; `where` is cfg.json in a directory named after the hook point.

    Raises
    ------
    CoderFileError
        For activation functions other than TopK, hook points that are no site of ours, or files that do not fit.
    """
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise CoderFileError(f"{where} has activation={activation!r}; expected 'topk'")
    for name in ("signed", "transcode", "skip_connection"):
        if not isinstance(config.get(name, False), bool):
            raise CoderFileError(f"{where} has {name}={config[name]!r}, expected true or false")
    if config.get("signed", False):
        raise CoderFileError(f"{where} keeps latents of either sign (signed=true); expected positive ones only")
    d_in = field(config, "d_in", int, where)
    if config.get("num_latents") in (None, 0):
        d_sae = d_in * field(config, "expansion_factor", int, where)
    else:
        d_sae = field(config, "num_latents", int, where)
    transcode, skip = config.get("transcode", False), config.get("skip_connection", False)
    read, given = _sites(where.parent.resolve().name, transcode)
    k = field(config, "k", int, where) if hints.k is None else hints.k
    cfg = coder_config(
        dataclasses.replace(hints, k=k),
        where,
        transcoder=transcode,
        found_in=read or where.parent.name,
        found_out=given or where.parent.name,
        found_model=None,
        architecture="topk",
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        skip=skip,
        apply_b_dec_to_input=not transcode,
    )

    def weights() -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {
            "encoder.weight": (cfg.d_sae, d_in),
            "encoder.bias": (cfg.d_sae,),
            "W_dec": (cfg.d_sae, d_in),
            "b_dec": (d_in,),
        }
        if skip:
            shapes["W_skip"] = (d_in, d_in)
        check_tensors(tensors, shapes, where.with_name("sae.safetensors"))
        state = {"W_enc": tensors["encoder.weight"].t(), "b_enc": tensors["encoder.bias"]}
        state |= {name: tensors[name] for name in ("W_dec", "b_dec")}
        return state | ({"W_skip": tensors["W_skip"].t()} if skip else {})

    return cfg, weights
