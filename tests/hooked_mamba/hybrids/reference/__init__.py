"""The hybrids' equations in float64, as plain loops over the tensors of transformers' files; imports nothing of ours.

`forward(config, weights, tokens)` gives the logits and the value at every site; `edits` maps a site to a function of
its value, whose result the rest of the computation uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.hooked_mamba.hybrids.reference.families import bamba, falcon_h1, granitemoehybrid, jamba, lfm2, nemotron_h
from tests.hooked_mamba.hybrids.reference.parts import Array, Edits, Sites
from tests.hooked_mamba.hybrids.reference.run import Run
from tests.hooked_mamba.hybrids.reference.zamba import zamba

FAMILIES = {f.__name__: f for f in (jamba, bamba, granitemoehybrid, nemotron_h, falcon_h1, lfm2, zamba)}
FAMILIES["zamba2"] = zamba


def forward(
    config: Mapping[str, Any], weights: Mapping[str, Array], tokens: Array, edits: Edits | None = None
) -> Sites:
    """Logits and sites."""
    sites = Sites(edits or {})
    head = {} if "lm_head.weight" in weights else {"lm_head.weight": weights.get("model.embed_tokens.weight")}
    FAMILIES[config["model_type"]](Run(sites, {**weights, **head}, config), tokens)
    return sites
