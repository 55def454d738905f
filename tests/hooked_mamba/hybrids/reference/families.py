"""Blocks of one stream: Jamba, Bamba, Granite 4, Nemotron-H, Falcon-H1, LFM2."""

from __future__ import annotations

import numpy as np

from tests.hooked_mamba.hybrids.reference.attention import attention
from tests.hooked_mamba.hybrids.reference.mixers import Mamba2Shape, mamba1, mamba2, short_conv
from tests.hooked_mamba.hybrids.reference.mlps import gated_mlp, granite_moe, jamba_moe, nemotron_moe, plain_mlp
from tests.hooked_mamba.hybrids.reference.parts import Array, relu2, rms
from tests.hooked_mamba.hybrids.reference.run import Run, limit, mamba_shape, plain_attention, theta


def jamba(run: Run, tokens: Array) -> None:
    c = run.config
    eps, x = c["rms_norm_eps"], run.embed(tokens, "model.embed_tokens.weight")
    for i in range(c["num_hidden_layers"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["input_layernorm.weight"], x, eps)
        if i % c["attn_layer_period"] == c["attn_layer_offset"]:
            x = x + b("hook_attn_out", attention(b.at("attn.", "self_attn."), n, plain_attention(c)))
        else:
            x = x + b("hook_mixer_out", mamba1(b.at("mixer.", "mamba."), n, c["mamba_d_state"], eps))
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["pre_ff_layernorm.weight"], x, eps)
        if i % c["expert_layer_period"] == c["expert_layer_offset"]:
            p = b.at("moe.", "feed_forward.")
            x = x + b("hook_moe_out", jamba_moe(p, n, c["num_experts"], c["num_experts_per_tok"]))
        else:
            p = b.at("mlp.", "feed_forward.")
            matrices = (p[f"{m}_proj.weight"] for m in ("gate", "up", "down"))
            x = x + b("hook_mlp_out", gated_mlp(p, n, *matrices))
        x = b("hook_resid_post", x)
    run.unembed(x, "model.final_layernorm.weight", eps, "lm_head.weight")


def bamba(run: Run, tokens: Array) -> None:
    c = run.config
    eps, x = c["rms_norm_eps"], run.embed(tokens, "model.embed_tokens.weight")
    half = c["hidden_size"] // c["num_attention_heads"] // 2
    for i in range(c["num_hidden_layers"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["input_layernorm.weight"], x, eps)
        if i in (c.get("attn_layer_indices") or [j for j, w in enumerate(c["layer_types"]) if "att" in w]):
            shape = plain_attention(c, rotary=half, base=theta(c))
            x = x + b("hook_attn_out", attention(b.at("attn.", "self_attn."), n, shape))
        else:
            shape = mamba_shape(c, c["mamba_expand"] * c["hidden_size"])
            x = x + b("hook_mixer_out", mamba2(b.at("mixer.", "mamba."), n, shape))
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["pre_ff_layernorm.weight"], x, eps)
        p = b.at("mlp.", "feed_forward.")
        x = x + b("hook_mlp_out", gated_mlp(p, n, *(p[f"{m}_proj.weight"] for m in ("gate", "up", "down"))))
        x = b("hook_resid_post", x)
    run.unembed(x, "model.final_layernorm.weight", eps, "lm_head.weight")


def granitemoehybrid(run: Run, tokens: Array) -> None:
    c = run.config
    eps, r = c["rms_norm_eps"], c["residual_multiplier"]
    x = run.embed(tokens, "model.embed_tokens.weight", c["embedding_multiplier"])
    width = c["hidden_size"] // c["num_attention_heads"]
    rope = {"rotary": width, "base": theta(c)} if c["position_embedding_type"] == "rope" else {}
    for i, word in enumerate(c["layer_types"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["input_layernorm.weight"], x, eps)
        if word in ("attention", "full_attention"):
            shape = plain_attention(c, scale=c["attention_multiplier"], **rope)
            x = x + b("hook_attn_out", attention(b.at("attn.", "self_attn."), n, shape) * r)
        else:
            shape = mamba_shape(c, c["mamba_expand"] * c["hidden_size"])
            x = x + b("hook_mixer_out", mamba2(b.at("mixer.", "mamba."), n, shape) * r)
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["post_attention_layernorm.weight"], x, eps)
        added = 0
        if c["num_local_experts"]:
            p = b.at("moe.", "block_sparse_moe.")
            added = b("hook_moe_out", granite_moe(p, n, c["num_experts_per_tok"]) * r)
        p = b.at("mlp.", "shared_mlp.")
        gate, up = np.split(p["input_linear.weight"], 2)
        x = x + added + b("hook_mlp_out", gated_mlp(p, n, gate, up, p["output_linear.weight"]) * r)
        x = b("hook_resid_post", x)
    run.unembed(x, "model.norm.weight", eps, "model.embed_tokens.weight", 1 / c["logits_scaling"])


def nemotron_h(run: Run, tokens: Array) -> None:
    c = run.config
    eps = c["layer_norm_epsilon"]
    stem = "model." if "model.embeddings.weight" in run.weights else "backbone."
    x = run.embed(tokens, f"{stem}embeddings.weight")
    E = c["mamba_num_heads"] * c["mamba_head_dim"]
    shape = Mamba2Shape(E, c["mamba_num_heads"], c["n_groups"], c["ssm_state_size"], eps, limit=limit(c))
    for i, word in enumerate(c.get("layers_block_type") or c["layer_types"]):
        b = run.block(i, f"{stem}layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["norm.weight"], x, eps)
        if "mamba" in word or "linear" in word:
            x = x + b("hook_mixer_out", mamba2(b.at("mixer.", "mixer."), n, shape))
        elif "attention" in word:
            x = x + b("hook_attn_out", attention(b.at("attn.", "mixer."), n, plain_attention(c)))
        elif word == "mlp":
            x = x + b("hook_mlp_out", plain_mlp(b.at("mlp.", "mixer."), n, relu2))
        else:
            routed_out = b("hook_moe_out", nemotron_moe(b.at("moe.", "mixer."), n, c))
            x = x + routed_out + b("hook_mlp_out", plain_mlp(b.at("mlp.", "mixer.shared_experts."), n, relu2))
        x = b("hook_resid_post", x)
    run.unembed(x, f"{stem}norm_f.weight", eps, "lm_head.weight")


def falcon_h1(run: Run, tokens: Array) -> None:
    c = run.config
    eps = c["rms_norm_eps"]
    x = run.embed(tokens, "model.embed_tokens.weight", c["embedding_multiplier"])
    norm = "none" if not c["mamba_rms_norm"] else "norm_first" if c["mamba_norm_before_gate"] else "gate_first"
    shape = mamba_shape(c, c["mamba_d_ssm"], gated_norm=norm, scales=tuple(c["ssm_multipliers"]))
    heads = plain_attention(c, rotary=c["head_dim"], base=theta(c), key=c["key_multiplier"])
    m0, m1 = c["mlp_multipliers"]
    for i in range(c["num_hidden_layers"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["input_layernorm.weight"], x, eps)
        mixed = mamba2(b.at("mixer.", "mamba."), n * c["ssm_in_multiplier"], shape) * c["ssm_out_multiplier"]
        looked = attention(b.at("attn.", "self_attn."), n * c["attention_in_multiplier"], heads)
        x = x + b("hook_mixer_out", mixed) + b("hook_attn_out", looked * c["attention_out_multiplier"])
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["pre_ff_layernorm.weight"], x, eps)
        p = b.at("mlp.", "feed_forward.")
        matrices = (p[f"{m}_proj.weight"] for m in ("gate", "up", "down"))
        x = x + b("hook_mlp_out", gated_mlp(p, n, *matrices, m=m0) * m1)
        x = b("hook_resid_post", x)
    run.unembed(x, "model.final_layernorm.weight", eps, "lm_head.weight", c["lm_head_multiplier"])


def lfm2(run: Run, tokens: Array) -> None:
    c = run.config
    eps, x = c["norm_eps"], run.embed(tokens, "model.embed_tokens.weight")
    heads = plain_attention(c, base=theta(c), qk_norm=eps)
    heads.rotary = heads.c
    for i, word in enumerate(c["layer_types"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["operator_norm.weight"], x, eps)
        if word == "conv":
            x = x + b("hook_mixer_out", short_conv(b.at("mixer.", "conv."), n))
        else:
            x = x + b("hook_attn_out", attention(b.at("attn.", "self_attn."), n, heads, "out_proj"))
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["ffn_norm.weight"], x, eps)
        p = b.at("mlp.", "feed_forward.")
        x = x + b("hook_mlp_out", gated_mlp(p, n, *(p[f"{m}.weight"] for m in ("w1", "w3", "w2"))))
        x = b("hook_resid_post", x)
    run.unembed(x, "model.embedding_norm.weight", eps, "lm_head.weight")
