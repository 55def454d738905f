"""Random configs of the eight families, all tiny, with every field drawn that changes what is computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.hooked_mamba.hybrids.tiny import Tiny

Fields = dict[str, Any]


def divisor(draw: random.Random, n: int) -> int:
    """One of n's divisors."""
    return draw.choice([k for k in range(1, n + 1) if n % k == 0])


def shape(draw: random.Random, widths: tuple[int, ...] = (4, 6, 8)) -> Fields:
    """Width, heads, layers and norms, which all families have."""
    heads = draw.choice([1, 2, 4])
    return {
        "hidden_size": heads * draw.choice(widths), "num_attention_heads": heads,
        "num_key_value_heads": divisor(draw, heads), "intermediate_size": draw.choice([5, 12, 17]),
        "num_hidden_layers": draw.choice([2, 3, 4]), "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
    }  # fmt: skip


def words(draw: random.Random, layers: int, *kinds: str) -> list[str]:
    """Kinds of layers in random order, each at least once where there is room."""
    found = [*kinds][:layers] + [draw.choice(kinds) for _ in range(layers - len(kinds))]
    draw.shuffle(found)
    return found


def mamba2(draw: random.Random, E: int) -> Fields:
    """A Mamba-2 mixer of E channels."""
    heads = divisor(draw, E)
    return {
        "mamba_n_heads": heads, "mamba_d_head": E // heads, "mamba_n_groups": divisor(draw, heads),
        "mamba_d_state": draw.choice([1, 3, 6]), "mamba_d_conv": draw.choice([2, 3, 4]),
        "mamba_chunk_size": draw.choice([1, 3, 8]), "mamba_conv_bias": draw.random() < 0.5,
        "mamba_proj_bias": draw.random() < 0.3,
    }  # fmt: skip


def factor(draw: random.Random) -> float:
    """A factor that is not 1."""
    return round(draw.uniform(0.4, 1.9), 2)


def jamba(draw: random.Random) -> Fields:
    f = shape(draw)
    experts = draw.choice([2, 3, 5])
    periods = {name: draw.choice([1, 2, 3]) for name in ("attn_layer", "expert_layer")}
    f |= {f"{name}_period": n for name, n in periods.items()}
    f |= {f"{name}_offset": draw.randrange(n) for name, n in periods.items()}
    f |= {"mamba_d_state": draw.choice([1, 3, 6]), "mamba_d_conv": draw.choice([2, 3, 4])}
    f |= {"mamba_expand": draw.choice([1, 2, 3]), "mamba_dt_rank": draw.choice([1, 2, 5])}
    f |= {"mamba_conv_bias": draw.random() < 0.5, "num_experts": experts}
    return f | {"num_experts_per_tok": draw.randint(1, experts)}


def bamba(draw: random.Random) -> Fields:
    f = shape(draw, (4, 8))
    f |= {"mamba_expand": draw.choice([1, 2, 3])}
    f |= mamba2(draw, f["mamba_expand"] * f["hidden_size"])
    layers = range(f["num_hidden_layers"])
    return f | {"attn_layer_indices": sorted(draw.sample(layers, draw.randint(1, len(layers) - 1)))}


def granite(draw: random.Random) -> Fields:
    f = shape(draw)
    f |= {"mamba_expand": draw.choice([1, 2, 3])}
    f |= mamba2(draw, f["mamba_expand"] * f["hidden_size"])
    experts = draw.choice([0, 2, 4])
    f |= {name: factor(draw) for name in ("residual_multiplier", "attention_multiplier", "logits_scaling")}
    f |= {"embedding_multiplier": 10 * factor(draw), "num_local_experts": experts}
    f |= {"num_experts_per_tok": draw.randint(1, experts) if experts else 0}
    f |= {"position_embedding_type": draw.choice(["rope", "nope"]), "shared_intermediate_size": draw.choice([5, 14])}
    return f | {"layer_types": words(draw, f["num_hidden_layers"], "mamba", "attention")}


def nemotron(draw: random.Random) -> Fields:
    f = shape(draw)
    groups, per_group = draw.choice([1, 2, 3]), draw.choice([2, 3])
    heads = draw.choice([2, 4, 6])
    kept = draw.randint(1, groups)
    f |= {"layer_norm_epsilon": f.pop("rms_norm_eps"), "head_dim": draw.choice([4, 6, 10])}
    f |= {"layers_block_type": words(draw, draw.choice([3, 4, 5]), "mamba", "moe", "attention", "mlp")}
    del f["num_hidden_layers"]
    f |= {"mamba_num_heads": heads, "mamba_head_dim": draw.choice([2, 5]), "n_groups": divisor(draw, heads)}
    f |= {"ssm_state_size": draw.choice([1, 3, 6]), "conv_kernel": draw.choice([2, 3, 4])}
    f |= {"n_routed_experts": groups * per_group, "n_group": groups, "topk_group": kept}
    f |= {"num_experts_per_tok": draw.randint(1, kept * per_group), "norm_topk_prob": draw.random() < 0.5}
    f |= {"moe_latent_size": draw.choice([6, 16]), "moe_intermediate_size": draw.choice([5, 11])}
    return f | {"moe_shared_expert_intermediate_size": draw.choice([4, 9]), "routed_scaling_factor": factor(draw)}


def falcon(draw: random.Random) -> Fields:
    f, E = shape(draw), draw.choice([8, 12, 24])
    f |= {"head_dim": draw.choice([2, 4, 10]), "mamba_d_ssm": E, **mamba2(draw, E)}
    f |= {"mamba_rms_norm": draw.random() < 0.6, "mamba_norm_before_gate": draw.random() < 0.5}
    names = ("lm_head", "embedding", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
    f |= {f"{name}_multiplier": factor(draw) for name in names}
    f |= {"mlp_multipliers": [factor(draw), factor(draw)], "tie_word_embeddings": draw.random() < 0.5}
    return f | {"ssm_multipliers": [factor(draw) for _ in range(5)]}


def lfm2(draw: random.Random) -> Fields:
    f = shape(draw)
    f |= {"norm_eps": f.pop("rms_norm_eps"), "conv_L_cache": draw.choice([2, 3, 4])}
    f |= {"conv_bias": draw.random() < 0.5, "block_multiple_of": draw.choice([1, 8])}
    return f | {"layer_types": words(draw, f["num_hidden_layers"], "conv", "full_attention")}


def zamba(draw: random.Random) -> Fields:
    f = shape(draw)
    f |= {"num_key_value_heads": f["num_attention_heads"], "mamba_expand": draw.choice([1, 2])}
    f |= {"num_hidden_layers": draw.choice([3, 4])}
    f |= {"layers_block_type": words(draw, f["num_hidden_layers"], "mamba", "hybrid", "hybrid")}
    f |= {"mamba_d_state": draw.choice([1, 3, 6]), "mamba_d_conv": draw.choice([2, 3, 4])}
    heads = draw.choice([k for k in (1, 2, 4) if f["mamba_expand"] * f["hidden_size"] % k == 0])
    return f | {"n_mamba_heads": heads, "mamba_dt_rank": draw.choice([1, 2, 5])}


def zamba2(draw: random.Random) -> Fields:
    f = shape(draw)
    E = 2 * f["hidden_size"]
    heads = draw.choice([k for k in (1, 2, 4, 8) if E % k == 0])
    f |= {"num_key_value_heads": f["num_attention_heads"], "mamba_expand": 2, "n_mamba_heads": heads}
    f |= {"num_hidden_layers": draw.choice([3, 4, 5]), "mamba_ngroups": divisor(draw, heads)}
    f |= {"layers_block_type": words(draw, f["num_hidden_layers"], "mamba", "hybrid", "hybrid")}
    f |= {"num_mem_blocks": draw.choice([1, 2]), "adapter_rank": draw.choice([1, 4])}
    f |= {"mamba_d_state": draw.choice([1, 3, 6]), "mamba_d_conv": draw.choice([2, 3, 4])}
    return f | {"use_mem_rope": draw.random() < 0.5, "use_shared_attention_adapter": True}


DRAWN: dict[str, tuple[str, Callable[[random.Random], Fields]]] = {
    "jamba": ("jamba", jamba), "bamba": ("bamba", bamba), "granite": ("granite-moe", granite),
    "nemotron": ("nemotron", nemotron), "falcon": ("falcon", falcon), "lfm2": ("lfm2", lfm2),
    "zamba": ("zamba", zamba), "zamba2": ("zamba2", zamba2),
}  # fmt: skip
"""Family -> (the case whose other fields hold, what draws the rest)."""


def drawn(seed: int) -> Tiny:
    """A random model; families take turns."""
    family = [*DRAWN][seed % len(DRAWN)]
    case, fields = DRAWN[family]
    return Tiny(case, seed, **fields(random.Random(seed)))
