"""Qwen3-Next and Qwen3.5 in GGUF files (`qwen3next`, `qwen35`, `qwen35moe`).

Norms hold 1 + weight already. q, k and v of gated DeltaNet stand together as here, b and a in one tensor by key head
(Qwen3-Next) or apart. In Qwen3.5 the value heads of the key heads take turns, which is undone. Positions are those of
text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig
from hooked_mamba.loading.gguf import common
from hooked_mamba.loading.gguf.keys import Keys
from hooked_mamba.loading.gguf.sources import Decay, Shaped, TiledHeads
from hooked_mamba.loading.hybrids import delta
from hooked_mamba.loading.sources import Runs, Source, Whole, read_table
from hooked_mamba.loading.tables import LazyState
from hooked_mamba.recurrent_config import DeltaNetConfig

ARCHITECTURES = {"qwen3next": "qwen3_next", "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text"}
"""The file's architecture -> model_type of transformers."""


def to_ours(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights under our names; blocks that only predict further tokens are left out."""
    keys = Keys(values)
    stack = common.stack(keys, state)
    d, n, eps = stack["d_model"], stack["n_layers"], stack["eps"]
    first = common.kinds(keys, state, n, {"attn_q.weight": "attn", "ssm_out.weight": "mixer"})
    second = common.kinds(keys, state, n, {"ffn_gate_inp.weight": "moe", "ffn_gate.weight": "mlp"})
    branches: dict[str, Any] = {}
    if "mixer" in first:
        branches["mixer"] = _delta_net(keys, d, n, eps)
    if "attn" in first:
        branches["attn"] = common.attention(keys, state, stack, rotary=True, qk_norm_eps=eps, output_gate=True)
    if "mlp" in second:
        branches["mlp"] = common.mlp(keys, stack, common.neurons(keys, keys.count("block_count")))
    if "moe" in second:
        width = keys.count("expert_feed_forward_length")
        normalized = keys.flag("expert_weights_norm", True)
        branches["moe"] = common.experts(keys, stack, width, normalize=normalized)
        shared = keys.count("expert_shared_feed_forward_length")
        branches["shared"] = common.mlp(keys, stack, shared, output_gate=True)
    words = {"moe": ("moe", "mlp=shared"), "mlp": ("mlp",)}
    cfg = HybridConfig(
        **stack,
        branches=branches,
        layout=tuple(((one,), words[other]) for one, other in zip(first, second, strict=True)),
        architecture=ARCHITECTURES[keys.values["general.architecture"]],
    )
    table = common.stack_weights(cfg.tie_embeddings)
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        table |= common.block(_block(cfg, one, other, f"blk.{i}"), i)
    return cfg, read_table(state, table, dropped=common.further(keys, n))


def _delta_net(keys: Keys, d: int, n: int, eps: float) -> DeltaNetConfig:
    heads, E = keys.count("ssm.time_step_rank"), keys.count("ssm.inner_size")
    if E % heads:
        raise keys.fault("ssm.time_step_rank", f"a number of heads that {E} channels divide among")
    return DeltaNetConfig(
        d_model=d,
        n_layers=n,
        n_key_heads=keys.count("ssm.group_count"),
        n_value_heads=heads,
        key_dim=keys.count("ssm.state_size"),
        value_dim=E // heads,
        d_conv=keys.count("ssm.conv_kernel"),
        norm_eps=eps,
    )


def _block(cfg: HybridConfig, first: str, second: str, there: str) -> common.Weights:
    weights: common.Weights = {
        "norm.weight": Whole(f"{there}.attn_norm.weight"),
        "norm2.weight": Whole(f"{there}.post_attention_norm.weight"),
    }
    if first == "attn":
        weights |= _attention(cfg, there)
    else:
        weights |= _mixer(cfg.branches["mixer"], there, cfg.architecture == "qwen3_next")
    if second == "mlp":
        return weights | common.mlp_weights(there, cfg.branches["mlp"])
    weights |= common.expert_weights(there, cfg.branches["moe"])
    weights |= common.mlp_weights(there, cfg.branches["shared"], "_shexp")
    return weights | {"mlp.output_gate.weight": Shaped(f"{there}.ffn_gate_inp_shexp.weight", (1, cfg.d_model))}


def _attention(cfg: HybridConfig, there: str) -> common.Weights:
    """attn_q holds each head's query, then its gate."""
    attn = cfg.branches["attn"]
    Q, c = attn.n_heads, attn.d_head
    weights = common.attention_weights(there, attn)
    for kind in ("weight", "bias") if attn.qkv_bias else ("weight",):
        weights[f"attn.q_proj.{kind}"] = Runs(f"{there}.attn_q.{kind}", delta.runs(Q, 2 * c, 0, c))
        weights[f"attn.gate_proj.{kind}"] = Runs(f"{there}.attn_q.{kind}", delta.runs(Q, 2 * c, c, c))
    return weights | {f"attn.{p}_norm_weight": Whole(f"{there}.attn_{p}_norm.weight") for p in "qk"}


def _mixer(cfg: DeltaNetConfig, there: str, by_key_head: bool) -> common.Weights:
    G, r, H = cfg.n_key_heads, cfg.n_value_heads // cfg.n_key_heads, cfg.n_value_heads
    keys = 2 * G * cfg.key_dim
    taps = (cfg.conv_dim, 1, cfg.d_conv)

    def heads(name: str, start: int = 0, axis: int = 0, then: Callable[[str], Source] | None = None) -> Source:
        """A tensor of value heads, in the file's order."""
        full = f"{there}.{name}"
        if by_key_head or r == 1:
            return Whole(full) if then is None else then(full)
        return TiledHeads(full, G, r, start, axis, then)

    weights: common.Weights = {
        "mixer.in_proj.weight": heads("attn_qkv.weight", start=keys),
        "mixer.z_proj.weight": heads("attn_gate.weight"),
        "mixer.conv1d.weight": heads("ssm_conv1d.weight", start=keys, then=lambda name: Shaped(name, taps)),
        "mixer.A_log": heads("ssm_a", then=lambda name: Decay(name, (H,))),
        "mixer.dt_bias": heads("ssm_dt.bias"),
        "mixer.norm.weight": Whole(f"{there}.ssm_norm.weight"),
        "mixer.out_proj.weight": heads("ssm_out.weight", axis=1),
    }
    if not by_key_head:
        return weights | {
            "mixer.b_proj.weight": heads("ssm_beta.weight"),
            "mixer.a_proj.weight": heads("ssm_alpha.weight"),
        }
    narrow = f"{there}.ssm_ba.weight"
    weights["mixer.b_proj.weight"] = Runs(narrow, delta.runs(G, 2 * r, 0, r))
    weights["mixer.a_proj.weight"] = Runs(narrow, delta.runs(G, 2 * r, r, r))
    return weights
