"""Paths of modules in transformers' models, such as `backbone.layers.25.mixer`: what a coder trained on their outputs
is called here.

A path alone says too little where one name stands for several kinds of layers: Nemotron-H calls each of them `mixer`,
Jamba calls MLPs and experts `feed_forward`. With the model at hand (:mod:`saes.placing`) it is decided, or refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATH = re.compile(r"(?:(?:base_model|backbone|model|language_model|transformer)\.)*layers[._]([0-9]{1,4})((?:\.\w+)*)")
_STEM = re.compile(r"^(?:(?:base_model|backbone|model|language_model|transformer)\.)+")

BRANCHES: dict[str, tuple[str, ...]] = {
    "mixer": ("mixer", "attn", "mlp", "moe"),
    "mamba": ("mixer",),
    "linear_attn": ("mixer",),
    "conv": ("mixer",),
    "attn": ("attn", "mixer"),
    "self_attn": ("attn",),
    "mlp": ("mlp", "moe"),
    "ffn": ("mlp", "moe"),
    "feed_forward": ("mlp", "moe"),
    "block_sparse_moe": ("moe",),
    "shared_mlp": ("mlp",),
}
"""A module within a layer -> the branches of a block that it may be."""

NORMS = {
    "norm": "norm",
    "input_layernorm": "norm",
    "operator_norm": "norm",
    "attn_norm": "norm",
    "post_attention_layernorm": "norm2",
    "pre_ff_layernorm": "norm2",
    "ffn_norm": "norm2",
    "mlp_norm": "norm2",
}
"""A norm within a layer -> ours, where norms stand before what reads them."""

OUT = ("out_proj", "o_proj", "down_proj")
"""Modules within one of BRANCHES whose output is the branch's own."""

TOP = {
    "embed_tokens": "hook_embed",
    "embeddings": "hook_embed",
    "embedding": "hook_embed",
    "norm_f": "ln_final.hook_out",
    "norm": "ln_final.hook_out",
    "final_layernorm": "ln_final.hook_out",
}

DEFAULT = {"mixer": "mixer.hook_out_proj", "mamba": "mixer.hook_out_proj", "linear_attn": "mixer.hook_out_proj"}
DEFAULT |= {"conv": "mixer.hook_out_proj", "self_attn": "attn.hook_out", "block_sparse_moe": "moe.hook_out"}
DEFAULT |= {"shared_mlp": "mlp.hook_out"}
"""Outputs where no model decides: what the name means in most families. Another kind of layer has no such site."""


@dataclass(frozen=True)
class ModulePath:
    """A module of transformers within a layer, or above all layers."""

    layer: int | None
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, path: object) -> ModulePath | None:
        """The path's layer and what is behind it; None where it is no such path."""
        if not isinstance(path, str) or len(path) > 200:
            return None
        if found := _PATH.fullmatch(path):
            return cls(int(found[1]), tuple(found[2].split(".")[1:]))
        name = _STEM.sub("", path)
        return cls(None, (name,)) if name in TOP else None

    def site(self) -> str | None:
        """Our site of the module's output, as far as the path alone says it."""
        if self.layer is None:
            return TOP[self.parts[0]]
        block = f"blocks.{self.layer}."
        if not self.parts:
            return f"{block}hook_resid_post"
        if self.parts[0] in NORMS and len(self.parts) == 1:
            return f"{block}{NORMS[self.parts[0]]}.hook_out"
        out = DEFAULT.get(self.parts[0])
        if out is None or len(self.parts) > 2:
            return None
        if len(self.parts) == 1:
            return block + out
        if self.parts == ("mixer", "in_proj"):
            return f"{block}mixer.hook_in_proj"
        return block + out if self.parts[1] in OUT else None
