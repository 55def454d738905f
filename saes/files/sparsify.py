"""Import of sparsify's directories: `cfg.json` and `sae.safetensors`, one directory a hook point, named after it.

A TopK or GroupMax: encoder.weight [F, d], encoder.bias, W_dec [F, d], b_dec, W_skip [d, d] with a skip connection, from
input to output. An SAE's input is centred by b_dec, a transcoder's is not. SAEs read a module's output,
transcoders its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saes.config import CoderConfig
from saes.files.checks import CoderFileError, Hints, check_tensors, field
from saes.files.modules import ModulePath
from saes.files.sites import coder_config


def _sites(folder: str, transcode: bool) -> tuple[str, str]:
    """What a hook point's module reads and gives: our names of a transcoder's, else the folder's own."""
    found = ModulePath.parse(folder)
    if not transcode:
        return folder, folder
    if found is None or found.layer is None or found.parts != ("mixer",):
        return f"the input of {folder}", folder
    return f"blocks.{found.layer}.norm.hook_out", f"blocks.{found.layer}.mixer.hook_out_proj"


def read_sparsify(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], hints: Hints, where: Path
) -> tuple[CoderConfig, Callable[[], dict[str, Tensor]]]:
    """The config, and what reads the weights; `where` is cfg.json in a directory named after the hook point.

    Raises
    ------
    CoderFileError
        For other activation functions, hook points that are no site of ours, or files that do not fit.
    """
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise CoderFileError(f"{where} has activation={activation!r}; expected 'topk' or 'groupmax'")
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
        found_in=read,
        found_out=given,
        found_model=None,
        architecture=activation,
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
