"""Codestral-Mamba as Mistral ships it: `params.json` and `consolidated.safetensors`.

The model is a raw Mamba-2 wrapped once more, so every tensor name starts with `model.`; what `params.json`
does not name has mamba_ssm's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import Mamba2Config
from hooked_mamba.loading import raw_mamba2
from hooked_mamba.loading.tables import (
    REQUIRED,
    CheckpointError,
    Field,
    LazyState,
    check_known,
    read_fields,
    reject,
)

__all__ = ["FIELDS", "from_ours", "to_ours"]

PREFIX = "model."

# Here "ours" is the raw config of mamba_ssm, which the raw loader reads on.
FIELDS = (
    Field("d_model", "dim"),
    Field("n_layer", "n_layers"),
    Field("vocab_size", "vocab_size"),
    Field("ngroups", "n_groups"),
    Field("rms_norm", "rms_norm", True),
    Field("residual_in_fp32", "residual_in_fp32", True),
    Field("fused_add_norm", "fused_add_norm", True),
    Field("pad_vocab_size_multiple", "pad_vocab_size_multiple", 1),
    Field("tie_embeddings", "tie_embeddings", False),
)


def to_ours(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[Mamba2Config, LazyState]:
    """Config and weights of a Codestral-Mamba, under our names. Errors as for raw Mamba-2."""
    what = "params.json"
    check_known(config, {row.theirs for row in FIELDS} | {"model_type"}, what)
    reject(config, {"model_type": ("mamba",)}, what)
    raw = read_fields(config, FIELDS, what)
    raw["ssm_cfg"] = {"layer": "Mamba2", "ngroups": raw.pop("ngroups")}
    names = {name: name.removeprefix(PREFIX) for name in state_dict}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"tensors appear both with and without the prefix {PREFIX!r}; expected one of the two")
    cfg, state = raw_mamba2.to_ours(raw, LazyState.of(state_dict).renamed(names))
    return cfg, state.expecting(PREFIX)


def from_ours(cfg: Mamba2Config, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`.

    Raises
    ------
    CheckpointError
        What params.json has no field for: anything in `ssm_cfg` but the number of groups.
    """
    raw, state = raw_mamba2.from_ours(cfg, state_dict)
    ssm_cfg = raw.pop("ssm_cfg")
    extra = set(ssm_cfg) - {"layer", "ngroups"}
    if extra:
        raise CheckpointError(f"params.json has no field for {', '.join(sorted(extra))}; save as 'raw' or 'hf' instead")
    raw["ngroups"] = cfg.n_groups
    config = {row.theirs: raw[row.ours] for row in FIELDS if row.default is REQUIRED or row.ours in raw}
    return config | {"model_type": "mamba"}, state.renamed({name: PREFIX + name for name in state})
