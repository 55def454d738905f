"""Zamba and Zamba2: a transformer that blocks share."""

from __future__ import annotations

import numpy as np

from tests.hooked_mamba.hybrids.reference.attention import AttentionShape, attention
from tests.hooked_mamba.hybrids.reference.mixers import Mamba2Shape, mamba1_heads, mamba2
from tests.hooked_mamba.hybrids.reference.mlps import gated_mlp
from tests.hooked_mamba.hybrids.reference.parts import Array, Part, gelu, rms
from tests.hooked_mamba.hybrids.reference.run import Run, limit, theta


def zamba(run: Run, tokens: Array) -> None:
    c = run.config
    second = c["model_type"] == "zamba2"
    d, eps = c["hidden_size"], c["rms_norm_eps"]
    embedded = x = run.embed(tokens, "model.embed_tokens.weight")
    width = 2 * d // c["num_attention_heads"]
    heads = AttentionShape(c["num_attention_heads"], c["num_key_value_heads"], width, (width / 2) ** -0.5)
    if second and c["use_mem_rope"]:
        heads.rotary, heads.base = width, theta(c)
    E = c["mamba_expand"] * d
    groups = c.get("mamba_ngroups", 0)
    shape = Mamba2Shape(E, c["n_mamba_heads"], groups, c["mamba_d_state"], 1e-5, limit=limit(c))
    hybrid = [i for i, word in enumerate(c["layers_block_type"]) if word == "hybrid"]
    for i in range(c["num_hidden_layers"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        entering, m = x, b
        if i in hybrid:
            j = hybrid.index(i)
            first = hybrid[j % (c["num_mem_blocks"] if second else 1)]
            name = "shared_transformer" if second else "shared_transf"
            shared = run.block(i, f"model.layers.{first}.{name}.")
            n = rms(shared, "norm_shared.", shared["input_layernorm.weight"], np.concatenate([x, embedded], -1), eps)
            looked = attention(Adapted(shared.at("attn.", "self_attn."), j if second else None), n, heads)
            n = rms(shared, "norm2.", shared["pre_ff_layernorm.weight"], looked, eps)
            p = shared.at("mlp.", "feed_forward.")
            if second:
                list_of = f"gate_up_proj_adapter_list.{j}."
                low = p[f"{list_of}1.weight"] @ p[f"{list_of}0.weight"]
                gate, up = np.split(p["gate_up_proj.weight"] + low, 2)
            else:
                gate, up = p["gate_proj.weight"], p["up_proj.weight"]
            made = gated_mlp(p, n, gate, up, p["down_proj.weight"], gelu)
            entering = b("hook_mixer_in", x + b("hook_shared_out", made @ b["linear.weight"].T))
            m = run.block(i, f"model.layers.{i}.mamba_decoder.")
        n = rms(m, "norm.", m["input_layernorm.weight"], entering, eps)
        p = m.at("mixer.", "mamba.")
        mixed = mamba2(p, n, shape) if second else mamba1_heads(p, n, c["mamba_d_state"])
        x = b("hook_resid_post", x + b("hook_mixer_out", mixed))
    run.unembed(x, "model.final_layernorm.weight", eps, "lm_head.weight")


class Adapted(Part):
    """Attention's weights with what its j-th use adds to them."""

    def __init__(self, part: Part, j: int | None) -> None:
        super().__init__(part.sites, part.ours, part.weights, part.theirs)
        self.j = j

    def __getitem__(self, name: str) -> Array:
        weight, letter = super().__getitem__(name), name[0]
        if self.j is None or letter == "o":
            return weight
        low = [super(Adapted, self).__getitem__(f"linear_{letter}_adapter_list.{self.j}.{k}.weight") for k in (0, 1)]
        return weight + low[1] @ low[0]
